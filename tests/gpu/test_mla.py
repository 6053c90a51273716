"""Attention over latents that are kept once: the Triton kernel against the reference on the same cache."""

from __future__ import annotations

import pytest
import torch

from hf_paged_kernels import ops
from hf_paged_kernels.triton import mla
from hf_paged_kernels.triton.merge import merge_states

NAN = float("nan")


class Batch:
    """A ragged step on latents [c ; r] of c + r dimensions. Slots that nothing was written to hold NaN."""

    def __init__(self, device, lengths, *, heads=4, dims=(32, 16), block_size=16, dtype=torch.float32, bound=None):
        """lengths: (new, total) tokens of each sequence."""
        generator = torch.Generator().manual_seed(len(lengths) + heads)

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(dtype).to(device)

        self.v_dim, self.k_dim = dims[0], sum(dims)
        new, total = [n for n, _ in lengths], [t for _, t in lengths]
        widths = [-(-t // block_size) for t in total]
        blocks = torch.randperm(sum(widths) + 2, generator=generator).int()
        table = torch.full((len(lengths), max(widths) + 1), -1, dtype=torch.int32)
        slots = []
        for seq, (n, t) in enumerate(lengths):
            start = sum(widths[:seq])
            table[seq, : widths[seq]] = blocks[start : start + widths[seq]]
            at = torch.arange(t)
            slots.append(table[seq, at // block_size].long() * block_size + at % block_size)
        decodes = next((i for i, n in enumerate(new) if n != 1), len(new))
        self.metadata = ops.AttentionMetadata(
            torch.tensor([0, *torch.tensor(new).cumsum(0)]).int().to(device), torch.tensor(total).int().to(device),
            table.to(device), torch.cat([s[len(s) - n :] for s, n in zip(slots, new)]).to(device), max(new),
            bound or max(total), decodes,
        )  # fmt: skip
        self.query = normal(heads, sum(new), self.k_dim).transpose(0, 1) * 2  # strided, as the absorbed projection is
        self.k_cache, self.v_cache = ops.allocate_kv(
            sum(widths) + 2, 1, self.k_dim, self.v_dim, block_size, dtype, device, values_in_keys=True, backend="triton"
        )
        self.k_cache.fill_(NAN)
        past = torch.cat([s[: len(s) - n] for s, n in zip(slots, new)]).to(device)
        latents = normal(len(past), 1, self.k_dim)
        ops.store_kv(latents, latents[..., : self.v_dim], self.k_cache, self.v_cache, past, backend="reference")
        self.latent = normal(sum(new), 1, self.k_dim)

    def run(self, backend, **options):
        k_cache = self.k_cache.mT.clone().mT
        v_cache = k_cache.mT[..., : self.v_dim]
        lse = torch.empty(self.query.shape[:2], device=self.query.device)
        out = ops.attention_(self.query, self.latent, self.latent[..., : self.v_dim], k_cache, v_cache, self.metadata,
                             scale=0.3, lse=lse, backend=backend, **options)  # fmt: skip
        return out, lse, k_cache

    def check(self, **options):
        expected, expected_lse, written = self.run("reference", **options)
        out, lse, k_cache = self.run("triton", **options)
        assert torch.equal(k_cache.nan_to_num(9.0), written.nan_to_num(9.0))
        wide = self.query.dtype == torch.float32
        tolerance = dict(rtol=1e-4, atol=1e-5) if wide else dict(rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(out, expected, **tolerance)
        torch.testing.assert_close(lse, expected_lse, **tolerance)


DECODES = [(1, 1), (1, 40), (1, 16), (1, 17)]
MIXED = [(1, 33), (1, 5), (20, 20), (7, 50), (33, 34)]
PREFILL = [(30, 30), (3, 70)]


@pytest.mark.parametrize("lengths", [DECODES, MIXED, PREFILL, [(3, 20), (2, 40), (3, 3)]], ids=str)
@pytest.mark.parametrize("heads", [4, 24])
def test_ragged_batches(device, lengths, heads):
    Batch(device, lengths, heads=heads).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [DECODES, MIXED], ids=str)
def test_narrow_types(device, lengths, dtype):
    Batch(device, lengths, heads=16, dtype=dtype).check()


@pytest.mark.parametrize("lengths", [[(1, 150), (1, 20), (1, 33)], [(1, 90), (6, 60), (20, 80)]], ids=str)
def test_splits_are_merged(device, lengths, monkeypatch):
    monkeypatch.setattr(mla, "_MIN_SPLIT", 32)
    merged = []
    monkeypatch.setattr(mla, "merge_states", lambda *args, **kwargs: merged.append(merge_states(*args, **kwargs)))
    sinks = torch.randn(4, device=device)
    Batch(device, lengths).check(sinks=sinks)
    assert merged


@pytest.mark.parametrize("dims, block_size", [((24, 8), 48), ((40, 20), 64), ((16, 3), 32)])
def test_other_sizes(device, dims, block_size):
    Batch(device, MIXED, dims=dims, block_size=block_size).check()


def test_a_row_of_padding_gives_zeros(device):
    batch = Batch(device, [(1, 40), (1, 1)], bound=400)  # the bound makes splits
    batch.metadata.seq_lens[1] = 0
    batch.metadata.slot_mapping[1] = -1
    batch.metadata.block_table[1] = 0
    out, lse, _ = batch.run("triton")
    assert (out[1] == 0).all() and torch.isneginf(lse[1]).all()
    torch.testing.assert_close(out[0], batch.run("reference")[0][0], rtol=1e-4, atol=1e-5)


def test_blocks_are_copied_whole(device):
    batch = Batch(device, DECODES)
    expected = batch.k_cache.clone()
    pairs = torch.tensor([[0, 3], [4, 1]], device=device)
    expected[[3, 1]] = expected[[0, 4]]
    ops.copy_blocks(batch.k_cache, batch.v_cache, pairs, backend="triton")
    assert torch.equal(batch.k_cache.nan_to_num(9.0), expected.nan_to_num(9.0))


@pytest.mark.parametrize("name, value", [("window", 8), ("chunk", 8), ("softcap", 3.0), ("alibi_slopes", torch.ones(4))])
def test_what_latent_attention_has_not_is_refused(device, name, value):
    batch = Batch(device, DECODES)
    options = {name: value.to(device) if isinstance(value, torch.Tensor) else value}
    with pytest.raises(ValueError, match="view of k_cache"):
        batch.run("triton", **options)


@pytest.mark.parametrize("sizes", [(4, 2, 48, 32), (4, 1, 32, 32)], ids=str)
def test_values_lie_in_the_keys_of_one_head_only(device, sizes):
    with pytest.raises(ValueError, match="values_in_keys"):
        ops.allocate_kv(*sizes, 16, torch.float32, device, values_in_keys=True, backend="triton")
    with pytest.raises(ValueError, match="values_in_keys"):
        ops.allocate_kv(4, 1, 48, 32, 16, torch.float32, device, values_in_keys=True, backend="reference")
