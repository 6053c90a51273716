"""All linear layers of a small model once, every weight its own memory: ours, F.linear, mm(W, x.T), oneDNN prepacked.

    python benchmarks/kernels/linear_cpu.py --rows 1,4,8,16,32,64,128,256,512 --csv linear.csv

Candidates take turns in every repeat, and ratios are to oneDNN. With --cpu-time (one thread) what other processes
take is not counted, so a busy machine can be used.
"""

from __future__ import annotations

import argparse
import csv
import platform
import time

import torch
import torch.nn.functional as F

from hf_paged_kernels.cpu.linear import linear

SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536)]  # N, K of qkv, o, gate_up, down
FIELDS = ["kernel", "rows", "layers", "threads", "clock", "p20_ms", "p50_ms", "p80_ms", "min_ms", "device", "torch"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,4,8,16,32,64,128,256,512")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true", help="one thread, on its own CPU clock")
    parser.add_argument("--csv")
    options = parser.parse_args()
    if options.cpu_time:
        torch.set_num_threads(1)
    weights = [torch.randn(N, K) * 0.05 for _ in range(options.layers) for N, K in SHAPES]
    table = []
    for M in map(int, options.rows.split(",")):
        times = measure(candidates(weights, M), options.repeats, options.cpu_time)
        base = min(times["onednn_prepacked"])
        print(f"{M:5}", *(f"{name} {min(t):.1f} ({min(t) / base:.2f})" for name, t in times.items()), flush=True)
        table += [row(name, M, t, options) for name, t in times.items()]
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(table)


def candidates(weights, M):
    xs = {K: torch.randn(M, K) for _, K in SHAPES}
    packed = [(torch.ops.mkldnn._reorder_linear_weight(w, M), w.shape[1]) for w in weights]

    def onednn():
        for w, K in packed:
            torch.ops.mkldnn._linear_pointwise(xs[K], w, None, "none", [], "")

    return {
        "ours": lambda: [linear(xs[w.shape[1]], w) for w in weights] and None,
        "F.linear": lambda: [F.linear(xs[w.shape[1]], w) for w in weights] and None,
        "mm(W, x.T)": lambda: [torch.mm(w, xs[w.shape[1]].T) for w in weights] and None,
        "onednn_prepacked": onednn,
    }


def measure(functions, repeats, cpu_time):
    clock = time.thread_time if cpu_time else time.perf_counter
    times = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = clock()
            function()
            if repeat:  # the first warms up
                times[name].append((clock() - start) * 1e3)
    return times


def row(name, M, times, options):
    p20, p50, p80 = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    values = [name, M, options.layers, torch.get_num_threads(), "cpu" if options.cpu_time else "wall",
              *(round(t, 3) for t in (p20, p50, p80, min(times))),
              f"{platform.processor() or platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
              torch.__version__]  # fmt: skip
    return dict(zip(FIELDS, values))


if __name__ == "__main__":
    main()
