"""Paged attention on CPU against gathering the pages and calling SDPA, and decodes that share their beginning with it read
once for all against each reading it, in turns: one layer, minimum and p20/p50/p80 of repeats.

    python benchmarks/kernels/attention_cpu.py [--threads N] [--seconds 0.5] [--csv FILE]
"""

from __future__ import annotations

import argparse
import csv
import platform
import subprocess
import time
from dataclasses import replace

import torch
import torch.nn.functional as F

import hf_paged_kernels as kernels
from hf_paged.core.shared_prefix import SharedPrefix
from hf_paged.runtime.shared_prefix import shared_prefixes

DECODE = [(1, 300), (1, 4096), (8, 300), (16, 300), (32, 300), (16, 1024)]  # (sequences, context)
PREFILL = [(512, 0), (128, 384), (512, 2048)]  # (chunk, context before it)
SHARED = [(32, 2048), (8, 2048), (32, 512)]  # (sequences, tokens they share), each with OWN more
OWN = 32
MODELS = {"9/3x64": (9, 3, 64), "12/12x64": (12, 12, 64), "32/8x128": (32, 8, 128)}
BLOCK_SIZE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.5, help="spent on each figure")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of model and cache")
    parser.add_argument("--csv", help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    rows = []
    print(f"{'model':10} {'case':18} {'kernel us':>10} {'gather+SDPA us':>15} {'ratio':>6} {'GB/s':>6} {'GFLOP/s':>8}")
    for model, heads in MODELS.items():
        cases = [("decode", n, 1, c) for n, c in DECODE] + [("prefill", 1, n, c + n) for n, c in PREFILL]
        for kind, num_seqs, q_len, seq_len in cases:
            batch = Batch(num_seqs, q_len, seq_len, *heads, dtype)
            ours = measure(batch.paged, options.seconds)
            stock = measure(batch.gather_sdpa, options.seconds)
            tolerance = 3e-2 if dtype.itemsize == 2 else 1e-5
            torch.testing.assert_close(batch.paged(), batch.gather_sdpa(), atol=tolerance, rtol=0)
            gbytes, gflop = batch.cost()
            print(f"{model:10} {f'{kind} {num_seqs}x{q_len}@{seq_len}':18} {ours[0] * 1e6:10.0f} {stock[0] * 1e6:15.0f} "
                  f"{stock[0] / ours[0]:6.1f} {gbytes / ours[0]:6.1f} {gflop / ours[0]:8.1f}")  # fmt: skip
            rows += [record(name, model, kind, num_seqs, q_len, seq_len, options, figures)
                     for name, figures in (("paged", ours), ("gather_sdpa", stock))]  # fmt: skip
    print(f"\n{'model':10} {'case':18} {'grouped us':>10} {'apart us':>10} {'ratio':>6}")
    for model, heads in MODELS.items():
        for num_seqs, shared in SHARED:
            batch = Batch(num_seqs, 1, shared + OWN, *heads, dtype, shared=shared)
            assert torch.equal(batch.paged(), batch.grouped())
            grouped, apart = in_turns(batch.grouped, batch.paged, seconds=2 * options.seconds)
            print(f"{model:10} {f'{num_seqs} share {shared}':18} {grouped[0] * 1e6:10.0f} {apart[0] * 1e6:10.0f} "
                  f"{apart[0] / grouped[0]:6.2f}")  # fmt: skip
            rows += [record(name, model, f"decode sharing {shared}", num_seqs, 1, shared + OWN, options, figures)
                     for name, figures in (("grouped", grouped), ("apart", apart))]  # fmt: skip
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


class Batch:
    """Sequences of one length whose last `q_len` tokens are new; their blocks lie in the cache in random order. The blocks
    of the first `shared` tokens are the first sequence's."""

    def __init__(self, num_seqs, q_len, seq_len, num_heads, num_kv_heads, head_dim, dtype, shared=0):
        blocks_per_seq = -(-seq_len // BLOCK_SIZE)
        num_blocks, num_tokens = num_seqs * blocks_per_seq, num_seqs * q_len
        self.sizes = num_seqs, q_len, seq_len, num_heads, num_kv_heads, head_dim, dtype.itemsize
        self.scale = head_dim**-0.5
        self.caches = kernels.allocate_kv(num_blocks, num_kv_heads, head_dim, head_dim, BLOCK_SIZE, dtype, "cpu")
        for cache in self.caches:
            cache.normal_()
        self.query = torch.randn(num_tokens, num_heads, head_dim, dtype=dtype)
        self.key, self.value = torch.randn(2, num_tokens, num_kv_heads, head_dim, dtype=dtype)
        table = torch.randperm(num_blocks).view(num_seqs, blocks_per_seq)
        table[:, : shared // BLOCK_SIZE] = table[0, : shared // BLOCK_SIZE].clone()
        positions = torch.arange(seq_len - q_len, seq_len)
        slots = table[:, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        self.metadata = kernels.AttentionMetadata(
            cu_seqlens_q=torch.arange(0, num_tokens + 1, q_len, dtype=torch.int32),
            seq_lens=torch.full((num_seqs,), seq_len, dtype=torch.int32), block_table=table.int(),
            slot_mapping=slots.flatten().contiguous(), max_seqlen_q=q_len, max_seqlen_k=seq_len,
            num_decodes=num_seqs if q_len == 1 else 0,
        )  # fmt: skip
        self.in_groups = self.metadata
        if shared:
            everybody = SharedPrefix(shared // BLOCK_SIZE, tuple(range(num_seqs)))
            groups = shared_prefixes([everybody], [seq_len - 1] * num_seqs, BLOCK_SIZE, table.device)
            self.in_groups = replace(self.metadata, shared=groups)

    def grouped(self) -> torch.Tensor:
        return kernels.attention_(self.query, self.key, self.value, *self.caches, self.in_groups, scale=self.scale)

    def paged(self) -> torch.Tensor:
        return kernels.attention_(self.query, self.key, self.value, *self.caches, self.metadata, scale=self.scale)

    def gather_sdpa(self) -> torch.Tensor:
        """The cache must hold this step's keys already: `paged` has run before."""
        num_seqs, q_len, seq_len = self.sizes[:3]
        position = torch.arange(seq_len)
        mask = None if q_len == 1 else position <= position[seq_len - q_len :, None]
        out = []
        for seq in range(num_seqs):
            row = self.metadata.block_table[seq]
            key, value = kernels.gather_kv(*self.caches, row, seq_len)
            query = self.query[seq * q_len : (seq + 1) * q_len]
            out.append(F.scaled_dot_product_attention(
                query.transpose(0, 1)[None], key.transpose(0, 1)[None], value.transpose(0, 1)[None], attn_mask=mask,
                enable_gqa=True, scale=self.scale)[0].transpose(0, 1))  # fmt: skip
        return torch.cat(out)

    def cost(self) -> tuple[float, float]:
        """Gigabytes of keys and values read once, and gigaflops of the visible products."""
        num_seqs, q_len, seq_len, num_heads, num_kv_heads, head_dim, itemsize = self.sizes
        visible = q_len * seq_len - q_len * (q_len - 1) / 2
        gbytes = num_seqs * seq_len * num_kv_heads * head_dim * 2 * itemsize / 1e9
        return gbytes, num_seqs * visible * num_heads * head_dim * 4 / 1e9


def measure(run, seconds: float) -> tuple[float, float, float, float]:
    """Minimum, p20, p50 and p80 of the run's seconds."""
    return in_turns(run, seconds=seconds)[0]


def in_turns(*runs, seconds: float) -> list[tuple[float, float, float, float]]:
    """The same of several, one after another, in so many seconds together."""
    for run in runs:
        run()
    times, stop = [[] for _ in runs], time.perf_counter() + seconds
    while len(times[0]) < 5 or time.perf_counter() < stop:
        for run, mine in zip(runs, times):
            start = time.perf_counter()
            run()
            mine.append(time.perf_counter() - start)
    return [(min(mine), *(sorted(mine)[int(len(mine) * q)] for q in (0.2, 0.5, 0.8))) for mine in times]


def record(name, model, kind, num_seqs, q_len, seq_len, options, figures) -> dict:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return dict(
        benchmark="attention_cpu", name=name, model=model, kind=kind, num_seqs=num_seqs, q_len=q_len, seq_len=seq_len,
        dtype=options.dtype, threads=options.threads, min_us=figures[0] * 1e6, p20_us=figures[1] * 1e6,
        p50_us=figures[2] * 1e6, p80_us=figures[3] * 1e6, device=platform.processor() or platform.machine(),
        capability=torch.backends.cpu.get_cpu_capability(), torch=torch.__version__, commit=commit.stdout.strip(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
