"""Draft tokens in the scheduler: they take only what is left, right ones are kept, wrong ones leave no trace."""

import pytest

from hf_paged.core.request import Request, SequenceStatus
from hf_paged.core.scheduler import GroupSpec, Scheduler


def make(block_size=4, max_blocks=64, windows=(None,), **limits) -> Scheduler:
    defaults = dict(max_batch_tokens=64, max_num_seqs=8, max_model_len=256, prefix_cache=True)
    return Scheduler(
        groups=[GroupSpec(window) for window in windows],
        block_size=block_size,
        num_blocks=[1] * len(windows),
        max_blocks=[max_blocks] * len(windows),
        **{**defaults, **limits},
    )


def add(scheduler, name, prompt, max_tokens=50, **options) -> Request:
    request = Request(request_id=name, prompt_token_ids=list(prompt), max_tokens=max_tokens, **options)
    scheduler.add(request)
    return request


def step(scheduler, drafts=None, tokens=None, sampled=9):
    """One step. `drafts` and `tokens` by seq_id; a sequence without `tokens` gets `sampled`. Returns the plan."""
    plan = scheduler.schedule()
    if drafts:
        plan = scheduler.add_drafts(drafts)
    scheduler.check_integrity()
    scheduler.commit(plan, {seq_id: [sampled] for _, seq_id in plan.samples} | (tokens or {}))
    scheduler.check_integrity()
    return plan


def start(scheduler, *names, prompt=range(100, 106), **options) -> list:
    """Requests whose prompt is computed: their sequences have one output token, 9."""
    requests = [add(scheduler, name, [ord(name), *prompt], **options) for name in names]
    step(scheduler)
    return [request.sequences[0] for request in requests]


def in_use(scheduler) -> int:
    return sum(scheduler.stats()["blocks_in_use"])


def test_a_plan_computes_and_samples_drafts_after_the_last_known_token():
    scheduler = make()
    (seq,) = start(scheduler, "a")
    plan = step(scheduler, {0: [1, 2, 3]}, {0: [1, 2, 3, 4]})
    assert (plan.token_ids, plan.num_new, plan.num_drafts, plan.num_context) == ([9, 1, 2, 3], [4], [3], [7])
    assert plan.samples == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert len(plan.block_tables[0][0]) == 3  # 11 tokens
    assert (seq.output_ids, seq.num_computed, seq.num_remaining) == ([9, 1, 2, 3, 4], 11, 1)


@pytest.mark.parametrize("right", range(6))
def test_drafts_that_were_wrong_leave_no_trace(right):
    scheduler = make()
    (seq,) = start(scheduler, "a")
    drafts = [1, 2, 3, 4, 5]
    step(scheduler, {0: drafts}, {0: [*drafts[:right], 77]})
    assert seq.output_ids == [9, *drafts[:right], 77]
    num_blocks = 2 + (right > 0) + (right > 4)
    assert seq.num_computed == 8 + right and len(seq.block_tables[0]) == in_use(scheduler) == num_blocks
    plan = step(scheduler)
    assert (plan.token_ids, plan.num_context, plan.num_drafts) == ([77], [8 + right], [0])


def test_only_decodes_may_carry_drafts_and_only_as_many_as_they_may_still_output():
    scheduler = make(max_model_len=20)
    for name, max_tokens in (("a", 2), ("b", 6), ("c", 99)):
        add(scheduler, name, [ord(name), *range(6)], max_tokens)
    step(scheduler)
    add(scheduler, "d", range(10))
    plan = scheduler.schedule()
    room, candidates = scheduler.draftable()
    assert room == 64 - plan.num_tokens
    # all have one token and sample another: a is complete then, b may have four more, c has 20 tokens after eleven more
    assert [(seq.request.request_id, most) for seq, most in candidates] == [("b", 4), ("c", 11)]


def test_the_first_step_of_several_completions_carries_no_drafts():
    scheduler = make()
    add(scheduler, "a", [1], n=3)
    scheduler.schedule()
    assert scheduler.draftable()[1] == []


def test_drafts_come_out_of_what_is_left_of_the_budget():
    scheduler = make(max_batch_tokens=10)
    start(scheduler, "a")
    add(scheduler, "b", range(20))
    scheduler.schedule()
    assert scheduler.draftable()[0] == 0  # the prompt took it


def test_more_drafts_than_the_budget_are_a_bug():
    scheduler = make(max_batch_tokens=8)
    start(scheduler, "a")
    scheduler.schedule()
    assert scheduler.draftable()[0] == 7
    with pytest.raises(AssertionError):
        scheduler.add_drafts({0: list(range(8))})


def test_short_of_blocks_drafts_are_dropped_and_nobody_is_preempted():
    scheduler = make(max_blocks=5, prefix_cache=False)
    first, second = start(scheduler, "a", "b", max_tokens=10)  # two blocks each, full after the next token
    plan = step(scheduler, {0: [1, 2, 3, 4, 5], 1: [1, 2, 3, 4]}, {0: [5], 1: [5]})
    assert dict(zip(plan.seq_ids, plan.num_drafts)) == {0: 4, 1: 0}  # one block is left
    assert (first.num_preemptions, second.num_preemptions) == (0, 0)
    assert in_use(scheduler) == 4


def test_drafts_evict_no_cached_prefix():
    scheduler = make(max_blocks=4)
    add(scheduler, "old", range(9), max_tokens=1)
    step(scheduler)  # two full blocks stay findable
    (seq,) = start(scheduler, "b", max_tokens=8)
    plan = step(scheduler, {seq.seq_id: [1, 2, 3]}, {seq.seq_id: [5]})
    assert plan.num_drafts == [0]  # its two blocks are full; the next would be one of the old prompt's
    scheduler.finish(seq.seq_id, "stop")
    again = add(scheduler, "again", range(9), max_tokens=1)
    step(scheduler)
    assert again.sequences[0].num_cached_tokens == 8


@pytest.mark.parametrize("end, reason, stop", [(2, "stop", None), (3, "stop", 3)])
def test_a_token_that_ends_the_output_ends_it_among_right_drafts(end, reason, stop):
    scheduler = make()
    eos = [2] if end == 2 else []
    (seq,) = start(scheduler, "a", eos_token_ids=frozenset(eos), stop_token_ids=frozenset([3]))
    step(scheduler, {0: [1, 2, 3, 4]}, {0: [1, 2, 3, 4, 5]})
    assert (seq.output_ids, seq.finish_reason, seq.stop_reason) == ([9, *range(1, end + 1)], reason, stop)
    assert in_use(scheduler) == 0 and not scheduler.has_unfinished()


def test_the_engine_may_cut_an_output_before_the_tokens_that_came_with_it():
    scheduler = make()
    running, ended = start(scheduler, "a", "b", eos_token_ids=frozenset([4]))
    plan = scheduler.schedule()
    plan = scheduler.add_drafts({0: [1, 2, 3], 1: [1, 2, 3]})
    scheduler.commit(plan, {0: [1, 2, 3, 5], 1: [1, 2, 3, 4]})
    assert (running.finish_reason, ended.finish_reason) == (None, "stop")
    for seq in (running, ended):
        scheduler.cut(seq.seq_id, 3, "stop", "a string")
        assert (seq.output_ids, seq.status) == ([9, 1, 2], SequenceStatus.FINISHED)
        assert (seq.finish_reason, seq.stop_reason) == ("stop", "a string")
    scheduler.check_integrity()
    assert in_use(scheduler) == 0


def test_blocks_of_right_drafts_enter_the_prefix_cache_and_blocks_of_wrong_ones_do_not():
    scheduler = make()
    (seq,) = start(scheduler, "a")
    tokens = [*seq.token_ids, *range(1, 9)]
    step(scheduler, {0: list(range(1, 9))}, {0: [1, 2, 3, 4, 5, 55]})  # 8 to 11 are right, 12 to 15 are not
    scheduler.finish(0, "stop")
    add(scheduler, "b", tokens, max_tokens=1)
    plan = step(scheduler)
    assert plan.num_context == [12]
    assert plan.token_ids == tokens[12:]


def test_a_failed_step_with_drafts_can_be_planned_again():
    scheduler = make()
    (seq,) = start(scheduler, "a")
    scheduler.schedule()
    scheduler.rollback(scheduler.add_drafts({0: [1, 2, 3]}))
    scheduler.check_integrity()
    assert (seq.output_ids, seq.status, in_use(scheduler)) == ([9], SequenceStatus.WAITING, 0)
    step(scheduler, tokens={0: [5]})
    assert seq.output_ids == [9, 5] and seq.num_draft_tokens == 0


def test_a_sequence_whose_sampling_failed_keeps_no_drafts():
    scheduler = make()
    (seq,) = start(scheduler, "a")
    scheduler.schedule()
    plan = scheduler.add_drafts({0: [1, 2, 3]})
    assert scheduler.commit(plan, {}) == []
    scheduler.check_integrity()
    assert seq.num_computed == 8 and in_use(scheduler) == 2


def test_a_sliding_window_keeps_what_a_refused_step_must_see_again():
    scheduler = make(windows=(3,), block_size=2)
    (seq,) = start(scheduler, "a")
    for _ in range(5):
        plan = step(scheduler, {0: [1] * 8}, {0: [7]})
        table, context = plan.block_tables[0][0], plan.num_context[0]
        assert all(block >= 0 for block in table[(context - 2) // 2 :])
    assert seq.output_ids == [9] + [7] * 5


def test_a_shared_block_is_copied_before_drafts_are_written_beyond_it():
    scheduler = make()
    request = add(scheduler, "a", range(6), n=2)
    step(scheduler)
    plan = step(scheduler, {0: [1, 2, 3], 1: [4, 5, 6]}, {0: [1, 8], 1: [4, 5, 8]})
    assert len(plan.copies[0]) == 1  # the last of those that share it writes into the block itself
    blocks = [set(seq.block_tables[0][1:]) for seq in request.sequences]
    assert not blocks[0] & blocks[1]
    assert [seq.output_ids for seq in request.sequences] == [[9, 1, 8], [9, 4, 5, 8]]


def test_drafts_are_counted():
    scheduler = make()
    seq, other = start(scheduler, "a", "b")
    step(scheduler, {0: [1, 2, 3], 1: [1]}, {0: [1, 2, 8], 1: [8]})
    step(scheduler, {0: [1, 2]}, {0: [1, 2, 8]})
    assert [(s.num_draft_tokens, s.num_accepted_tokens) for s in (seq, other)] == [(5, 4), (1, 0)]
    assert (scheduler.stats()["draft_tokens"], scheduler.stats()["accepted_tokens"]) == (6, 4)
    scheduler.reset_stats()
    assert (scheduler.stats()["draft_tokens"], scheduler.stats()["accepted_tokens"]) == (0, 0)
