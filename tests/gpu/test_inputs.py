"""prepare_inputs: the kernel against the reference, and the reference against what a step means."""

from __future__ import annotations

import pytest
import torch

from hf_paged_kernels.inputs import InputBuffers, PackedSizes, prepare_inputs

POISON = 1 << 30


def buffers(device, *, tokens: int, seqs: int, groups: int, width: int) -> InputBuffers:
    """Buffers full of numbers that nobody may read."""
    full = lambda *shape, dtype: torch.full(shape, POISON, dtype=dtype, device=device)  # noqa: E731
    return InputBuffers(
        input_ids=full(tokens, dtype=torch.int64),
        positions=full(tokens, dtype=torch.int64),
        rows=full(tokens, dtype=torch.int64),
        cu_seqlens=full(seqs + 1, dtype=torch.int32),
        seq_lens=full(seqs, dtype=torch.int32),
        block_table=full(groups, seqs, width, dtype=torch.int32),
        slot_mapping=full(groups, tokens, dtype=torch.int64),
    )


class Step:
    """A random step: what the scheduler would say, packed."""

    def __init__(self, num_new, contexts, *, groups: int, block_size: int, rows, unknown: int, device, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda high, count: torch.randint(0, high, (count,), generator=generator).tolist()  # noqa: E731
        self.num_new, self.contexts, self.rows, self.block_size = num_new, contexts, rows, block_size
        lengths = [-(-(new + context) // block_size) for new, context in zip(num_new, contexts)]
        self.tables = [[draw(1000, length) for length in lengths] for _ in range(groups)]
        for table in self.tables[-1] if groups > 1 else []:  # a sliding group that gave its first blocks back
            table[: len(table) // 2] = [-1] * (len(table) // 2)
        self.tokens = draw(50_000, sum(num_new))
        self.sampled = torch.tensor(draw(50_000, max(unknown, 1)), device=device) if unknown else None
        places = torch.randperm(len(self.tokens), generator=generator)[:unknown].tolist()
        for index, place in enumerate(places):
            self.tokens[place] = -1 - index
        cu_seqlens = torch.tensor([0, *num_new]).cumsum(0).tolist()
        flat, starts = [], []
        for group in self.tables:
            starts += [len(flat)]
            for table in group:
                flat += table
                starts += [len(flat)]
        packed = cu_seqlens + contexts + starts + self.tokens + rows + flat + [POISON] * 3
        self.packed = torch.tensor(packed, dtype=torch.int32, device=device)
        self.sizes = PackedSizes(len(num_new), len(self.tokens), len(rows), groups, max(num_new), max(lengths))

    def run(self, backend: str, padded: int | None = None) -> InputBuffers:
        width, seqs = self.sizes.longest_table + 3, max(self.sizes.num_seqs, padded or 0) + 2
        tokens = max(self.sizes.num_tokens, padded or 0) + 5
        out = buffers(self.packed.device, tokens=tokens, seqs=seqs, groups=self.sizes.num_groups, width=width)
        prepare_inputs(
            self.packed, self.sizes, out, block_size=self.block_size, padded_seqs=padded, sampled=self.sampled,
            backend=backend,
        )  # fmt: skip
        return out


def check(step: Step, padded: int | None = None) -> InputBuffers:
    mine, expected = step.run("triton", padded), step.run("reference", padded)
    for name in InputBuffers.__dataclass_fields__:
        assert torch.equal(getattr(mine, name), getattr(expected, name)), name
    return mine


STEPS = {
    "decode": ([1, 1, 1], [30, 0, 95]),
    "prefill": ([5, 700, 17], [0, 0, 0]),
    "mixed": ([1, 1, 40, 1300], [63, 16, 30, 100]),
    "one": ([1], [0]),
}


@pytest.mark.parametrize("groups", [0, 1, 3])
@pytest.mark.parametrize("name", STEPS)
def test_the_kernel_is_the_reference(device, name, groups):
    num_new, contexts = STEPS[name]
    step = Step(num_new, contexts, groups=groups, block_size=48, rows=[0, sum(num_new) - 1], unknown=0, device=device)
    check(step)


def test_tokens_still_on_the_device_are_filled_in(device):
    step = Step([1, 1, 6], [20, 3, 0], groups=2, block_size=16, rows=[0, 1, 7], unknown=2, device=device)
    out = check(step)
    expected = [step.sampled[-1 - token].item() if token < 0 else token for token in step.tokens]
    assert out.input_ids[: len(expected)].tolist() == expected and min(expected) >= 0


def test_what_the_tensors_mean(device):
    step = Step([1, 40], [70, 5], groups=2, block_size=32, rows=[40, 0], unknown=0, device=device)
    out = check(step)
    positions = [70, *range(5, 45)]
    assert out.positions[:41].tolist() == positions
    assert out.seq_lens[:2].tolist() == [71, 45] and out.cu_seqlens[:3].tolist() == [0, 1, 41]
    assert out.rows[:2].tolist() == [40, 0]
    for group, tables in enumerate(step.tables):
        for row, table in enumerate(tables):
            assert out.block_table[group, row, : len(table)].tolist() == table
        owner = [0] + [1] * 40
        blocks = [tables[seq][position // 32] for seq, position in zip(owner, positions)]
        slots = [-1 if block < 0 else block * 32 + position % 32 for block, position in zip(blocks, positions)]
        assert out.slot_mapping[group, :41].tolist() == slots
        assert (min(slots) < 0) == (group == 1)


def test_padding_is_written_and_nothing_behind_it(device):
    step = Step([1, 1, 1], [30, 0, 95], groups=2, block_size=16, rows=[2, 0], unknown=1, device=device)
    out = check(step, padded=8)
    assert out.input_ids[3:8].tolist() == out.positions[3:8].tolist() == out.seq_lens[3:8].tolist() == [0] * 5
    assert out.rows[:8].tolist() == [2, 0] + [0] * 6
    assert out.cu_seqlens[:9].tolist() == list(range(9))
    assert out.slot_mapping[:, 3:8].tolist() == [[-1] * 5] * 2
    for name in ("input_ids", "positions", "rows", "seq_lens"):
        assert (getattr(out, name)[8:] == POISON).all(), name
    assert (out.block_table[:, 3:] == POISON).all() and (out.cu_seqlens[9:] == POISON).all()


def test_buffers_too_small_are_refused(device):
    step = Step([1, 1], [30, 0], groups=1, block_size=16, rows=[0], unknown=0, device=device)
    out = buffers(device, tokens=2, seqs=2, groups=1, width=1)
    with pytest.raises(ValueError, match="out.block_table must be"):
        prepare_inputs(step.packed, step.sizes, out, block_size=16)
    with pytest.raises(ValueError, match="padded_seqs is 1"):
        prepare_inputs(step.packed, step.sizes, out, block_size=16, padded_seqs=1)
