"""How a family is compared with stock transformers: ragged prompts, chunked prefill, prefix hits, preemption, generate."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from tiny_models import CACHE

import hf_paged
from hf_paged import EngineConfig, SamplingParams

NEW = 24  # tokens generated for each prompt
LONGEST = 70  # tokens of the longest prompt
TOLERANCE = 1e-4  # of logits, relative to the largest one (at least 1)


def prompts(vocab_size: int) -> list[list[int]]:
    """Ragged lengths around blocks, chunks and windows; two share a long prefix."""
    generator = torch.Generator().manual_seed(7)
    make = lambda length: torch.randint(3, vocab_size, (length,), generator=generator).tolist()  # noqa: E731
    shared = make(48)
    return [make(13), make(14), make(15), make(1), make(17), shared + make(5), make(LONGEST), shared + make(12)]


def stock_greedy(model, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """Tokens and logits [NEW, V] of stock's greedy search."""
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)


class Comparison:
    """A model and what stock makes of `prompts`. Each check raises AssertionError where hf_paged makes something else."""

    def __init__(self, model):
        self.model = model
        self.jobs = prompts(model.get_input_embeddings().weight.shape[0])
        self.expected = [stock_greedy(model, prompt) for prompt in self.jobs]

    def check_is_telling(self) -> None:
        """The model's tokens vary, and its logits depend on earlier tokens: else anything would be right."""
        different = {token for tokens, _ in self.expected for token in tokens}
        assert len(different) >= 4, f"all its tokens are among {different}"
        prompt = self.jobs[-1]
        logits = []
        for token in prompt[-10], prompt[-10] + 1:
            ids = torch.tensor([prompt[:-10] + [token] + prompt[-9:]])
            with torch.no_grad():
                logits.append(self.model(input_ids=ids, use_cache=False).logits[0, -1])
        change = (logits[0] - logits[1]).abs().max() / logits[0].abs().max()
        assert change > 100 * TOLERANCE, f"an earlier token changes its logits by {change:.1e} only"

    def check_chunks_and_prefix_hits(self) -> None:
        """Prefill in chunks of at most 24 tokens beside decodes; then again, with every prefix cached.

        Models that keep a state have no prefix cache.
        """
        config = EngineConfig(block_size=16, max_batch_tokens=24, max_num_seqs=4)
        with hf_paged.Engine(self.model, config=config) as engine:
            self._check_tokens(engine)
            engine.reset_stats()
            self._check_tokens(engine)
            hits = engine.stats()["prefix_hit_tokens"]
            assert engine.model.states or hits > 0, "no prefix was found again"
            assert not engine.model.states or hits == 0, "a prefix was taken up without its state"

    def check_preemption(self) -> None:
        hf_paged.patch(self.model)
        adapter = hf_paged.hf.patch.patch_of(self.model).adapter
        hf_paged.unpatch(self.model)
        layers = [replace(layer, value_in_key=False) for layer in adapter.layers]  # as on CPU
        memory = 112 * sum(layer.bytes_per_token(torch.float32) for layer in layers)  # of about 112 tokens of full attention
        states = 4 * sum(spec.num_bytes for spec in adapter.states)
        scarce = layers and states <= memory and all(layer.window is None and layer.chunk is None for layer in layers)
        if states:  # half of the memory is theirs
            memory = 2 * max(memory, states)
        config = EngineConfig(block_size=16, max_batch_tokens=64, max_num_seqs=6, kv_cache_memory=memory)
        with hf_paged.Engine(self.model, config=config) as engine:
            self._check_tokens(engine)
            if scarce:  # with windows the same memory holds more
                assert engine.stats()["preemptions"] > 0, "nothing was preempted"

    def check_reference_kernels(self) -> None:
        config = EngineConfig(block_size=16, max_batch_tokens=96, attention_backend="reference", fuse=False)
        with hf_paged.Engine(self.model, config=config) as engine:
            self._check_tokens(engine)

    def check_generate(self) -> None:
        """One padded batch through the patched model's own `generate`: tokens and logits."""
        width = max(map(len, self.jobs))
        ids = torch.zeros(len(self.jobs), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(self.jobs):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        options = dict(attention_mask=mask, max_new_tokens=NEW, do_sample=False)
        stock = self.model.generate(ids, **options, return_dict_in_generate=True, output_logits=True)
        hf_paged.patch(self.model, max_batch_tokens=64)
        try:
            shown = self.model.generate(ids, **options, return_dict_in_generate=True, output_logits=True)
            plain = self.model.generate(ids, **options)
        finally:
            hf_paged.unpatch(self.model)
        for row, (tokens, mine) in enumerate(zip(stock.sequences.tolist(), shown.sequences.tolist())):
            assert mine == tokens, f"generate: row {row} has other tokens"
            assert plain[row].tolist() == tokens, f"generate: row {row} has other tokens where no logits are shown"
            theirs, mine = (torch.stack([step[row] for step in out.logits]) for out in (stock, shown))
            off = (mine - theirs).abs().max().item() / max(1.0, theirs.abs().max().item())
            assert off <= TOLERANCE, f"generate: logits of row {row} are off by {off:.1e}"

    def _check_tokens(self, engine) -> None:
        outputs = engine.generate(self.jobs, SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True))
        for prompt, output, (tokens, _) in zip(self.jobs, outputs, self.expected):
            mine = output.outputs[0].token_ids
            if mine != tokens:
                first = next(i for i, (a, b) in enumerate(zip(mine, tokens)) if a != b)
                raise AssertionError(f"engine: another token {first} after a prompt of {len(prompt)} tokens")
        engine.check_integrity()

    def check_caches(self) -> None:
        """A cache that generate returns, and one it goes on from, are transformers' own."""
        padding = [0, 5]
        ids = torch.tensor([self.jobs[0], [0] * 5 + self.jobs[0][:8]])
        mask = torch.tensor([[0] * count + [1] * (ids.shape[1] - count) for count in padding])
        options = dict(do_sample=False, return_dict_in_generate=True, max_new_tokens=5)
        first = self.model.generate(ids, attention_mask=mask, **options)
        longer = torch.cat([first.sequences, ids[:, -3:]], dim=1)
        onward = dict(options, attention_mask=torch.nn.functional.pad(mask, (0, 8), value=1))
        then = self.model.generate(longer, **onward, **{CACHE: copy.deepcopy(first[CACHE])})
        hf_paged.patch(self.model)
        try:
            mine = self.model.generate(ids, attention_mask=mask, **options)
            again = [
                self.model.generate(longer, **onward, **{CACHE: copy.deepcopy(out[CACHE])}) for out in (first, mine)
            ]
        finally:
            hf_paged.unpatch(self.model)
        for theirs, ours in (first, mine), (then, again[0]), (then, again[1]):
            assert torch.equal(ours.sequences, theirs.sequences), "with caches the tokens are others"
            for a, b in zip(theirs[CACHE].layers, ours[CACHE].layers, strict=True):
                for stock, paged in (a.keys, b.keys), (a.values, b.values):
                    assert stock.shape == paged.shape, f"the returned cache has shape {list(paged.shape)}"
                    for row, count in enumerate(padding):
                        off = (stock - paged)[row, :, count:].abs().max() / max(1.0, stock.abs().max())
                        assert off <= TOLERANCE, f"row {row} of the returned cache is off by {off:.1e}"

    def check_bits(self) -> None:
        """Log-probabilities do not depend on batch mates and chunks, in any bit, where every layer promises it."""
        params = SamplingParams(temperature=0, max_tokens=6, logprobs=0, ignore_eos=True)

        def logprobs(output):
            [completion] = output.outputs
            return [entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs)]

        with hf_paged.Engine(self.model, config=EngineConfig(prefix_cache=False)) as engine:
            alone = [logprobs(engine.generate([job], params)[0]) for job in self.jobs]
        with hf_paged.Engine(self.model, config=EngineConfig(prefix_cache=False, max_batch_tokens=23)) as engine:
            assert [logprobs(output) for output in engine.generate(self.jobs, params)] == alone
