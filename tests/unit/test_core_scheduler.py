"""Scheduler: who runs when and on how many tokens, preemption, forks, failures, ends. The prefix cache is off here."""

import itertools

import pytest
from scheduling import add, expected, make, sample

from hf_paged.base.errors import InvalidArgument, QueueFull, RequestTooLarge
from hf_paged.core.request import Request, SequenceStatus


def commit(scheduler, plan) -> None:
    sequences = [scheduler.sequence(seq_id) for _, seq_id in plan.samples]
    scheduler.commit(plan, {seq.seq_id: [sample(seq.token_ids, seq.index)] for seq in sequences})
    scheduler.check_integrity()


def rows(scheduler, plan) -> list[tuple[str, int, int]]:
    """(request id, tokens from the cache, tokens computed) of every row of the plan."""
    scheduler.check_integrity()
    assert sum(plan.num_new) == plan.num_tokens <= scheduler.max_batch_tokens
    found, packed = [], iter(plan.token_ids)
    for seq_id, context, new in zip(plan.seq_ids, plan.num_context, plan.num_new):
        seq = scheduler.sequence(seq_id)
        assert list(itertools.islice(packed, new)) == seq.token_ids[context : context + new]
        found.append((seq.request.request_id, context, new))
    return found


def step(scheduler) -> list[tuple[str, int, int]]:
    plan = scheduler.schedule()
    if plan is None:
        return []
    result = rows(scheduler, plan)
    commit(scheduler, plan)
    return result


def names(scheduler) -> str:
    return "".join(name for name, _, _ in step(scheduler))


def drain(scheduler) -> list[list[tuple[str, int, int]]]:
    steps = []
    while scheduler.has_unfinished():
        steps.append(step(scheduler))
        assert steps[-1], "unfinished requests, but nothing to run"
        assert len(steps) < 500, "it does not come to an end"
    assert (scheduler.num_waiting, scheduler.num_running) == (0, 0)
    assert scheduler.stats()["blocks_in_use"] == [0]
    assert scheduler.schedule() is None
    return steps


def run_tokens(request, tokens, **limits):
    """What `request` ends with if these tokens are sampled: (output, finish reason, stop reason)."""
    scheduler = make(**limits)
    scheduler.add(request)
    for token in tokens:
        plan = scheduler.schedule()
        if plan is None:
            break
        scheduler.commit(plan, {seq_id: [token] for _, seq_id in plan.samples})
    seq = request.sequences[0]
    return seq.output_ids, seq.finish_reason, seq.stop_reason


# -- token budget


def test_a_prompt_is_computed_then_one_token_a_step():
    scheduler = make()
    request = add(scheduler, "a", 6, max_tokens=3)
    plan = scheduler.schedule()
    assert (plan.token_ids, plan.samples) == (request.prompt_token_ids, [(5, 0)])
    commit(scheduler, plan)
    assert drain(scheduler) == [[("a", 6, 1)], [("a", 7, 1)]]
    assert request.sequences[0].output_ids == expected(request)


def test_a_long_prompt_is_computed_in_chunks_of_the_budget_and_sampled_once():
    scheduler = make(max_batch_tokens=8)
    request = add(scheduler, "a", 20, max_tokens=1)
    for context, new, samples in ((0, 8, []), (8, 8, []), (16, 4, [(3, 0)])):
        plan = scheduler.schedule()
        assert (plan.num_context, plan.num_new, plan.samples) == ([context], [new], samples)
        commit(scheduler, plan)
    assert request.finished


def test_decodes_come_first_and_prefill_chunks_take_the_rest_of_the_budget():
    scheduler = make(max_batch_tokens=10)
    add(scheduler, "a", 3, max_tokens=9)
    add(scheduler, "b", 3, max_tokens=9)
    step(scheduler)
    add(scheduler, "c", 20)
    assert step(scheduler) == [("a", 3, 1), ("b", 3, 1), ("c", 0, 8)]
    assert step(scheduler) == [("a", 4, 1), ("b", 4, 1), ("c", 8, 8)]
    assert step(scheduler) == [("a", 5, 1), ("b", 5, 1), ("c", 16, 4)]


def test_a_prefill_that_ranks_higher_leaves_the_running_decodes_their_tokens():
    scheduler = make(max_batch_tokens=10, policy="priority")
    add(scheduler, "a", 3, max_tokens=9, priority=5)
    add(scheduler, "b", 3, max_tokens=9, priority=5)
    step(scheduler)
    add(scheduler, "c", 20, priority=0)
    assert step(scheduler) == [("a", 3, 1), ("b", 3, 1), ("c", 0, 8)]
    assert step(scheduler) == [("a", 4, 1), ("b", 4, 1), ("c", 8, 8)]


def test_several_prompts_share_the_budget_of_one_step():
    scheduler = make(max_batch_tokens=10)
    for name in "abc":
        add(scheduler, name, 4, max_tokens=2)
    assert step(scheduler) == [("a", 0, 4), ("b", 0, 4), ("c", 0, 2)]
    assert step(scheduler) == [("a", 4, 1), ("b", 4, 1), ("c", 2, 2)]


def test_no_more_decodes_run_than_the_budget_allows_and_all_finish():
    scheduler = make(max_batch_tokens=2)
    requests = [add(scheduler, name, 1, max_tokens=3) for name in "abc"]
    drain(scheduler)
    for request in requests:
        assert request.sequences[0].output_ids == expected(request)


def test_single_tokens_come_before_longer_chunks_in_a_plan():
    scheduler = make()
    add(scheduler, "a", 5)
    add(scheduler, "b", 1)
    add(scheduler, "c", 3)
    assert step(scheduler) == [("b", 0, 1), ("a", 0, 5), ("c", 0, 3)]


def test_plans_are_counted_and_none_is_made_when_idle():
    scheduler = make()
    assert scheduler.schedule() is None
    add(scheduler, "a", 3, max_tokens=2)
    numbers = []
    while (plan := scheduler.schedule()) is not None:
        numbers.append(plan.step)
        commit(scheduler, plan)
    assert numbers == [1, 2]


def test_a_plan_says_how_many_blocks_its_tensors_need():
    scheduler = make(max_blocks=40)
    add(scheduler, "a", 100)
    add(scheduler, "b", 30)
    sizes = [0]
    for _ in range(4):
        plan = scheduler.schedule()
        sizes.append(plan.num_blocks[0])
        assert max(max(table) for table in plan.block_tables[0]) < sizes[-1] <= 40
        commit(scheduler, plan)
    assert sizes == sorted(sizes)


# -- order


def test_fcfs_runs_in_order_of_arrival_whatever_the_priority():
    scheduler = make(max_num_seqs=1)
    for name, priority in (("a", 2), ("b", 1), ("c", 0)):
        add(scheduler, name, 3, max_tokens=1, priority=priority)
    assert [names(scheduler) for _ in range(3)] == ["a", "b", "c"]


def test_priority_runs_lower_numbers_first_and_equals_by_arrival():
    scheduler = make(max_num_seqs=1, policy="priority")
    for name, priority in (("a", 2), ("b", 0), ("c", -1), ("d", 0), ("e", 2)):
        add(scheduler, name, 3, max_tokens=1, priority=priority)
    assert [names(scheduler) for _ in range(5)] == ["c", "b", "d", "a", "e"]


def test_a_small_request_does_not_overtake_one_that_lacks_blocks():
    scheduler = make(max_blocks=8)
    add(scheduler, "a", 20, max_tokens=2)
    step(scheduler)
    add(scheduler, "b", 16, max_tokens=2)
    add(scheduler, "c", 1, max_tokens=1)
    assert names(scheduler) == "a"
    assert names(scheduler) == "cb"  # one step, single tokens first
    drain(scheduler)


def test_an_unknown_policy_is_refused():
    with pytest.raises(InvalidArgument, match="policy"):
        make(policy="lifo")


# -- preemption


def test_a_higher_priority_preempts_when_all_seats_are_taken():
    scheduler = make(max_num_seqs=2, policy="priority")
    low = [add(scheduler, name, 3, max_tokens=6, priority=5) for name in "ab"]
    step(scheduler), step(scheduler)
    high = add(scheduler, "c", 3, max_tokens=2, priority=1)
    assert step(scheduler) == [("a", 4, 1), ("c", 0, 3)]  # the last in order gave way
    assert [r.sequences[0].num_preemptions for r in (*low, high)] == [0, 1, 0]
    assert step(scheduler) == [("c", 3, 1), ("a", 5, 1)]
    assert step(scheduler) == [("a", 6, 1), ("b", 0, 5)]  # prompt and two outputs, recomputed
    drain(scheduler)
    for request in (*low, high):
        assert request.sequences[0].output_ids == expected(request)


def test_a_higher_priority_preempts_when_blocks_are_short():
    scheduler = make(max_blocks=6, policy="priority")
    low = add(scheduler, "a", 16, max_tokens=6, priority=5)
    step(scheduler)
    high = add(scheduler, "b", 9, max_tokens=3, priority=1)
    assert step(scheduler) == [("b", 0, 9)]
    assert low.sequences[0].status is SequenceStatus.WAITING and low.sequences[0].block_tables == [[]]
    assert scheduler.stats()["preemptions"] == 1
    drain(scheduler)
    for request in (low, high):
        assert request.sequences[0].output_ids == expected(request)


@pytest.mark.parametrize("policy, priority", [("priority", 5), ("priority", 6), ("fcfs", 0)])
def test_newcomers_of_equal_or_lower_rank_preempt_nobody(policy, priority):
    scheduler = make(max_num_seqs=1, policy=policy)
    add(scheduler, "a", 3, max_tokens=3, priority=5)
    step(scheduler)
    add(scheduler, "b", 3, max_tokens=1, priority=priority)
    assert [names(scheduler) for _ in range(3)] == ["a", "a", "b"]
    assert scheduler.stats()["preemptions"] == 0


def test_equals_do_not_push_each_other_out():
    scheduler = make(max_num_seqs=2, policy="priority")
    for name in "abc":
        add(scheduler, name, 3, max_tokens=3)
    step(scheduler)
    scheduler.rollback(scheduler.schedule({0}))
    commit(scheduler, scheduler.schedule({2}))  # c has the seat of a now
    assert [names(scheduler) for _ in range(2)] == ["bc", "bc"]
    assert scheduler.stats()["preemptions"] == 0
    assert step(scheduler) == [("a", 0, 4)]
    drain(scheduler)


def test_nobody_is_preempted_for_seats_that_would_not_suffice():
    scheduler = make(max_num_seqs=2, policy="priority")
    add(scheduler, "a", 3, max_tokens=3, priority=0)
    add(scheduler, "b", 3, max_tokens=3, priority=5)
    step(scheduler)
    add(scheduler, "c", 3, n=2, max_tokens=1, priority=1)  # b's seat alone does not do
    assert names(scheduler) == "ab"
    assert scheduler.stats()["preemptions"] == 0
    drain(scheduler)


def test_when_blocks_run_out_the_last_comer_recomputes_and_completes_later():
    scheduler = make(block_size=2, max_blocks=8)
    first, last = add(scheduler, "a", 4, max_tokens=10), add(scheduler, "b", 4, max_tokens=10)
    steps = drain(scheduler)
    assert first.sequences[0].num_preemptions == 0
    assert last.sequences[0].num_preemptions == scheduler.stats()["preemptions"] == 1
    restarts = [new for chunk in steps[1:] for name, context, new in chunk if name == "b" and context == 0]
    assert len(restarts) == 1 and restarts[0] > 5  # the prompt and the outputs so far, in one prefill
    for request in (first, last):
        assert request.sequences[0].output_ids == expected(request)
        assert request.sequences[0].finish_reason == "length"


def test_many_requests_on_scarce_blocks_all_complete():
    scheduler = make(block_size=2, max_blocks=16, max_batch_tokens=7)
    requests = [add(scheduler, name, 3 + i, max_tokens=8, n=1 + i % 2) for i, name in enumerate("abcdef")]
    drain(scheduler)
    assert scheduler.stats()["preemptions"] > 0
    for request in requests:
        assert [seq.output_ids for seq in request.sequences] == [expected(request, i) for i in range(request.n)]


def test_nobody_is_admitted_who_would_be_preempted_at_once():
    scheduler = make(block_size=2, max_blocks=4)
    add(scheduler, "a", 4, max_tokens=4)
    add(scheduler, "b", 4, max_tokens=4)  # both prompts fit, but then neither could go on
    assert names(scheduler) == "a"
    drain(scheduler)
    assert scheduler.stats()["preemptions"] == 0


# -- several completions


def test_the_prompt_is_computed_once_for_all_completions():
    scheduler = make()
    request = add(scheduler, "a", 6, n=3, max_tokens=3)
    plan = scheduler.schedule()
    assert rows(scheduler, plan) == [("a", 0, 6)]
    assert plan.samples == [(5, 0), (5, 1), (5, 2)]
    assert scheduler.stats()["blocks_in_use"] == [2]
    commit(scheduler, plan)
    assert step(scheduler) == [("a", 6, 1)] * 3
    drain(scheduler)
    assert [seq.index for seq in request.sequences] == [0, 1, 2]
    assert [seq.output_ids for seq in request.sequences] == [expected(request, i) for i in range(3)]


def test_forks_copy_the_block_they_write_and_share_the_full_ones():
    scheduler = make()
    add(scheduler, "a", 6, n=3)
    plan = scheduler.schedule()
    assert plan.copies == [[]]
    full, partial = plan.block_tables[0][0]
    commit(scheduler, plan)
    plan = scheduler.schedule()
    tables = plan.block_tables[0]
    assert [table[0] for table in tables] == [full] * 3
    written = [table[1] for table in tables]
    assert len(set(written)) == 3 and full not in written
    copies = plan.copies[0]
    assert {source for source, _ in copies} == {partial}
    assert {target for _, target in copies} == set(written) - {partial}
    assert len(copies) == len(set(copies)) >= 2
    commit(scheduler, plan)
    plan = scheduler.schedule()
    assert plan.copies == [[]]  # each has its own by now
    assert [table[1] for table in plan.block_tables[0]] == written
    commit(scheduler, plan)
    drain(scheduler)


def test_forks_of_a_prompt_of_full_blocks_copy_nothing():
    scheduler = make()
    add(scheduler, "a", 8, n=2)
    step(scheduler)
    plan = scheduler.schedule()
    assert plan.copies == [[]]
    first, second = plan.block_tables[0]
    assert first[:2] == second[:2] and first[2] != second[2]


def test_a_last_holder_writes_in_place_when_its_sibling_ended():
    scheduler = make()
    request = add(scheduler, "a", 6, n=2)
    plan = scheduler.schedule()
    last = plan.block_tables[0][0][-1]
    commit(scheduler, plan)
    scheduler.finish(1, "stop")
    plan = scheduler.schedule()
    assert plan.copies == [[]] and plan.block_tables[0][0][-1] == last
    commit(scheduler, plan)
    assert [seq.finish_reason for seq in request.sequences] == [None, "stop"]
    drain(scheduler)


def test_seats_are_reserved_for_completions_to_be_forked():
    scheduler = make(max_num_seqs=4, max_batch_tokens=8)
    add(scheduler, "a", 12, n=3, max_tokens=2)
    add(scheduler, "b", 1, n=2, max_tokens=1)
    add(scheduler, "c", 1, max_tokens=1)
    assert step(scheduler) == [("a", 0, 8)]
    assert step(scheduler) == [("a", 8, 4)]  # b lacks a seat, and c does not overtake it
    assert step(scheduler) == [("a", 12, 1)] * 3
    assert sorted(step(scheduler)) == [("b", 0, 1), ("c", 0, 1)]
    assert not scheduler.has_unfinished()


def test_a_completion_that_ends_gives_its_seat_to_the_next_request():
    scheduler = make(max_num_seqs=2)
    add(scheduler, "a", 3, n=2, max_tokens=5)
    add(scheduler, "b", 3, max_tokens=1)
    step(scheduler)
    assert names(scheduler) == "aa"
    scheduler.finish(1, "stop")
    assert names(scheduler) == "ab"
    drain(scheduler)


def test_completions_end_one_by_one_and_the_request_with_the_last():
    scheduler = make()
    request = add(scheduler, "a", 3, n=2, max_tokens=9, stop_token_ids=frozenset([7]))
    plan = scheduler.schedule()
    scheduler.commit(plan, {0: [7], 1: [8]})
    assert [seq.finish_reason for seq in request.sequences] == ["stop", None]
    assert not request.finished and not scheduler.is_request_finished("a")
    plan = scheduler.schedule()
    assert plan.seq_ids == [1]
    scheduler.commit(plan, {1: [7]})
    assert request.finished and scheduler.is_request_finished("a")
    scheduler.check_integrity()


def test_a_request_that_wants_no_tokens_ends_with_its_prompt():
    scheduler = make(max_batch_tokens=6, max_model_len=10)  # as long as a sequence may be
    embedded, generating = add(scheduler, "a", 10, max_tokens=0), add(scheduler, "b", 1, max_tokens=2)
    plan = scheduler.schedule()
    assert (plan.num_new, plan.samples) == ([6], [])
    assert scheduler.commit(plan, {}) == []
    plan = scheduler.schedule()
    assert (plan.num_new, plan.samples) == ([1, 4], [(0, 1)])
    scheduler.launched(plan)
    ahead = scheduler.schedule()  # its step is under way: there is nothing to add to it
    assert ahead.seq_ids == [1]
    scheduler.launched(ahead)
    assert scheduler.commit(plan, {1: [7]}) == [*generating.sequences, *embedded.sequences]
    assert embedded.finished and embedded.sequences[0].finish_reason == "stop"
    assert embedded.sequences[0].output_ids == []
    scheduler.check_integrity()
    scheduler.commit(ahead, {1: [8]})
    assert not scheduler.has_unfinished()


# -- refusals


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(prompt=[]), InvalidArgument, "prompt is empty"),
        (dict(prompt=20), RequestTooLarge, "20 tokens, but with max_model_len 20 it can have at most 19"),
        (dict(prompt=16, max_tokens=2), RequestTooLarge, "5 KV blocks of 4 tokens in group 0.*at most 4"),
        (dict(prompt=4, max_tokens=16), RequestTooLarge, "5 KV blocks"),
        (dict(prompt=6, n=3, max_tokens=4), RequestTooLarge, "n 3 can take 7 KV"),
        (dict(prompt=1, n=4), InvalidArgument, r"n must be between 1 and max_num_seqs \(3\), got 4"),
        (dict(prompt=1, n=0), InvalidArgument, "n must be"),
        (dict(prompt=1, max_tokens=-1), InvalidArgument, "max_tokens must be at least 1"),
        (dict(prompt=1, max_tokens=0, n=2), InvalidArgument, "max_tokens must be at least 1"),
        (dict(prompt=1, name="used"), InvalidArgument, "request_id 'used' is in use"),
    ],
)
def test_a_request_that_cannot_run_is_refused_and_leaves_no_trace(options, error, message):
    scheduler = make(max_blocks=4, max_num_seqs=3, max_model_len=20)
    used = add(scheduler, "used", 2, max_tokens=2)
    with pytest.raises(error, match=message) as caught:
        add(scheduler, **{"name": "x", **options})
    assert type(caught.value) is error
    assert scheduler.requests == {"used": used} and scheduler.num_waiting == 1
    scheduler.check_integrity()
    drain(scheduler)
    assert used.sequences[0].output_ids == expected(used)


@pytest.mark.parametrize(
    "prompt, max_tokens, n", [(16, 1, 1), (4, 13, 1), (1, 16, 1), (5, 4, 3), (6, 3, 3), (8, 5, 2), (19, 1, 1)]
)
def test_a_request_that_just_fits_is_taken_and_completes(prompt, max_tokens, n):
    scheduler = make(max_blocks=5 if prompt == 19 else 4, max_num_seqs=3, max_model_len=20, max_batch_tokens=8)
    request = add(scheduler, "a", prompt, max_tokens=max_tokens, n=n)
    drain(scheduler)
    assert [seq.output_ids for seq in request.sequences] == [expected(request, i) for i in range(n)]


def test_a_request_that_just_fits_completes_while_others_compete():
    scheduler = make(max_blocks=4)
    requests = [add(scheduler, name, 4, max_tokens=13) for name in "abc"]
    drain(scheduler)
    for request in requests:
        assert request.sequences[0].output_ids == expected(request)


def test_a_full_queue_refuses_until_someone_is_admitted():
    scheduler = make(max_queue=2)
    add(scheduler, "a", 3, n=3)
    add(scheduler, "b", 3)
    with pytest.raises(QueueFull, match="max_queue is 2"):
        add(scheduler, "c", 3)
    assert scheduler.num_waiting == 2 and "c" not in scheduler.requests
    step(scheduler)
    add(scheduler, "c", 3)
    drain(scheduler)


def test_a_request_id_can_be_used_again_once_finished():
    scheduler = make()
    add(scheduler, "a", 3, max_tokens=1)
    drain(scheduler)
    again = add(scheduler, "a", 3, max_tokens=2)
    drain(scheduler)
    assert again.sequences[0].output_ids == expected(again)


# -- failed steps


def test_after_a_rollback_all_wait_again_in_order_and_complete_correctly():
    scheduler = make()
    requests = [add(scheduler, name, 5, max_tokens=4) for name in "abc"]
    step(scheduler), step(scheduler)
    outputs = [list(request.sequences[0].output_ids) for request in requests]
    scheduler.rollback(scheduler.schedule())
    scheduler.check_integrity()
    assert (scheduler.num_waiting, scheduler.num_running) == (3, 0)
    assert scheduler.stats()["blocks_in_use"] == [0]
    assert scheduler.stats()["preemptions"] == 0
    assert [request.sequences[0].output_ids for request in requests] == outputs
    assert step(scheduler) == [(name, 0, 7) for name in "abc"]
    drain(scheduler)
    for request in requests:
        assert request.sequences[0].output_ids == expected(request)


def test_a_rollback_unpublishes_what_the_step_was_to_fill():
    scheduler = make(prefix_cache=True)
    prompt = list(range(9))
    requests = [add(scheduler, name, prompt) for name in "ab"]
    plan = scheduler.schedule()
    assert rows(scheduler, plan) == [("b", 8, 1), ("a", 0, 9)]  # b reads what a writes in the same step
    scheduler.rollback(plan)
    scheduler.check_integrity()
    assert rows(scheduler, plan := scheduler.schedule()) == [("b", 8, 1), ("a", 0, 9)]  # a finds nothing
    commit(scheduler, plan)
    drain(scheduler)
    for request in requests:
        assert request.sequences[0].output_ids == expected(request)


def test_a_rollback_keeps_what_earlier_steps_published():
    scheduler = make(prefix_cache=True, max_batch_tokens=8)
    add(scheduler, "a", 20)
    step(scheduler)
    plan = scheduler.schedule()
    assert rows(scheduler, plan) == [("a", 8, 8)]
    scheduler.rollback(plan)
    assert step(scheduler) == [("a", 8, 8)]  # from the cache again
    drain(scheduler)


def test_completions_forked_by_a_failed_step_remain_and_are_correct():
    scheduler = make()
    request = add(scheduler, "a", 6, n=3, max_tokens=3)
    scheduler.rollback(scheduler.schedule())
    scheduler.check_integrity()
    assert scheduler.num_waiting == 3
    drain(scheduler)
    assert [seq.output_ids for seq in request.sequences] == [expected(request, i) for i in range(3)]


def test_a_plan_that_was_never_run_is_taken_back_by_the_next_schedule():
    scheduler = make(prefix_cache=True)
    request = add(scheduler, "a", 9)
    lost = scheduler.schedule()
    plan = scheduler.schedule()
    assert rows(scheduler, plan) == [("a", 0, 9)]
    with pytest.raises(AssertionError, match="not the plan"):
        scheduler.commit(lost, {0: [1]})
    commit(scheduler, plan)
    drain(scheduler)
    assert request.sequences[0].output_ids == expected(request)


def test_only_the_named_sequences_run():
    scheduler = make()
    requests = [add(scheduler, name, 3) for name in "abc"]
    for only, ran in (({1}, "b"), ({0, 2}, "ac"), (set(), ""), (None, "abc")):
        plan = scheduler.schedule(only)
        found = rows(scheduler, plan) if plan is not None else []
        assert "".join(sorted(name for name, _, _ in found)) == ran
        if plan is not None:
            commit(scheduler, plan)
    drain(scheduler)
    for request in requests:
        assert request.sequences[0].output_ids == expected(request)


def test_the_named_sequences_take_blocks_from_those_that_rank_higher():
    scheduler = make(max_blocks=4)
    first = add(scheduler, "a", 12)
    step(scheduler)
    add(scheduler, "b", 12)
    plan = scheduler.schedule({1})
    assert rows(scheduler, plan) == [("b", 0, 12)]
    commit(scheduler, plan)
    assert first.sequences[0].num_preemptions == 1
    drain(scheduler)
    assert first.sequences[0].output_ids == expected(first)


# -- abort


def drive_to(scheduler, point) -> None:
    """Bring request "x" (and "y" beside it) to the point at which it is to be aborted."""
    if point == "preempted":
        commit(scheduler, scheduler.schedule({0}))
        add(scheduler, "high", 6, max_tokens=1, n=4, priority=-1)
        step(scheduler)
        assert scheduler.sequence(0).num_preemptions == 1
        assert scheduler.sequence(0).status is SequenceStatus.WAITING
    steps = {"waiting": 0, "between chunks": 1, "decoding": 4, "rolled back": 3}.get(point, 0)
    for _ in range(steps):
        step(scheduler)
    if point == "rolled back":
        scheduler.rollback(scheduler.schedule())


POINTS = ["waiting", "between chunks", "decoding", "rolled back", "preempted"]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("point", POINTS)
def test_abort_ends_every_completion_and_frees_all_wherever_it_comes(point, n):
    scheduler = make(max_batch_tokens=8, max_num_seqs=4, policy="priority")
    request = add(scheduler, "x", 14, n=n, max_tokens=8)
    other = add(scheduler, "y", 5, max_tokens=8)
    drive_to(scheduler, point)
    assert scheduler.abort("x") is True
    scheduler.check_integrity()
    assert request.finished and len(request.sequences) == n
    assert {seq.finish_reason for seq in request.sequences} == {"abort"}
    assert scheduler.is_request_finished("x") and "x" not in scheduler.requests
    assert scheduler.abort("x") is False
    assert all(name != "x" for chunk in drain(scheduler) for name, _, _ in chunk)
    assert other.sequences[0].output_ids == expected(other)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("end", ["commit", "rollback", "neither"])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4])
def test_abort_while_a_step_is_under_way(steps, end, n):
    scheduler = make(max_batch_tokens=8, max_num_seqs=4, prefix_cache=True)
    request = add(scheduler, "x", 14, n=n, max_tokens=8)
    other = add(scheduler, "y", 5, max_tokens=8)
    for _ in range(steps):
        step(scheduler)
    plan = scheduler.schedule()
    assert 0 in plan.seq_ids
    outputs = [seq.num_output for seq in request.sequences]
    assert scheduler.abort("x") is True
    scheduler.check_integrity()
    if end == "commit":
        got = scheduler.commit(plan, {i: [sample(scheduler.sequence(i).token_ids)] for _, i in plan.samples})
        assert all(seq.request is other for seq in got)
    elif end == "rollback":
        scheduler.rollback(plan)
    scheduler.check_integrity()
    assert [seq.num_output for seq in request.sequences][: len(outputs)] == outputs
    assert len(request.sequences) == n and {seq.finish_reason for seq in request.sequences} == {"abort"}
    assert all(name != "x" for chunk in drain(scheduler) for name, _, _ in chunk)
    assert other.sequences[0].output_ids == expected(other)


def test_aborting_an_unknown_or_finished_request_does_nothing():
    scheduler = make()
    request = add(scheduler, "a", 3, max_tokens=1)
    assert scheduler.abort("b") is False
    drain(scheduler)
    assert scheduler.abort("a") is False
    scheduler.finish(0, "abort")
    assert request.sequences[0].finish_reason == "length"


def test_abort_after_some_completions_ended_keeps_their_reasons():
    scheduler = make()
    request = add(scheduler, "a", 3, n=3)
    step(scheduler)
    scheduler.finish(1, "stop", "a stop string")
    scheduler.abort("a")
    assert [seq.finish_reason for seq in request.sequences] == ["abort", "stop", "abort"]
    assert request.sequences[1].stop_reason == "a stop string"


def test_a_sequence_is_found_until_the_schedule_after_its_end():
    scheduler = make()
    request = add(scheduler, "a", 3, max_tokens=1)
    step(scheduler)
    assert scheduler.sequence(0) is request.sequences[0]
    scheduler.schedule()
    with pytest.raises(KeyError):
        scheduler.sequence(0)


def test_a_sequence_whose_sample_failed_gets_no_token():
    scheduler = make()
    failed, other = add(scheduler, "a", 3), add(scheduler, "b", 3)
    plan = scheduler.schedule()
    got = scheduler.commit(plan, {1: [7]})
    assert [seq.seq_id for seq in got] == [1]
    assert (failed.sequences[0].output_ids, other.sequences[0].output_ids) == ([], [7])
    scheduler.finish(0, "error")
    scheduler.check_integrity()
    assert failed.finished and failed.sequences[0].finish_reason == "error"
    drain(scheduler)


# -- deadlines


def test_a_request_is_named_from_its_deadline_on_until_it_ends():
    scheduler = make()
    late = add(scheduler, "late", 3, deadline=20.0)
    soon = add(scheduler, "soon", 3, deadline=10.0)
    add(scheduler, "never", 3)
    assert scheduler.expired(9.9) == []
    assert scheduler.expired(10.0) == [soon]
    assert scheduler.expired(30.0) == [soon, late]
    step(scheduler)  # it goes on until ended
    assert scheduler.expired(30.0) == [soon, late]
    scheduler.abort("soon")
    assert scheduler.expired(30.0) == [late]
    drain(scheduler)
    assert scheduler.expired(1e9) == []


def test_the_deadline_of_an_ended_request_does_not_hit_another_with_its_id():
    scheduler = make()
    add(scheduler, "a", 3, deadline=10.0)
    scheduler.abort("a")
    again = add(scheduler, "a", 3, deadline=50.0)
    assert scheduler.expired(20.0) == []
    assert scheduler.expired(50.0) == [again]


def test_equal_deadlines_come_in_order_of_arrival():
    scheduler = make()
    requests = [add(scheduler, name, 3, deadline=5.0) for name in "abc"]
    assert scheduler.expired(5.0) == requests


# -- what ends a completion


EOS, STOP = 6, 5


@pytest.mark.parametrize(
    "tokens, options, expected_end",
    [
        ([1, EOS, 2], {}, ([1, EOS], "stop", None)),
        ([1, STOP, 2], {}, ([1, STOP], "stop", STOP)),
        ([EOS], {}, ([EOS], "stop", None)),
        ([1, 2, 3, 4, 9], {}, ([1, 2, 3, 4], "length", None)),
        ([1, 2, 3, EOS], {}, ([1, 2, 3, EOS], "stop", None)),  # ended by EOS, not by max_tokens
        ([EOS, STOP, 3, 4], dict(min_tokens=3), ([EOS, STOP, 3, 4], "length", None)),
        ([EOS, 2, STOP, 4], dict(min_tokens=3), ([EOS, 2, STOP], "stop", STOP)),
        ([1, EOS, 3, 4], dict(eos_token_ids=frozenset()), ([1, EOS, 3, 4], "length", None)),
        ([1, 8, 2], dict(eos_token_ids=frozenset([EOS, 8])), ([1, 8], "stop", None)),
        ([1, EOS], dict(stop_token_ids=frozenset([EOS])), ([1, EOS], "stop", None)),
        ([1, 2], dict(max_tokens=1), ([1], "length", None)),
        ([1, EOS], dict(max_tokens=1, min_tokens=1), ([1], "length", None)),
    ],
)
def test_finish_rules(tokens, options, expected_end):
    defaults = dict(max_tokens=4, eos_token_ids=frozenset([EOS]), stop_token_ids=frozenset([STOP]))
    request = Request(request_id="a", prompt_token_ids=[1, 2, EOS, STOP], **{**defaults, **options})
    assert run_tokens(request, tokens) == expected_end
    assert request.finished


def test_max_model_len_ends_a_completion():
    request = Request(request_id="a", prompt_token_ids=[1] * 7, max_tokens=100, min_tokens=50)
    assert run_tokens(request, range(20), max_model_len=10) == ([0, 1, 2], "length", None)


# -- looking in


def test_stats_tell_what_waits_runs_and_is_in_use():
    scheduler = make(max_num_seqs=2, max_blocks=9)
    for name in "abc":
        add(scheduler, name, 7, max_tokens=3)
    empty = dict(prefix_hit_tokens=0, prefix_queried_tokens=0, preemptions=0, blocks_total=[9])
    empty |= dict(slots_in_use=0, slots_peak=0, slots_total=0)  # the model keeps no state
    empty |= dict(draft_tokens=0, accepted_tokens=0, forced_tokens=0, overtakes=0)
    empty |= dict(host_hit_tokens=0, disk_hit_tokens=0, swaps_out=0, swaps_in=0)
    assert scheduler.stats() == dict(waiting=3, running=0, blocks_in_use=[0], blocks_peak=[0], **empty)
    step(scheduler)
    assert scheduler.stats() == dict(waiting=1, running=2, blocks_in_use=[4], blocks_peak=[4], **empty)
    assert (scheduler.num_waiting, scheduler.num_running) == (1, 2)
    drain(scheduler)
    assert scheduler.stats() == dict(waiting=0, running=0, blocks_in_use=[0], blocks_peak=[6], **empty)
    scheduler.reset_stats()
    assert scheduler.stats()["blocks_peak"] == [0]


def test_reset_stats_starts_the_counters_anew():
    scheduler = make(max_num_seqs=1, policy="priority", prefix_cache=True)
    add(scheduler, "a", 9, priority=1)
    step(scheduler)
    add(scheduler, "b", 9, priority=0)
    step(scheduler)
    stats = scheduler.stats()
    assert (stats["preemptions"], stats["prefix_queried_tokens"]) == (1, 18)
    scheduler.reset_stats()
    stats = scheduler.stats()
    assert (stats["preemptions"], stats["prefix_queried_tokens"], stats["blocks_peak"]) == (0, 0, [3])


def test_first_scheduled_is_set_once_when_a_request_first_runs():
    scheduler = make(max_num_seqs=1)
    first, second = add(scheduler, "a", 3, max_tokens=2), add(scheduler, "b", 3, max_tokens=2)
    step(scheduler)
    at = first.first_scheduled
    assert at is not None and second.first_scheduled is None
    scheduler.rollback(scheduler.schedule())
    step(scheduler)
    assert first.first_scheduled == at


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda s: s._tables.pools[0].refs.__setitem__(s.sequence(0).block_tables[0][0], 2),
        lambda s: s.sequence(0).block_tables[0].pop(),
        lambda s: s.sequence(0).block_tables[0].__setitem__(0, -1),
        lambda s: s.sequence(1).block_tables.__setitem__(0, list(s.sequence(0).block_tables[0])),
        lambda s: s._queues.running.reverse(),
        lambda s: s._queues.running.pop(),
        lambda s: setattr(s._queues, "seats_used", 3),
        lambda s: s.requests.pop("a"),
    ],
)
def test_integrity_catches_corrupted_state(corrupt):
    scheduler = make()
    add(scheduler, "a", 6), add(scheduler, "b", 6)
    step(scheduler)
    scheduler.check_integrity()
    corrupt(scheduler)
    with pytest.raises(AssertionError):
        scheduler.check_integrity()
