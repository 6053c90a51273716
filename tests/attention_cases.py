"""Batches of paged attention for the tests of its kernels, and the same result by the book."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

import hf_paged_kernels as kernels
from hf_paged_kernels.ref.quantize import LIMITS, quantize

NAN = float("nan")
MIXED = [(1, 1), (1, 16), (1, 300), (5, 5), (33, 40), (17, 300), (40, 40), (1, 17), (70, 530)]  # (new, total) tokens


@dataclass
class Case:
    """A batch: keys and values of whole sequences, the cache as earlier steps left it, and what is new this step.

    Every cache slot (and scale) that no earlier step wrote holds NaN (or the largest int8), and blocks behind the window
    are gone from the table. Leading sequences with one new token are announced as decodes.
    """

    lengths: list = field(default_factory=lambda: list(MIXED))
    heads: tuple = (9, 3)
    k_dim: int = 64
    v_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype = torch.float32
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: bool = False
    alibi: bool = False
    images: dict = field(default_factory=dict)  # by sequence, (first, end) of positions that see each other
    spread: float = 2.0  # of the queries: large enough for weights far from uniform
    seed: int = 0
    device: str | torch.device = "cpu"
    layout: str = "auto"  # the backend that the cache is allocated for

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        num_heads, num_kv_heads = self.heads

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(self.dtype).to(self.device)

        self.queries = [normal(n, num_heads, self.k_dim) * self.spread for n, _ in self.lengths]
        self.keys = [normal(total, num_kv_heads, self.k_dim) for _, total in self.lengths]
        self.values = [normal(total, num_kv_heads, self.v_dim) for _, total in self.lengths]
        self.options = dict(
            scale=self.k_dim**-0.5, window=self.window, chunk=self.chunk, softcap=self.softcap,
            sinks=normal(num_heads) if self.sinks else None,
            # a strided view, as stock's own slopes are
            alibi_slopes=(0.5 ** torch.linspace(1, 8, 2 * num_heads)).to(self.device)[::2] if self.alibi else None,
        )  # fmt: skip

    def batch(self, steps=None, block_seed=0):
        """(query, key, value, k_cache, v_cache, metadata) of one step that does [(sequence, first row, rows), ...]."""
        steps = steps or [(seq, 0, new) for seq, (new, _) in enumerate(self.lengths)]
        size = self.block_size
        counts = [-(-total // size) for _, total in self.lengths]
        num_blocks = sum(counts[seq] for seq, _, _ in steps) + 3
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(block_seed)).tolist()
        caches = kernels.allocate_kv(num_blocks, self.heads[1], self.k_dim, self.v_dim, size, self.cache_dtype,
                                     self.device, backend=self.layout)  # fmt: skip
        self.scales = dict(zip(("k_scale", "v_scale"), kernels.allocate_scales(caches[1])))
        for cache in (*caches, *self.scales.values()):
            if cache is not None:
                stale(cache)
        table = torch.full((len(steps), max(counts)), -1, dtype=torch.int32)
        slots, seq_lens, rows = [], [], []
        for i, (seq, first, count) in enumerate(steps):
            new, total = self.lengths[seq]
            blocks = [order.pop() for _ in range(counts[seq])]
            start, stop = total - new + first, total - new + first + count
            table[i, : -(-stop // size)] = torch.tensor(blocks[: -(-stop // size)])
            if self.window:
                table[i, : max(0, start - self.window + 1) // size] = -1
            if self.chunk:
                table[i, : start // self.chunk * self.chunk // size] = -1
            position = torch.arange(stop)
            slot = torch.tensor(blocks)[position // size] * size + position % size
            kernels.store_kv(self.keys[seq][:start], self.values[seq][:start], *caches,
                             slot[:start].to(self.device), **self.scales, backend="reference")  # fmt: skip
            slots.append(slot[start:])
            seq_lens.append(stop)
            rows.append((seq, slice(first, first + count), slice(start, stop)))
        counts = [count for _, _, count in steps]
        metadata = kernels.AttentionMetadata(
            cu_seqlens_q=torch.tensor([0, *counts]).cumsum(0).int().to(self.device),
            seq_lens=torch.tensor(seq_lens).int().to(self.device), block_table=table.to(self.device),
            slot_mapping=torch.cat(slots).to(self.device), max_seqlen_q=max(counts), max_seqlen_k=max(seq_lens),
            ends=self.ends(rows),
            num_decodes=next((i for i, count in enumerate(counts) if count != 1), len(counts)),
        )  # fmt: skip
        query = torch.cat([self.queries[seq][new] for seq, new, _ in rows])
        key = torch.cat([self.keys[seq][at] for seq, _, at in rows])
        value = torch.cat([self.values[seq][at] for seq, _, at in rows])
        return query, key, value, *caches, metadata

    def ends(self, rows) -> torch.Tensor | None:
        """How many keys each row sees at least, where there are images."""
        if not self.images:
            return None
        ends = [
            next((end for first, end in self.images.get(seq, ()) if first <= position < end), 0)
            for seq, _, at in rows
            for position in range(at.start, at.stop)
        ]
        return torch.tensor(ends, dtype=torch.int32).to(self.device)

    def run(self, backend, steps=None, block_seed=0, **more):
        return kernels.attention_(*self.batch(steps, block_seed), **self.options, **self.scales, **more, backend=backend)

    def dense(self):
        return self.dense_with_lse()[0]

    def dense_with_lse(self):
        """The same by the book, in float64, from the whole sequences; and log sum exp of the scores, [T, Hq]."""
        out, lse = [], []
        for seq, (query, key, value) in enumerate(zip(self.queries, self.keys, self.values, strict=True)):
            group = self.heads[0] // self.heads[1]
            key, value = (rounded(x, self.cache_dtype).repeat_interleave(group, 1) for x in (key, value))
            s = torch.einsum("qhd,khd->hqk", query.double(), key) * self.options["scale"]
            if self.softcap:
                s = self.softcap * torch.tanh(s / self.softcap)
            p = torch.arange(len(key) - len(query), len(key), device=self.device)[:, None]
            j = torch.arange(len(key), device=self.device)
            if self.alibi:
                s = s + self.options["alibi_slopes"].double()[:, None, None] * (j - p)
            seen = j <= p
            for first, end in self.images.get(seq, ()):
                seen |= (p >= first) & (p < end) & (j >= first) & (j < end)
            if self.window:
                seen &= j > p - self.window
            if self.chunk:
                seen &= j // self.chunk == p // self.chunk
            s = torch.where(seen, s, -float("inf"))
            lse.append(s.logsumexp(-1).T)
            weights = s.exp()
            sink = self.options["sinks"].double().exp()[:, None, None] if self.sinks else 0.0
            out.append(torch.einsum("hqk,khd->qhd", weights / (weights.sum(-1, keepdim=True) + sink), value))
        return torch.cat(out), torch.cat(lse)


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x [..., D] in float64, as a cache of `dtype` keeps it."""
    if dtype not in LIMITS:
        return x.to(dtype).double()
    q, scale = quantize(x, dtype)
    return q.double() * scale.double()[..., None]


def stale(cache: torch.Tensor) -> None:
    """Fill a cache with what must not reach any result."""
    if cache.dtype == torch.float8_e4m3fn:
        cache.view(torch.uint8).fill_(0x7F)  # NaN
    else:
        cache.fill_(NAN if cache.is_floating_point() else 127)
