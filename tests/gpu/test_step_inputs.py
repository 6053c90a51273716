"""A step's inputs made on the device against those made with numpy, step after step in the same buffers."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from hf_paged.core.plan import StepPlan
from hf_paged.runtime.inputs import HostInputs, StagedInputs

BLOCK = 16
CPU = torch.device("cpu")


def staged(device, *, groups: int = 2, tokens: int = 64, seqs: int = 8, width: int = 8, **options) -> StagedInputs:
    return StagedInputs(
        groups, block_size=BLOCK, device=device, backend="triton", num_tokens=tokens, num_seqs=seqs, width=width, **options
    )


def random_plan(rng: random.Random, *, groups: int = 2, decodes: bool = False, most: int = 40, states: bool = False):
    count = rng.randint(1, 6)
    num_new = [1 if decodes else rng.choice([1, 1, rng.randint(2, 9)]) for _ in range(count)]
    num_context = [rng.randint(0, most) for _ in range(count)]
    lengths = [-(-(new + context) // BLOCK) for new, context in zip(num_new, num_context)]
    tables = [[[rng.randint(0, 500) for _ in range(length)] for length in lengths] for _ in range(groups)]
    for table, context in zip(tables[-1], num_context):  # a sliding group gave back what nobody sees
        unseen = max(0, context - 10) // BLOCK
        table[:unseen] = [-1] * unseen
    copies = [[(rng.randint(0, 9), rng.randint(10, 19)) for _ in range(rng.randint(0, 2))] for _ in range(groups)]
    return StepPlan(
        step=1,
        seq_ids=list(range(count)),
        num_new=num_new,
        num_drafts=[0] * count,
        num_context=num_context,
        token_ids=[rng.randint(0, 1000) for _ in range(sum(num_new))],
        block_tables=tables,
        copies=copies,
        num_blocks=[512] * groups,
        states=[(rng.choice([-1, rng.randint(0, 20)]), rng.randint(0, 20)) for _ in range(count)] if states else [],
        num_slots=0,
        samples=[],
    )


def assert_equal(mine, expected, plan: StepPlan) -> None:
    for name in ("input_ids", "positions", "rows"):
        assert torch.equal(getattr(mine, name).cpu(), getattr(expected, name)), name
    for one, other, tables in zip(mine.metadata, expected.metadata, plan.block_tables, strict=True):
        for name in ("cu_seqlens_q", "seq_lens", "slot_mapping"):
            theirs = getattr(other, name)
            theirs = theirs.clamp(min=-1) if name == "slot_mapping" else theirs  # any slot below 0 is none
            assert torch.equal(getattr(one, name).cpu(), theirs), name
        for row, table in enumerate(tables):
            assert one.block_table[row, : len(table)].tolist() == table
        assert (one.max_seqlen_q, one.max_seqlen_k) == (other.max_seqlen_q, other.max_seqlen_k)
    for mine_copies, their_copies in zip(mine.copies, expected.copies, strict=True):
        assert (mine_copies is None) == (their_copies is None)
        assert mine_copies is None or torch.equal(mine_copies.cpu(), their_copies)
    for (group, entries), (other, theirs) in zip(mine.states, expected.states, strict=True):
        assert group == other and torch.equal(entries.cpu(), theirs)


@pytest.mark.parametrize("states", [False, True])
def test_steps_one_after_another(device, states):
    rng = random.Random(1)
    inputs, host = staged(device), HostInputs(BLOCK, CPU)
    for _ in range(12):
        plan = random_plan(rng, states=states)
        rows = rng.sample(range(plan.num_tokens), rng.randint(0, plan.num_tokens))
        assert_equal(inputs.prepare(plan, rows, None), host.prepare(plan, rows, None), plan)
    assert inputs.generation == 1


def test_tokens_of_the_step_before(device):
    rng = random.Random(2)
    inputs, host = staged(device), HostInputs(BLOCK, CPU)
    for _ in range(5):
        plan = random_plan(rng, decodes=True)
        sampled = torch.tensor([rng.randint(0, 1000) for _ in range(9)])
        plan.token_ids = [rng.choice([token, -rng.randint(1, 9)]) for token in plan.token_ids]
        mine = inputs.prepare(plan, [0], sampled.to(device))
        expected = [token if token >= 0 else int(sampled[-1 - token]) for token in plan.token_ids]
        assert mine.input_ids.tolist() == [expected]
        assert host.prepare(plan, [0], sampled).input_ids.tolist() == [expected]


def test_placeholders_without_samples_stay(device):
    """Rows given as embeddings have token ids of -1."""
    plan = random_plan(random.Random(3))
    plan.token_ids = [-1] * plan.num_tokens
    assert staged(device).prepare(plan, [], None).input_ids.tolist() == [plan.token_ids]


def test_buffers_stay_where_they_are_and_grow_when_they_must(device):
    rng = random.Random(4)
    inputs, host = staged(device, tokens=8, seqs=8, width=2), HostInputs(BLOCK, CPU)
    small = random_plan(rng, decodes=True, most=20)
    pointer = inputs.prepare(small, [0], None).input_ids.data_ptr()
    assert inputs.prepare(random_plan(rng, decodes=True, most=20), [0], None).input_ids.data_ptr() == pointer
    assert inputs.generation == 1
    large = random_plan(rng, most=300)
    large.num_new[0] += 30
    large.token_ids += [7] * 30
    large.num_context[0] = 0
    for tables in large.block_tables:
        tables[0][:] = [5] * (-(-large.num_new[0] // BLOCK))
    assert_equal(inputs.prepare(large, range(20), None), host.prepare(large, range(20), None), large)
    assert inputs.generation == 2


def test_positions_that_images_have_moved(device):
    rng = random.Random(6)
    inputs, host = staged(device, shifts_positions=True), HostInputs(BLOCK, CPU)
    pointers = set()
    for step in range(6):
        plan = random_plan(rng, decodes=step % 2 == 1)
        shifts = np.random.default_rng(step).integers(-5, 5, (1 if step % 2 else 3, plan.num_tokens))
        mine, expected = (one.prepare(plan, [0], None, shifts=shifts) for one in (inputs, host))
        assert_equal(mine, expected, plan)
        assert torch.equal(mine.rope_positions.cpu(), expected.rope_positions)
        assert torch.equal(expected.rope_positions, expected.positions + torch.from_numpy(shifts))
        assert inputs.prepare(plan, [0], None).rope_positions is None
        if step % 2:
            for given in (shifts, None):
                padded = inputs.prepare(plan, [0], None, padded=8, shifts=given).rope_positions
                moved = host.prepare(plan, [0], None).positions + (0 if given is None else torch.from_numpy(given[0]))
                assert padded[:, : plan.num_tokens].tolist() == [moved.tolist()]
                assert torch.equal(inputs.static(8).rope_positions, padded)
                pointers.add(padded.data_ptr())
    assert len(pointers) == 1


def test_padded_for_a_graph(device):
    rng = random.Random(5)
    inputs = staged(device)
    for _ in range(4):
        plan = random_plan(rng, decodes=True)
        count = len(plan.seq_ids)
        mine = inputs.prepare(plan, list(range(count)), None, padded=8)
        assert mine.input_ids.shape == (1, 8) and mine.rows.tolist() == [*range(count), *[0] * (8 - count)]
        assert mine.input_ids[0, count:].tolist() == [0] * (8 - count)
        for metadata in mine.metadata:
            assert metadata.num_seqs == 8 and metadata.max_seqlen_k == 8 * BLOCK
            assert metadata.seq_lens.tolist() == [c + 1 for c in plan.num_context] + [0] * (8 - count)
            assert metadata.slot_mapping[count:].tolist() == [-1] * (8 - count)
            assert metadata.cu_seqlens_q.tolist() == list(range(9))
