"""lm-evaluation-harness: its model `hf` against `hf-paged`, on the same requests, in turns.

    python benchmarks/run.py lm_eval [MODEL] [--rounds 3] [--batch-size 1 8]

Four kinds of requests, made from a seed: choices that are texts, choices that are letters after five examples, perplexity, and
short answers. Results are compared; rows go to benchmarks/results/lm_eval.csv.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from hf_paged.benchmarks.schema import Measure, describe_machine, replace_rows, results_folder
from hf_paged.hf.build import load_model
from hf_paged.integrations.lm_eval import HFPaged

WORDS = "river hill stone cloud north winter bridge garden letter paper window silver table music salt".split()
Workload = tuple[str, str, list[tuple]]  # its name, the kind of request, each one's arguments


def text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=words))


def workloads(seed: int, scale: float) -> list[Workload]:
    draw = random.Random(seed)
    count = lambda number: max(2, round(number * scale))  # noqa: E731
    choices = []
    for _ in range(count(16)):
        question = f"Question: {text(draw, 60)}?\nAnswer:"
        choices += [(question, f" {text(draw, 12)}") for _ in range(4)]
    examples = "\n\n".join(f"Question: {text(draw, 40)}?\nAnswer: {draw.choice('ABCD')}" for _ in range(5))
    letters = []
    for _ in range(count(16)):
        question = f"{examples}\n\nQuestion: {text(draw, 40)}?\nAnswer:"
        letters += [(question, f" {letter}") for letter in "ABCD"]
    texts = [(text(draw, draw.randint(40, 300)),) for _ in range(count(12))]
    answers = [
        (
            f"{examples}\n\nQuestion: {text(draw, draw.randint(5, 60))}?\nAnswer:",
            {"until": ["\n\n"], "max_gen_toks": 32},
        )
        for _ in range(count(16))
    ]
    return [
        ("choices of 12 words", "loglikelihood", choices),
        ("choices of a letter, 5 shots", "loglikelihood", letters),
        ("perplexity", "loglikelihood_rolling", texts),
        ("answers of 32 tokens, 5 shots", "generate_until", answers),
    ]


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=given, idx=place) for place, given in enumerate(arguments)]


def seconds(model, kind: str, arguments: list[tuple]) -> tuple[float, list]:
    begun = time.perf_counter()
    said = getattr(model, kind)(instances(kind, arguments), disable_tqdm=True)
    return time.perf_counter() - begun, said


def same(kind: str, found: list, expected: list) -> int:
    """How many results are the other's: texts, or log-probabilities within 0.1 % and whether they are greedy."""
    if kind == "generate_until":
        return sum(one == other for one, other in zip(found, expected, strict=True))
    if kind == "loglikelihood_rolling":
        found, expected = ([(number, None) for number in numbers] for numbers in (found, expected))
    pairs = zip(found, expected, strict=True)
    return sum(abs(one[0] - other[0]) <= 1e-3 * abs(other[0]) and one[1] == other[1] for one, other in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="default the embedded SmolLM2-135M-Instruct")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of requests")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8], help="of `hf`")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    given = dict(zip(("pretrained", "tokenizer"), load_model(arguments.model, dtype=arguments.dtype)))
    plain, _ = load_model(arguments.model, dtype=arguments.dtype)  # each side has weights of its own
    systems = {
        f"hf, batches of {size}": HFLM(**given | {"pretrained": plain}, batch_size=size, softmax_dtype="float32")
        for size in arguments.batch_size
    }
    measures = []
    with HFPaged(**given) as paged:
        for workload, kind, _ in workloads(0, arguments.scale):
            times: dict[str, list[float]] = {name: [] for name in (*systems, "hf-paged")}
            alike = total = 0
            for turn in range(arguments.rounds):  # prompts of their own, so that no cache knows them
                asked = next(asked for name, _, asked in workloads(turn, arguments.scale) if name == workload)
                took, found = seconds(paged, kind, asked)
                times["hf-paged"].append(took)
                for name, model in systems.items():
                    took, expected = seconds(model, kind, asked)
                    times[name].append(took)
                    alike, total = alike + same(kind, found, expected), total + len(asked)
            for name, took in times.items():
                detail = {"requests": len(asked), "same": [alike, total]}
                common = dict(benchmark="lm_eval", workload=workload, system=name, dtype=arguments.dtype, detail=detail)
                common["model"] = arguments.model or "SmolLM2-135M-Instruct"
                measures.append(Measure(metric="seconds", unit="s", samples=took, **common))
                line = f"{workload:32} {name:20} {statistics.median(took):8.2f} s"
                if name != "hf-paged":
                    ratios = [mine / own for mine, own in zip(took, times["hf-paged"], strict=True)]
                    measures.append(Measure(metric="ratio", unit="x", samples=ratios, baseline="hf-paged", **common))
                    line += f"  {statistics.median(ratios):5.1f}x  same {alike}/{total}"
                print(line, flush=True)
    replace_rows(results_folder() / "lm_eval.csv", measures, describe_machine("cpu", torch.get_num_threads()))


if __name__ == "__main__":
    main()
