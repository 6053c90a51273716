"""State slots: who reads and writes which, when they are shared, split and given back."""

import pytest

from hf_paged.base.errors import CacheFull, RequestTooLarge
from hf_paged.core.request import Request
from hf_paged.core.scheduler import GroupSpec, Scheduler


def make(max_slots=8, groups=(), max_blocks=64, **limits) -> Scheduler:
    defaults = dict(max_batch_tokens=64, max_num_seqs=8, max_model_len=256, prefix_cache=False)
    return Scheduler(
        groups=groups,
        block_size=4,
        num_blocks=[0 for _ in groups],
        max_blocks=[max_blocks for _ in groups],
        max_slots=max_slots,
        **{**defaults, **limits},
    )


def add(scheduler, name, length, max_tokens=4, **options) -> Request:
    request = Request(request_id=name, prompt_token_ids=list(range(1, length + 1)), max_tokens=max_tokens, **options)
    scheduler.add(request)
    return request


def step(scheduler) -> list[tuple[str, int, int]]:
    """(request id, slot read, slot written) of one step's rows."""
    plan = scheduler.schedule()
    if plan is None:
        return []
    scheduler.check_integrity()
    names = [scheduler.sequence(seq_id).request.request_id for seq_id in plan.seq_ids]
    scheduler.commit(plan, {seq_id: [9] for _, seq_id in plan.samples})
    scheduler.check_integrity()
    assert all(write < plan.num_slots for _, write in plan.states)
    return [(name, *states) for name, states in zip(names, plan.states, strict=True)]


def slots_in_use(scheduler) -> int:
    return scheduler.stats()["slots_in_use"]


def test_a_sequence_begins_empty_and_keeps_its_slot_until_it_ends():
    scheduler = make(max_batch_tokens=4)
    add(scheduler, "a", 6, max_tokens=2)
    assert [step(scheduler) for _ in range(3)] == [[("a", -1, 0)], [("a", 0, 0)], [("a", 0, 0)]]
    assert slots_in_use(scheduler) == 0 and scheduler.stats()["slots_peak"] == 1


def test_no_slots_without_state():
    scheduler = make(max_slots=0, groups=[GroupSpec(None)])
    add(scheduler, "a", 3)
    plan = scheduler.schedule()
    assert (plan.states, plan.num_slots, scheduler.has_state) == ([], 0, False)


def test_completions_share_the_prompts_state_until_each_writes_its_own():
    scheduler = make()
    assert scheduler.has_state
    add(scheduler, "a", 6, n=3)
    assert step(scheduler) == [("a", -1, 0)]
    assert slots_in_use(scheduler) == 1
    # the last to go on takes over the shared slot; it is read before it is written
    assert step(scheduler) == [("a", 0, 1), ("a", 0, 2), ("a", 0, 0)]
    assert step(scheduler) == [("a", 1, 1), ("a", 2, 2), ("a", 0, 0)]


def test_a_leader_that_ends_leaves_the_state_to_its_siblings():
    scheduler = make()
    request = add(scheduler, "a", 6, n=2)
    step(scheduler)
    scheduler.finish(request.sequences[0].seq_id, "stop")
    scheduler.check_integrity()
    assert step(scheduler) == [("a", 0, 0)]


def test_preempted_and_rolled_back_sequences_begin_empty_again():
    scheduler = make(groups=[GroupSpec(None)], max_blocks=5)
    add(scheduler, "a", 7, max_tokens=9)
    add(scheduler, "b", 7, max_tokens=9)
    assert step(scheduler) == [("a", -1, 0), ("b", -1, 1)]
    while scheduler.stats()["preemptions"] == 0:
        rows = step(scheduler)
    assert rows == [("a", 0, 0)] and slots_in_use(scheduler) == 1
    scheduler.rollback(scheduler.schedule())
    scheduler.check_integrity()
    assert slots_in_use(scheduler) == 0
    assert step(scheduler) == [("a", -1, 0)]


def test_a_failed_step_leaves_the_states_of_others_alone():
    scheduler = make()
    request = add(scheduler, "a", 6, n=2)
    step(scheduler)
    first, second = (seq.seq_id for seq in request.sequences)
    plan = scheduler.schedule(only={first})
    assert plan.states == [(0, 1)]  # not in place: the sibling still needs what is there
    scheduler.rollback(plan)
    scheduler.check_integrity()
    plan = scheduler.schedule(only={second})
    assert plan.states == [(0, 0)]
    scheduler.rollback(plan)
    assert slots_in_use(scheduler) == 0


def test_too_few_slots_hold_requests_back():
    scheduler = make(max_slots=2)
    for name in "abc":
        add(scheduler, name, 3, max_tokens=2)
    assert [name for name, _, _ in step(scheduler)] == ["a", "b"]
    assert [name for name, _, _ in step(scheduler)] == ["a", "b"]
    assert step(scheduler) == [("c", -1, 1)]


def test_more_completions_than_slots_are_refused():
    scheduler = make(max_slots=2)
    with pytest.raises(RequestTooLarge, match="n 3 takes 3 state slots, but the cache holds at most 2"):
        add(scheduler, "a", 3, n=3)
    add(scheduler, "b", 3, n=2)


def test_equal_prompts_of_one_step_do_not_wait_for_each_other():
    scheduler = make(groups=[GroupSpec(None)])
    add(scheduler, "a", 12)
    add(scheduler, "b", 12)
    assert step(scheduler) == [("a", -1, 0), ("b", -1, 1)]
    assert scheduler.stats()["prefix_queried_tokens"] == 0


def test_held_sequences_fork_with_their_state_and_take_slots_from_running_ones():
    scheduler = make(max_slots=2)
    held = scheduler.held

    def run(*work):
        plan, _ = held.plan([(seq, [7]) for seq in work], release_unseen=True)
        held.commit(plan)
        scheduler.check_integrity()
        return plan.states

    row = held.new("row")
    assert run(row) == [(-1, 0)]
    add(scheduler, "a", 3)
    assert step(scheduler) == [("a", -1, 1)]
    fork = held.fork(row)
    assert slots_in_use(scheduler) == 2
    assert run(row, fork) == [(0, 1), (0, 0)]
    assert scheduler.stats()["preemptions"] == 1
    with pytest.raises(CacheFull):
        run(held.new("third"))
    held.release(fork)
    assert run(row) == [(1, 1)]
    for sequence in list(held):
        held.release(sequence)
    assert slots_in_use(scheduler) == 0


def test_whole_prompts_exceed_the_budget_but_take_nothing_from_decodes():
    scheduler = make(groups=[GroupSpec(None)], max_batch_tokens=6, whole_prompts=True)

    def sizes():
        plan = scheduler.schedule()
        names = [scheduler.sequence(seq_id).request.request_id for seq_id in plan.seq_ids]
        scheduler.commit(plan, {seq_id: [9] for _, seq_id in plan.samples})
        scheduler.check_integrity()
        return dict(zip(names, plan.num_new, strict=True))

    add(scheduler, "a", 3)
    add(scheduler, "b", 20)
    add(scheduler, "c", 5)
    assert sizes() == {"a": 3, "b": 20}
    assert sizes() == {"a": 1, "b": 1, "c": 5}
    scheduler.rollback(scheduler.schedule())
    assert sizes() == {"a": 3, "b": 20}  # again, up to the end of the prompt
    assert sizes() == {"a": 2, "b": 2, "c": 5}


def test_whole_prompts_wait_for_all_their_blocks():
    scheduler = make(groups=[GroupSpec(None)], max_blocks=6, whole_prompts=True)
    add(scheduler, "a", 7, max_tokens=6)
    assert step(scheduler) == [("a", -1, 0)]
    add(scheduler, "b", 15, max_tokens=2)
    while scheduler.num_running:
        assert [name for name, _, _ in step(scheduler)] == ["a"]
    assert step(scheduler) == [("b", -1, 0)]
