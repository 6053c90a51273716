"""What exact mode costs: generation, a forward without gradient, and a training step, with and without it.

    python benchmarks/run.py rl.exact

Random prompts of various lengths, several completions each, as rollouts have them; then the forward over the finished
sequences, without gradient and with a backward pass: over one prompt's completions, which begin alike ("train"), and over
one completion of each prompt ("train apart"). In turns, in one process, on one model. Without exact mode forwards are
stock's own. Generation is also measured by stock's `generate` (padded batches) with --stock. Before the clock starts it is
checked that the log-probabilities of generated tokens are bit for bit those of the forward, in exact mode, and how far they
are off without.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import hf_paged
from hf_paged import SamplingParams
from hf_paged.hf.build import load_model

from .. import schema

EXACT, PLAIN, STOCK = "exact", "not exact", "stock"


@dataclass(frozen=True)
class Plan:
    """Sizes of the work: `prompt` and `output` in tokens, prompts between half and one and a half times as long."""

    prompts: int
    n: int
    prompt: int
    output: int
    rounds: int


class Work:
    """One round of rollouts and what a trainer does with them."""

    def __init__(self, model, plan: Plan):
        self.model, self.plan = model, plan
        draw = random.Random(0)
        vocabulary = model.config.vocab_size
        lengths = [draw.randrange(plan.prompt // 2, plan.prompt * 3 // 2) for _ in range(plan.prompts)]
        self.prompts = [[draw.randrange(3, vocabulary) for _ in range(length)] for length in lengths]
        self.params = SamplingParams(n=plan.n, max_tokens=plan.output, temperature=1.0, logprobs=0, ignore_eos=True, seed=1)

    def generate(self):
        return hf_paged.engine_of(self.model).generate(self.prompts, self.params)

    def on_stock(self) -> None:
        width = max(map(len, self.prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in self.prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in self.prompts])
        count = self.plan.output
        options = dict(do_sample=True, top_k=0, num_return_sequences=self.plan.n, pad_token_id=0)
        self.model.generate(ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, **options)

    def take(self, outputs) -> None:
        """The finished sequences, padded on the left, for the forwards."""
        pairs = [(prompt, c) for prompt, output in zip(self.prompts, outputs) for c in output.outputs]
        width = max(len(prompt) for prompt, _ in pairs) + self.plan.output
        rows = [prompt + c.token_ids for prompt, c in pairs]
        self.ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        self.mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        self.positions = (self.mask.cumsum(-1) - 1).clamp_min(0)
        self.sampled = torch.tensor([[e[t].logprob for e, t in zip(c.logprobs, c.token_ids)] for _, c in pairs])

    def logprobs(self, some: slice = slice(None)) -> torch.Tensor:
        options = {} if hf_paged.hf.patch.patch_of(self.model).exact else {"position_ids": self.positions[some]}
        ids, count = self.ids[some], self.plan.output
        output = self.model(ids, attention_mask=self.mask[some], logits_to_keep=count + 1, use_cache=False, **options)
        logprobs = torch.log_softmax(output.logits[:, :-1].float(), dim=-1)
        return logprobs.gather(2, ids[:, -count:, None])[..., 0]

    @torch.no_grad()
    def forward(self) -> torch.Tensor:
        return self.logprobs()

    def train(self) -> None:
        """A forward and backward pass of one prompt's completions."""
        self._train(slice(0, self.plan.n))

    def train_apart(self) -> None:
        """The same of one completion of each prompt."""
        self._train(slice(0, None, self.plan.n))

    def _train(self, some: slice) -> None:
        self.logprobs(some).sum().backward()
        self.model.zero_grad()


def measure(work: Work, stock: bool) -> tuple[dict[tuple[str, str], list[float]], dict[str, float]]:
    """(seconds by system and part of every round, by how much sampled log-probabilities are off the forward's)."""
    seconds: dict[tuple[str, str], list[float]] = {}
    off: dict[str, float] = {}

    def timed(system: str, part: str, run) -> None:
        started = time.perf_counter()
        run()
        seconds.setdefault((system, part), []).append(time.perf_counter() - started)

    for _ in range(work.plan.rounds):
        for system in (PLAIN, EXACT):
            hf_paged.patch(work.model, exact=system == EXACT)
            work.take(work.generate())  # everything warm; the same tokens again below
            off[system] = float((work.forward() - work.sampled).abs().max())
            work.train()
            for part in ("generate", "forward", "train", "train apart"):
                hf_paged.engine_of(work.model).reset_prefix_cache()
                timed(system, part, getattr(work, part.replace(" ", "_")))
            hf_paged.unpatch(work.model)
        if stock:
            timed(STOCK, "generate", work.on_stock)
    assert off[EXACT] == 0.0, off
    return seconds, off


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; by default the embedded model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--n", type=int, default=4, help="completions of each prompt")
    parser.add_argument("--prompt", type=int, default=96, help="tokens, about")
    parser.add_argument("--output", type=int, default=32, help="tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stock", action="store_true", help="measure stock's generate, too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=schema.results_folder())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    plan = Plan(*(getattr(options, name) for name in ("prompts", "n", "prompt", "output", "rounds")))
    model = load_model(options.model, device="cpu")[0].to(getattr(torch, options.dtype))
    seconds, off = measure(Work(model, plan), options.stock)
    machine = schema.describe_machine("cpu", options.threads)
    rows = []
    for (system, part), taken in seconds.items():
        base = seconds[PLAIN, part]
        about = dict(vars(plan), off=off.get(system))
        common = dict(benchmark="rl.exact", workload=part, model=model.config._name_or_path, dtype=options.dtype,
                      system=system, detail=about)  # fmt: skip
        rows.append(schema.Measure(**common, metric="time", unit="s", samples=taken))
        if system != PLAIN:
            ratios = [mine / other for mine, other in zip(taken, base)]
            rows.append(schema.Measure(**common, metric="time", unit="ratio", samples=ratios, baseline=PLAIN))
        print(f"{options.dtype} {part:<11} {system:<10} {min(taken):7.2f} s   {min(taken) / min(base):5.2f} times {PLAIN}")
    print("sampled log-probabilities are off those of the forward by at most", off)
    schema.replace_rows(options.out / "rl.csv", rows, machine)


if __name__ == "__main__":
    main()
