"""Linear layers on quantized weights on the CPU, beside our fp32 layer and torch's packed ones.

    python benchmarks/run.py quant.kernels [--rows 1,2,4,8,16,64,256] [--threads 1] [--large]

Each shape has as many weights as do not fit in a cache together, as a model's layers have. The candidates take turns in
every repeat; ratios are of the same repeat, to the fp32 layer. torch's layers are fast with bf16 inputs only, and get
these.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from hf_paged.benchmarks import schema
from hf_paged_kernels.cpu import linear, quantized
from hf_paged_kernels.quantized import FIELDS, QuantizedWeight, pack

SMALL = [(960, 576), (576, 576), (3072, 576), (576, 1536)]  # N, K of qkv, o, gate_up and down of the embedded model
LARGE = [(4096, 4096), (4096, 14336)]  # of an 8B model
KINDS = {"int2": ("int2", 64), "int3": ("int3", 64), "int4": ("int4", 128), "int4 g64": ("int4", 64),
         "int8": ("int8", None), "int8 W8A8": ("int8", None), "fp8": ("fp8", None)}  # fmt: skip
GROUP = 64  # of torch's int4
CACHE_BYTES = 128 * 2**20


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,2,4,8,16,64,256", help="how many inputs are multiplied at once")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--large", action="store_true", help="the shapes of an 8B model as well")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="little memory and one repeat, to see that it works")
    parser.add_argument("--out", type=Path, default=schema.results_folder())
    options = parser.parse_args(arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        rows = run(options)
    finally:
        torch.set_num_threads(before)
    schema.append_rows(options.out / "quant_kernels.csv", rows, schema.describe_machine("cpu", options.threads))
    print(f"rows appended to {options.out / 'quant_kernels.csv'}")


def run(options: argparse.Namespace) -> list[schema.Measure]:
    rows = []
    for N, K in SMALL + LARGE * options.large:
        copies = 1 if options.short else max(1, CACHE_BYTES // (N * K * 4))
        layers = layers_of(N, K, copies)
        for M in map(int, options.rows.split(",")):
            few = max(1, min(copies, 512 // M))
            x = torch.randn(M, K)
            inputs = {torch.float32: x, torch.bfloat16: x.bfloat16()}
            times = measure(layers, inputs, few, 1 if options.short else options.repeats)
            rows += measures(times, f"{N}x{K}, {M} rows")
    return rows


def layers_of(N: int, K: int, copies: int) -> dict[str, tuple[torch.dtype, list[Callable]]]:
    """Name -> (dtype of its inputs, a layer for each copy of the weight)."""
    dense = [torch.randn(N, K) for _ in range(copies)]
    layers = {"fp32": (torch.float32, [lambda x, w=w: linear.linear(x, w) for w in dense])}
    for name, (kind, group) in KINDS.items():
        weight = random_weight(kind, N, K, group or K)
        if name.endswith("W8A8"):
            weight = replace(weight, activations="int8")
        layers[name] = (torch.float32, [lambda x, w=_copy(weight): quantized.linear(x, w) for _ in range(copies)])
    layers["torch int4pack"] = (torch.bfloat16, torch_int4(N, K, copies))
    layers["torch int8pack"] = (torch.bfloat16, torch_int8(N, K, copies))
    return layers


def random_weight(kind: str, N: int, K: int, group: int) -> QuantizedWeight:
    if kind in FIELDS:
        data = pack(torch.randint(4, (N, K), dtype=torch.uint8), kind)
    elif kind == "int8":
        data = torch.randint(-128, 128, (N, K), dtype=torch.int8)
    else:
        data = torch.randn(N, K).to(torch.float8_e4m3fn)
    return QuantizedWeight(kind, K, data, (torch.rand(-(-K // group), N) / 100).half(), block=(1, group))


def torch_int4(N: int, K: int, copies: int) -> list[Callable]:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.randint(16, (N, K), dtype=torch.int32), 1)
    scales = torch.rand(K // GROUP, N, 2, dtype=torch.bfloat16)
    run = torch.ops.aten._weight_int4pack_mm_for_cpu
    return [lambda x, w=packed.clone(): run(x, w, GROUP, scales) for _ in range(copies)]


def torch_int8(N: int, K: int, copies: int) -> list[Callable]:
    values, scales = torch.randint(-128, 128, (N, K), dtype=torch.int8), torch.rand(N, dtype=torch.bfloat16)
    return [lambda x, w=values.clone(): torch.ops.aten._weight_int8pack_mm(x, w, scales) for _ in range(copies)]


def measure(layers: dict, inputs: dict[torch.dtype, torch.Tensor], few: int, repeats: int) -> dict[str, list[float]]:
    """Microseconds of one layer, of each repeat; the first repeat warms up."""
    times = {name: [] for name in layers}
    for repeat in range(repeats + 1):
        for name in times:
            dtype, calls = layers[name]
            start = time.perf_counter()
            for call in calls[:few]:
                call(inputs[dtype])
            if repeat:
                times[name].append((time.perf_counter() - start) / few * 1e6)
    return times


def measures(times: dict[str, list[float]], workload: str) -> list[schema.Measure]:
    rows, cells = [], []
    for name, samples in times.items():
        ratios = [base / mine for base, mine in zip(times["fp32"], samples, strict=True)]
        common = dict(benchmark="quant_kernels", workload=workload, system=name)
        rows.append(schema.Measure(**common, metric="time", unit="us", samples=samples))
        if name != "fp32":
            rows.append(schema.Measure(**common, metric="speed-up", unit="ratio", samples=ratios, baseline="fp32"))
        cells.append(f"{name} {median(samples):.0f} ({median(ratios):.2f})")
    print(f"{workload:22}" + "  ".join(cells), flush=True)
    return rows


def _copy(weight: QuantizedWeight) -> QuantizedWeight:
    return weight.with_tensors({name: tensor.clone() for name, tensor in weight.tensors().items()})


if __name__ == "__main__":
    main()
