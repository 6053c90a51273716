"""Shared prefixes: keys that several decodes share are read once, and the results are those without sharing."""

from __future__ import annotations

import pytest
import torch

from hf_paged.core.shared_prefix import SharedPrefix, find_shared_prefixes
from hf_paged.runtime.shared_prefix import shared_prefixes
from hf_paged_kernels import ops
from hf_paged_kernels.triton import decode

NAN = float("nan")


class Batch:
    """Decodes of the given lengths, then prompts; each list of `sharing` begins with the same so many blocks."""

    def __init__(
        self, device, lengths, sharing, *, prompts=(), heads=(4, 2), dims=(32, 32), block_size=16, dtype=torch.float32,
        cache_dtype=None,
    ):  # fmt: skip
        """sharing: [(number of blocks, members), ...]; prompts: (new, total) tokens."""
        generator = torch.Generator().manual_seed(len(lengths))
        self.device, self.heads, self.dims, self.dtype = device, heads, dims, dtype
        total = [*lengths, *(t for _, t in prompts)]
        new = [1] * len(lengths) + [n for n, _ in prompts]
        widths = [-(-t // block_size) for t in total]
        free = (torch.randperm(sum(widths), generator=generator) + 1).tolist()  # block 0 is nobody's
        tables = [[free.pop() for _ in range(width)] for width in widths]
        for count, members in sharing:
            for member in members[1:]:
                tables[member][:count] = tables[members[0]][:count]
        table = torch.zeros(len(total), max(widths), dtype=torch.int32)
        for row, blocks in zip(table, tables):
            row[: len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        slots = [
            table[seq, at // block_size].long() * block_size + at % block_size
            for seq, (n, t) in enumerate(zip(new, total))
            for at in [torch.arange(t - n, t)]
        ]
        context = [length - 1 for length in lengths]
        found = find_shared_prefixes(tables[: len(lengths)], [c // block_size for c in context], 100)
        assert {(group.num_blocks, frozenset(group.members)) for group in found} == {
            (count, frozenset(members)) for count, members in sharing
        }
        self.sharing = sharing  # as it is found, too
        self.metadata = ops.AttentionMetadata(
            torch.tensor([0, *torch.tensor(new).cumsum(0)]).int().to(device), torch.tensor(total).int().to(device),
            table.to(device), torch.cat(slots).to(device), max(new), max(total), len(lengths),
            shared_prefixes(found, context, block_size, device),
        )  # fmt: skip
        sizes = (sum(widths) + 1, heads[1], *dims, block_size, cache_dtype or dtype)
        self.cache = ops.allocate_kv(*sizes, device, backend="triton")
        self.scales = dict(zip(("k_scale", "v_scale"), ops.allocate_scales(self.cache[1])))

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(dtype).to(device)

        every = torch.arange(self.cache[0].shape[0] * block_size, device=device)
        keys, values = normal(len(every), heads[1], dims[0]), normal(len(every), heads[1], dims[1])
        ops.store_kv(keys, values, *self.cache, every, **self.scales, backend="reference")
        for cache in self.cache if self.scales["k_scale"] is None else self.scales.values():
            cache[0] = NAN
        self.query = normal(sum(new), heads[0], dims[0]) * 2
        self.new = normal(sum(new), heads[1], dims[0]), normal(sum(new), heads[1], dims[1])

    def run(self, backend, **options):
        lse = torch.empty(self.query.shape[:2], device=self.device)
        out = ops.attention_(self.query, *self.new, *self.cache, self.metadata, scale=0.2, lse=lse, **self.scales,
                             **options, backend=backend)  # fmt: skip
        return out, lse

    def check(self, **options):
        expected = self.run("reference", **options)
        # Only the first member's table is asked for the blocks that a group shares.
        for count, members in self.sharing:
            order = self.metadata.shared.members.tolist()
            for member in set(members) - {min(members, key=order.index)}:
                self.metadata.block_table[member, :count] = 0
        narrow = self.dtype != torch.float32 or self.scales["k_scale"] is not None
        tolerance = dict(rtol=2e-2, atol=2e-2) if narrow else dict(rtol=1e-4, atol=1e-5)
        for actual, wanted in zip(self.run("triton", **options), expected):
            torch.testing.assert_close(actual, wanted, **tolerance)


LENGTHS = [70, 40, 55, 90, 17, 33, 81]
SHARING = [(2, [0, 2, 3]), (1, [1, 4, 5])]  # and the last one shares nothing


def test_groups_beside_a_sequence_of_its_own(device):
    Batch(device, LENGTHS, SHARING).check()


def test_one_group_of_everybody_with_little_else(device):
    Batch(device, [34, 33, 49, 35], [(2, [0, 1, 2, 3])]).check()


def test_more_rows_than_a_program_takes(device):
    lengths = [40 + i for i in range(20)]
    Batch(device, lengths, [(2, list(range(20)))], heads=(4, 1), dims=(16, 16)).check()


def test_both_parts_in_splits(device, monkeypatch):
    monkeypatch.setattr(decode, "_MIN_SPLIT", 16)
    Batch(device, [70, 68, 100, 67], [(4, [0, 1, 2, 3])], heads=(2, 1)).check(sinks=torch.ones(2, device=device))


@pytest.mark.parametrize("prompts", [[(20, 20), (7, 50)], [(2, 20)]], ids=str)
def test_prompts_in_the_same_step(device, prompts):
    Batch(device, LENGTHS, SHARING, prompts=prompts).check()


@pytest.mark.parametrize("option", ["softcap", "sinks", "alibi_slopes"])
def test_scores_are_changed_as_without_sharing(device, option):
    batch = Batch(device, LENGTHS, SHARING)
    values = dict(softcap=2.0, sinks=torch.randn(4).to(device), alibi_slopes=torch.rand(4).to(device))
    batch.check(**{option: values[option]})


def test_a_quantized_cache(device):
    Batch(device, LENGTHS, SHARING, cache_dtype=torch.int8).check()


@pytest.mark.parametrize("block_size, dims", [(64, (24, 40)), (48, (32, 32))])
def test_narrow_types_and_other_sizes(device, block_size, dims):
    lengths = [200, 170, 130, 150]
    batch = Batch(device, lengths, [(2, [0, 1, 2, 3])], block_size=block_size, dims=dims, dtype=torch.bfloat16)
    batch.check()


def test_layers_that_do_not_see_everything_do_without(device):
    batch = Batch(device, LENGTHS, SHARING)
    for options in (dict(window=20), dict(chunk=32)):
        expected, _ = batch.run("reference", **options)
        torch.testing.assert_close(batch.run("triton", **options)[0], expected, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_together_is_named(device):
    shared = shared_prefixes([SharedPrefix(1, (0, 1))], [20, 20], 16, device)
    batch = Batch(device, LENGTHS, SHARING)
    with pytest.raises(ValueError, match="shared has 2 members, num_decodes is 7"):
        ops.AttentionMetadata(batch.metadata.cu_seqlens_q, batch.metadata.seq_lens, batch.metadata.block_table,
                              batch.metadata.slot_mapping, 1, 90, 7, shared)  # fmt: skip
