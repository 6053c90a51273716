"""Everything but attention: norms, rotary embedding, activations, linear layers of few rows, sampling."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_paged_kernels import fused, ops
from hf_paged_kernels import sampling as sampling_kernels
from hf_paged_kernels.norm import Norm

from . import peers
from .batches import randn
from .kernels_attention import BLOCK_SIZE, filled_cache, must_agree, ratios
from .models import ModelShape
from .report import Clock
from .session import Session
from .timing import measure

ELEMENTWISE_ROWS, TINY_ROWS = (8192, 256), (8,)
SAMPLING_ROWS, TINY_SAMPLING_ROWS = (1, 64, 256), (2,)
SAMPLING = {  # name -> (temperature, top-k, top-p, min-p); None: the largest logit
    "argmax": None,
    "temperature": (0.8, 0, 1.0, 0.0),
    "top-k, top-p": (0.8, 50, 0.9, 0.0),
}
LINEAR_ROWS, TINY_LINEAR_ROWS = (1, 2, 4, 8, 16, 32, 64), (1, 4)
EPS = 1e-5
Run = Callable[[int], object]


def elementwise(session: Session, clock: Clock) -> None:
    for shape in session.shapes.values():
        for rows in TINY_ROWS if session.tiny else ELEMENTWISE_ROWS:
            for name, make in ELEMENTWISE.items():
                if clock.left < 0:
                    return session.report.skip(f"elementwise kernels from {shape.name} {name} on", "out of time")
                session.report.attempt(
                    f"{name} {shape.name} {rows}",
                    lambda: _elementwise_case(session, shape, rows, name, make),  # noqa: B023
                )


def _elementwise_case(session: Session, shape: ModelShape, rows: int, name: str, make) -> None:
    run, num_bytes, sets = make(session, shape, rows)
    timing = measure({"hf_paged": run}, sets, session.device, rounds=session.rounds)["hf_paged"]
    shares = [num_bytes / seconds / session.copy_bandwidth for seconds in timing.samples]
    session.report.add(name, f"{rows} rows", "hf_paged", "share of copy bandwidth", "", shares, model=shape.name,
                       dtype=session.dtype_name, microseconds=timing.median * 1e6, graphed=timing.graphed)  # fmt: skip


def _rows(session: Session, rows: int, width: int, traffic: int) -> tuple[list[torch.Tensor], int, int]:
    """Input sets [rows, width], how many, and the bytes a call moves: `traffic` times a set's."""
    num_bytes = traffic * rows * width * session.dtype.itemsize
    sets = session.sets(num_bytes)
    made = [randn(rows, width, dtype=session.dtype, device=session.device, seed=i) for i in range(sets)]
    return made, sets, num_bytes


def _rms_norm(session: Session, shape: ModelShape, rows: int) -> tuple[Run, int, int]:
    inputs, sets, num_bytes = _rows(session, rows, shape.hidden_size, 2)
    norm = _norm(session, shape.hidden_size)
    return lambda i: fused.rms_norm(inputs[i], norm.weight, norm.eps, backend=session.backend), num_bytes, sets


def _add_rms_norm(session: Session, shape: ModelShape, rows: int) -> tuple[Run, int, int]:
    inputs, sets, num_bytes = _rows(session, rows, shape.hidden_size, 4)
    norm, residual = _norm(session, shape.hidden_size), [one.clone() for one in inputs]
    return lambda i: fused.add_rms_norm(inputs[i], residual[i], norm, backend=session.backend), num_bytes, sets


def _act_and_mul(session: Session, shape: ModelShape, rows: int) -> tuple[Run, int, int]:
    inputs, sets, num_bytes = _rows(session, rows, 2 * shape.intermediate_size, 1)
    return lambda i: fused.act_and_mul(inputs[i], "silu", backend=session.backend), num_bytes * 3 // 2, sets


def _rotary_store(session: Session, shape: ModelShape, rows: int) -> tuple[Run, int, int]:
    """With the norms of query and key heads where the model has them; reads q, k, v, writes q and the cache."""
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    merged, sets, num_bytes = _rows(session, rows, (heads + 2 * kv_heads) * dim, 2)
    split = [
        [part.unflatten(1, (-1, dim)) for part in one.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)]
        for one in merged
    ]
    caches, _ = filled_cache(session, shape, -(-rows * sets // BLOCK_SIZE), session.dtype)
    slots = list(torch.randperm(caches[1].shape[0] * BLOCK_SIZE, device=session.device)[: rows * sets].split(rows))
    cos, sin = (randn(rows, dim, dtype=session.dtype, device=session.device, seed=i).clamp(-1, 1) for i in (90, 91))
    norm = _norm(session, dim) if shape.model_type == "qwen3" else None

    def run(i: int):
        return ops.rotary_store(
            *split[i], *caches, slots[i], cos, sin, q_norm=norm, k_norm=norm, backend=session.backend
        )

    return run, num_bytes + 2 * cos.nbytes, sets


def _norm(session: Session, width: int) -> Norm:
    return Norm(randn(width, dtype=session.dtype, device=session.device, seed=99), EPS)


ELEMENTWISE = {
    "rms_norm": _rms_norm,
    "add + rms_norm": _add_rms_norm,
    "silu and mul": _act_and_mul,
    "rotary + KV write": _rotary_store,
}


def linear(session: Session, clock: Clock) -> None:
    """Each product of a layer with a few rows, as the engine runs it, against torch's and as a share of bandwidth."""
    for shape in session.shapes.values():
        for name, (rows, columns) in shape.linears().items():
            for count in TINY_LINEAR_ROWS if session.tiny else LINEAR_ROWS:
                if clock.left < 0:
                    return session.report.skip(f"linear layers from {shape.name} {name} on", "out of time")
                session.report.attempt(
                    f"linear {shape.name} {name} {count} rows",
                    lambda: _linear_case(session, shape, name, rows, columns, count),  # noqa: B023
                )


def _linear_case(session: Session, shape: ModelShape, name: str, rows: int, columns: int, count: int) -> None:
    candidates, sets = linear_candidates(session, name, rows, columns, count)
    must_agree({key: candidates[key] for key in ("hf_paged", peers.CUBLAS)}, session.dtype)
    timings = measure(candidates, sets, session.device, rounds=session.rounds)
    common = dict(model=shape.name, dtype=session.dtype_name)
    num_bytes = rows * columns * session.dtype.itemsize
    for system, timing in timings.items():
        shares = [num_bytes / seconds / session.copy_bandwidth for seconds in timing.samples]
        session.report.add(f"linear {name}", f"{count} rows", system, "share of copy bandwidth", "", shares,
                           microseconds=timing.median * 1e6, graphed=timing.graphed, **common)  # fmt: skip
    faster = ratios(timings[peers.CUBLAS], timings["hf_paged"])
    session.report.add(
        f"linear {name}", f"{count} rows", "hf_paged", "speed-up", "x", faster, baseline=peers.CUBLAS, **common
    )


def linear_candidates(session: Session, name: str, rows: int, columns: int, count: int) -> tuple[dict[str, Run], int]:
    """Ours plain and with what the engine fuses into this product, and torch's plain one."""
    sets = session.sets(rows * columns * session.dtype.itemsize)
    kind = dict(dtype=session.dtype, device=session.device)
    weights = [randn(rows, columns, seed=i, **kind).mul_(columns**-0.5) for i in range(sets)]
    inputs = [randn(count, columns, seed=50 + i, **kind) for i in range(sets)]
    runs: dict[str, Run] = {"hf_paged": lambda i: fused.linear(inputs[i], weights[i], backend=session.backend)}
    if name in ("qkv", "gate_up"):
        options = dict(norm=_norm(session, columns), activation="silu" if name == "gate_up" else None)
        runs["hf_paged, norm" + (" and activation" if name == "gate_up" else "")] = lambda i: fused.linear(
            inputs[i], weights[i], backend=session.backend, **options
        )
    elif name in ("o", "down"):
        residual = randn(count, rows, seed=98, **kind)
        runs["hf_paged, residual"] = lambda i: fused.linear(
            inputs[i], weights[i], residual=residual, backend=session.backend
        )
    return runs | peers.linear(inputs, weights, gemlite=name == "o" and count == 1), sets


def sampling(session: Session, clock: Clock) -> None:
    """Tokens from logits, as a share of the bandwidth that reading the logits once would take."""
    for shape in session.shapes.values():
        for rows in TINY_SAMPLING_ROWS if session.tiny else SAMPLING_ROWS:
            for name, options in SAMPLING.items():
                if clock.left < 0:
                    return session.report.skip(f"sampling from {shape.name} {name} on", "out of time")
                session.report.attempt(
                    f"sampling {shape.name} {name} {rows} rows",
                    lambda: _sampling_case(session, shape, rows, name, options),  # noqa: B023
                )


def _sampling_case(session: Session, shape: ModelShape, rows: int, name: str, options: tuple | None) -> None:
    logits, sets, num_bytes = _rows(session, rows, shape.vocab_size, 1)
    logits = [one.mul_(3) for one in logits]  # as peaked as those of models
    if options is None:
        run = lambda i: sampling_kernels.argmax(logits[i], backend=session.backend)  # noqa: E731
    else:
        real, whole = (dict(dtype=kind, device=session.device) for kind in (torch.float64, torch.int64))
        temperature, top_k, top_p, min_p = (
            torch.full((rows,), value, **(whole if index == 1 else real)) for index, value in enumerate(options)
        )
        seeds = torch.arange(rows, **whole)

        def run(i: int):
            return sampling_kernels.sample(
                logits[i], temperature, top_k, top_p, min_p, seeds=seeds, positions=seeds, backend=session.backend
            )

    timing = measure({"hf_paged": run}, sets, session.device, rounds=session.rounds)["hf_paged"]
    shares = [num_bytes / seconds / session.copy_bandwidth for seconds in timing.samples]
    session.report.add(f"sampling, {name}", f"{rows} rows", "hf_paged", "share of copy bandwidth", "", shares,
                       model=shape.name, dtype=session.dtype_name, microseconds=timing.median * 1e6,
                       graphed=timing.graphed)  # fmt: skip
