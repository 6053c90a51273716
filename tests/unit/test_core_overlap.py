"""Plans made while the step before them runs: tokens nobody knows yet, rows for nothing, failures found late."""

import pytest
from scheduling import add, expected, make, sample

from hf_paged.core.request import SequenceStatus


class Device:
    """Steps on their way: `launch` plans the next one, `read` tells the scheduler what the oldest sampled."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.steps = []
        self.truth = {}  # seq_id -> all its tokens, known to the scheduler or not

    def launch(self):
        plan = self.scheduler.schedule()
        if plan is None:
            return None
        self.scheduler.check_integrity()
        self.scheduler.launched(plan)
        self.scheduler.check_integrity()
        places = self.steps[-1][1] if self.steps else []
        tokens = []
        for row, seq_id in plan.samples:
            seq = self.scheduler.sequence(seq_id)
            history = self.truth.setdefault(seq_id, list(seq.token_ids))
            token = plan.token_ids[row]
            assert history[-1] == (token if token >= 0 else places[-1 - token])
            tokens.append(sample(history, seq.index))
            history.append(tokens[-1])
        self.steps.append((plan, tokens))
        return plan

    def read(self):
        plan, tokens = self.steps.pop(0)
        got = self.scheduler.commit(plan, {seq_id: [token] for (_, seq_id), token in zip(plan.samples, tokens)})
        self.scheduler.check_integrity()
        return [seq.seq_id for seq in got]

    def run(self):
        """To the end, every step read after the next one was launched. Returns the plans."""
        plans = []
        while self.scheduler.has_unfinished():
            plan = self.launch() if len(self.steps) < 2 else None
            if plan is not None:
                plans.append(plan)
            if self.steps and (plan is None or len(self.steps) > 1):
                self.read()
            assert len(plans) < 500, "it does not come to an end"
        return plans


def test_the_next_plan_names_the_tokens_of_the_last_by_their_place():
    scheduler = make()
    first, second = add(scheduler, "a", 5, max_tokens=4), add(scheduler, "b", 3, max_tokens=4, n=2)
    device = Device(scheduler)
    device.launch()
    plan = device.launch()
    assert plan.token_ids == [-1, -2, -3] and plan.num_context == [5, 3, 3] and plan.num_new == [1, 1, 1]
    assert [seq.output_ids for request in (first, second) for seq in request.sequences] == [[], [], []]
    device.read()
    device.read()
    device.run()
    assert first.sequences[0].output_ids == expected(first)
    assert [seq.output_ids for seq in second.sequences] == [expected(second, 0), expected(second, 1)]


def test_known_and_unknown_tokens_share_a_plan():
    scheduler = make(max_batch_tokens=8)
    add(scheduler, "a", 4)
    device = Device(scheduler)
    device.launch()
    late = add(scheduler, "b", 10)
    plan = device.launch()
    assert plan.token_ids == [-1, *late.prompt_token_ids[:7]]
    device.run()
    assert late.sequences[0].output_ids == expected(late)


@pytest.mark.parametrize("limit", [dict(max_tokens=3), dict(max_tokens=50)])
def test_no_row_is_planned_beyond_a_length_known_ahead(limit):
    scheduler = make(max_model_len=8)
    request = add(scheduler, "a", 5, **limit)
    plans = Device(scheduler).run()
    assert [plan.num_tokens for plan in plans] == [5, 1, 1]
    assert request.sequences[0].finish_reason == "length" and request.sequences[0].num_output == 3


@pytest.mark.parametrize("reason", ["stop", "aborted"])
def test_who_ended_unforeseen_has_one_row_for_nothing(reason):
    scheduler = make()
    ends, other = add(scheduler, "a", 5, max_tokens=9), add(scheduler, "b", 5, max_tokens=9)
    if reason == "stop":
        ends.eos_token_ids = frozenset([expected(ends)[1]])
    device = Device(scheduler)
    device.launch()
    device.launch()
    device.read()
    if reason == "aborted":
        scheduler.abort("a")
    in_vain = device.launch()
    device.read()
    assert ends.finished and ends.sequences[0].seq_id in in_vain.seq_ids or reason == "aborted"
    assert ends.sequences[0].num_output == (2 if reason == "stop" else 1)
    assert ends.sequences[0].num_unknown == 0
    after = device.launch()
    assert ends.sequences[0].seq_id not in after.seq_ids
    assert ends.sequences[0].seq_id not in device.read()
    device.run()
    assert other.sequences[0].output_ids == expected(other)
    assert scheduler.stats()["blocks_in_use"] == [0]


def test_a_block_is_published_when_its_last_token_becomes_known():
    scheduler = make(prefix_cache=True, block_size=4)
    request = add(scheduler, "a", 6, max_tokens=8)
    history = request.prompt_token_ids + expected(request)
    device = Device(scheduler)

    def hit(num_tokens):
        """Tokens of the history that a newcomer would find."""
        probe = add(scheduler, "probe", history[:num_tokens] + [5], max_tokens=1)
        keys = scheduler._tables.longest_hit(probe.sequences[0])
        scheduler.abort("probe")
        return keys * 4

    device.launch()  # the prompt, whose second block lacks two tokens
    device.launch()  # the first of them is computed, then
    assert hit(8) == 4
    device.read()
    device.launch()  # the second of them: it fills the block, but is not known
    assert hit(8) == 4
    device.read()
    assert hit(8) == 8
    device.run()
    assert request.sequences[0].output_ids == expected(request)


def test_a_failing_step_takes_back_the_block_published_for_it():
    scheduler = make(prefix_cache=True, block_size=4)
    request = add(scheduler, "a", 7, max_tokens=6)
    device = Device(scheduler)
    device.launch()
    device.launch()  # computes the unknown eighth token
    device.read()
    assert scheduler._tables.pools[0].num_published == 2
    plan, _ = device.steps.pop()
    scheduler.rollback(plan)
    scheduler.check_integrity()
    assert scheduler._tables.pools[0].num_published == 1
    device.truth = {seq_id: tokens[:-1] for seq_id, tokens in device.truth.items()}
    device.run()
    assert request.sequences[0].output_ids == expected(request)


def test_a_launch_that_fails_leaves_the_step_before_it_to_be_read():
    scheduler = make()
    requests = [add(scheduler, name, 5) for name in "ab"]
    device = Device(scheduler)
    device.launch()
    plan = scheduler.schedule()
    scheduler.rollback(plan)
    scheduler.check_integrity()
    assert all(request.sequences[0].status is SequenceStatus.WAITING for request in requests)
    assert scheduler.schedule() is None  # nobody can be recomputed without the token that is on its way
    assert len(device.read()) == 2
    assert [request.sequences[0].num_output for request in requests] == [1, 1]
    device.run()
    assert [request.sequences[0].output_ids for request in requests] == [expected(request) for request in requests]


def test_a_step_found_to_have_failed_takes_the_next_one_with_it():
    scheduler = make()
    requests = [add(scheduler, name, 5, n=2) for name in "ab"]
    device = Device(scheduler)
    device.launch()
    device.launch()
    with pytest.raises(AssertionError, match="newest"):
        scheduler.rollback(device.steps[0][0])
    for plan, _ in reversed(device.steps):
        scheduler.rollback(plan)
        scheduler.check_integrity()
    device.steps.clear()
    device.truth.clear()
    assert scheduler.stats()["blocks_in_use"] == [0]
    device.run()
    for request in requests:
        assert [seq.output_ids for seq in request.sequences] == [expected(request, 0), expected(request, 1)]
        assert all(seq.num_preemptions == 0 for seq in request.sequences)


def test_whoever_is_preempted_with_an_unknown_token_waits_for_it():
    scheduler = make(max_blocks=5, block_size=4)
    requests = [add(scheduler, name, 7, max_tokens=8) for name in "ab"]
    device = Device(scheduler)
    plans = device.run()
    assert requests[1].sequences[0].num_preemptions > 0
    assert any(plan.num_tokens == 1 for plan in plans)
    assert [request.sequences[0].output_ids for request in requests] == [expected(request) for request in requests]


def test_who_only_waits_for_its_last_token_is_not_preempted():
    scheduler = make(max_blocks=5, block_size=4)
    first, last = add(scheduler, "a", 4, max_tokens=8), add(scheduler, "b", 8, max_tokens=5)
    device = Device(scheduler)
    plans = device.run()
    # when the first lacks its third block, the last has all its tokens but for the one on its way
    assert len(plans) == 8 and last.sequences[0].num_preemptions == 0
    assert [request.sequences[0].output_ids for request in (first, last)] == [expected(first), expected(last)]


def test_held_sequences_take_blocks_from_one_with_an_unknown_token():
    scheduler = make(max_blocks=3, block_size=4)
    request = add(scheduler, "a", 7, max_tokens=3)
    device = Device(scheduler)
    device.launch()
    row = scheduler.held.new("row")
    plan, _ = scheduler.held.plan([(row, [1] * 8)], release_unseen=True)
    scheduler.held.commit(plan)
    assert request.sequences[0].status is SequenceStatus.WAITING
    scheduler.held.release(row)
    assert device.launch() is None
    device.read()
    device.run()
    assert request.sequences[0].output_ids == expected(request)


def test_a_token_that_was_cut_off_takes_the_unknown_one_with_it():
    scheduler = make()
    request = add(scheduler, "a", 5, max_tokens=9)
    device = Device(scheduler)
    for _ in range(2):
        device.launch()
    device.read()
    device.launch()
    device.read()
    scheduler.cut(request.sequences[0].seq_id, 1, "stop", "a stop string")
    scheduler.check_integrity()
    assert request.sequences[0].output_ids == expected(request)[:1]
    assert (request.sequences[0].num_unknown, request.finished) == (0, True)
    device.read()
    assert scheduler.schedule() is None


def test_steps_are_committed_in_order_and_only_one_is_ahead():
    scheduler = make()
    add(scheduler, "a", 5)
    device = Device(scheduler)
    device.launch()
    device.launch()
    with pytest.raises(AssertionError, match="oldest"):
        scheduler.commit(device.steps[1][0], {})
    with pytest.raises(AssertionError, match="plan before it"):
        scheduler.schedule()
