"""Linear layers and experts on quantized weights, against torch's and our own in the model's type on the same sizes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_paged_kernels import fused

from . import peers
from .batches import randn
from .kernels_attention import ratios
from .models import ModelShape
from .quantized_weights import Scheme, random_weight
from .report import Clock, Target
from .session import Session
from .timing import Timing, measure

SQUARE = ("8192 x 8192", 8192, 8192)  # where others publish figures
SCHEMES = {
    "int4": Scheme("int4", (1, 128)),
    "fp8": Scheme("fp8", activations="fp8"),
    "fp8 blocks": Scheme("fp8", (128, 128), activations="fp8"),
    "int8": Scheme("int8"),
    "int8 W8A8": Scheme("int8", activations="int8"),
}
ROWS, FEW_ROWS, TINY_ROWS = (1, 4, 16, 64, 256), (1, 16), (3,)
MOST = ("int4", "fp8")  # measured with all numbers of rows
TARGETS = {"int4": Target(2.5), "fp8": Target(1.6)}  # times torch's speed, of the square up to TARGET_ROWS rows
TARGET_ROWS = 16
EXPERTS = (128, 8, 2048, 768)  # Qwen3-30B: experts, of them per token, width, width of an expert
TINY_EXPERTS = (4, 2, 128, 128)
EXPERT_TOKENS, TINY_TOKENS = (1, 16, 64), (3,)
PLAIN = "hf_paged, not quantized"


def linear(session: Session, clock: Clock) -> None:
    for model, name, N, K in _sizes(session):
        for scheme in SCHEMES:
            if clock.left < 0:
                return session.report.skip(f"quantized layers from {model} {name} {scheme} on", "out of time")
            session.report.attempt(
                f"{scheme} linear {model} {name}",
                lambda: _linear(session, scheme, model, name, N, K),  # noqa: B023
            )


def _sizes(session: Session) -> list[tuple[str, str, int, int]]:
    """(model, name, N, K): the square first, then the layers of the larger model but the head."""
    shape: ModelShape = session.shapes["llama-8b"]
    layers = [(shape.name, name, *sizes) for name, sizes in shape.linears().items() if name != "lm_head"]
    return layers[-1:] if session.tiny else [("", *SQUARE), *layers]


def _linear(session: Session, scheme: str, model: str, name: str, N: int, K: int) -> None:
    kind, device = dict(dtype=session.dtype, device=session.device), session.device
    quantized = random_weight(SCHEMES[scheme], N, K, device, seed=0)
    sets = session.sets(quantized.nbytes)
    weights = [quantized, *(random_weight(SCHEMES[scheme], N, K, device, seed=i) for i in range(1, sets))]
    plain_sets = session.sets(N * K * session.dtype.itemsize)  # as cold with fewer of them
    plain = [randn(N, K, seed=i, **kind).mul_(K**-0.5) for i in range(plain_sets)]
    for count in TINY_ROWS if session.tiny else ROWS if scheme in MOST else FEW_ROWS:
        inputs = [randn(count, K, seed=50 + i, **kind) for i in range(sets)]
        timings = measure(_candidates(session, inputs, weights, plain), sets, device, rounds=session.rounds)
        _report_linear(session, scheme, model, name, count, timings, quantized.nbytes)


def _candidates(session: Session, inputs: list, weights: list, plain: list) -> dict[str, Callable[[int], object]]:
    return {
        "hf_paged": lambda i: fused.linear(inputs[i], weights[i], backend=session.backend),
        PLAIN: lambda i: fused.linear(inputs[i], plain[i % len(plain)], backend=session.backend),
    } | {
        system: lambda i, run=run: run(i % len(plain)) for system, run in peers.linear(inputs[: len(plain)], plain).items()
    }


def _report_linear(
    session: Session, scheme: str, model: str, name: str, count: int, timings: dict[str, Timing], num_bytes: int
) -> None:
    common = dict(model=model, dtype=scheme)
    mine, workload = timings["hf_paged"], f"{count} rows"
    shares = [num_bytes / seconds / session.copy_bandwidth for seconds in mine.samples]
    session.report.add(f"quantized {name}", workload, "hf_paged", "share of copy bandwidth", "", shares,
                       microseconds=mine.median * 1e6, graphed=mine.graphed, **common)  # fmt: skip
    for system in (peers.CUBLAS, PLAIN):
        aim = TARGETS.get(scheme) if system == peers.CUBLAS and name == SQUARE[0] and count <= TARGET_ROWS else None
        session.report.add(f"quantized {name}", workload, "hf_paged", "speed-up", "x", ratios(timings[system], mine),
                           baseline=system, target=aim, microseconds=timings[system].median * 1e6, **common)  # fmt: skip


def experts(session: Session, clock: Clock) -> None:
    for scheme in MOST:
        for tokens in TINY_TOKENS if session.tiny else EXPERT_TOKENS:
            if clock.left < 0:
                return session.report.skip(f"quantized experts from {scheme} {tokens} on", "out of time")
            session.report.attempt(
                f"{scheme} experts {tokens} tokens",
                lambda: _experts(session, scheme, tokens),  # noqa: B023
            )


def _experts(session: Session, scheme: str, tokens: int) -> None:
    count, chosen, width, inner = TINY_EXPERTS if session.tiny else EXPERTS
    kind, device = dict(dtype=session.dtype, device=session.device), session.device
    sizes = {"gate_up": (2 * inner, width), "down": (width, inner)}
    quantized = [random_weight(SCHEMES[scheme], *size, device, seed=0, experts=count) for size in sizes.values()]
    plain = [randn(count, *size, seed=1, **kind).mul_(size[1] ** -0.5) for size in sizes.values()]
    sets = 1 if session.tiny else 4  # other experts each time: all of them together do not fit into a cache
    inputs = [randn(tokens, width, seed=50 + i, **kind) for i in range(sets)]
    routed = [randn(tokens, count, dtype=torch.float32, device=device, seed=70 + i).softmax(-1) for i in range(sets)]
    chosen_ones = [scores.topk(chosen, dim=-1) for scores in routed]

    def run(weights):
        return lambda i: fused.moe_experts(
            inputs[i], *weights, chosen_ones[i].indices, chosen_ones[i].values, activation="silu", backend=session.backend
        )

    timings = measure({"hf_paged": run(quantized), PLAIN: run(plain)}, sets, device, rounds=session.rounds)
    session.report.add("quantized experts", f"{tokens} tokens", "hf_paged", "speed-up", "x",
                       ratios(timings[PLAIN], timings["hf_paged"]), baseline=PLAIN, dtype=scheme,
                       microseconds=timings["hf_paged"].median * 1e6)  # fmt: skip
