"""Who runs first: priorities that age, fair shares of users, and cached prefixes within bounds."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import add, make

from hf_paged.base.errors import InvalidArgument
from hf_paged.core.blocks import BlockPool
from hf_paged.core.fair import MAX_ABSENT, OUTPUT_WEIGHT, FairShare
from hf_paged.core.overtaking import Overtaking
from hf_paged.core.policies import AGING_SECONDS
from hf_paged.core.request import Request, Sequence, SequenceStatus


class Clock:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self) -> int:
        return round(self.seconds * 1e9)


def run_step(scheduler) -> list[str]:
    """One step; the names of the requests that ran."""
    plan = scheduler.schedule()
    ran = [scheduler.sequence(seq_id).request.request_id for seq_id in plan.seq_ids]
    scheduler.commit(plan, {seq_id: [7] for _, seq_id in plan.samples})
    scheduler.check_integrity()
    return ran


def order_of(scheduler) -> list[str]:
    """The names of all requests in the order in which they first run."""
    first = []
    while scheduler.has_unfinished():
        first += [name for name in run_step(scheduler) if name not in first]
    return first


def prompt(prefix: int, own: int, shared: int = 12) -> list[int]:
    return [100 + prefix] * shared + [1000 + own, 1, 2]


# -- priorities that age


def test_every_thirty_seconds_of_waiting_make_up_for_one_level():
    clock = Clock()
    scheduler = make(max_num_seqs=1, policy="priority", clock=clock)
    add(scheduler, "old", 3, max_tokens=1, priority=2)
    clock.seconds = 2 * AGING_SECONDS - 1
    add(scheduler, "before", 3, max_tokens=1, priority=0)
    clock.seconds = 2 * AGING_SECONDS + 1
    add(scheduler, "after", 3, max_tokens=1, priority=0)
    assert order_of(scheduler) == ["before", "old", "after"]


def test_a_request_waits_for_newcomers_of_higher_priority_only_so_long():
    clock = Clock()
    scheduler = make(max_num_seqs=1, policy="priority", clock=clock)
    add(scheduler, "z", 3, max_tokens=1, priority=10)
    served = []
    for number in range(1000):
        add(scheduler, f"a{number}", 3, max_tokens=1, priority=0)
        clock.seconds += 1
        served += run_step(scheduler)
        if "z" in served:
            break
    assert 10 * AGING_SECONDS <= served.index("z") <= 10 * AGING_SECONDS + 2


def test_what_has_aged_is_not_pushed_out_by_what_it_came_before():
    clock = Clock()
    scheduler = make(max_num_seqs=1, policy="priority", clock=clock)
    add(scheduler, "low", 3, max_tokens=3, priority=1)
    run_step(scheduler)
    clock.seconds = AGING_SECONDS + 1
    add(scheduler, "high", 3, max_tokens=1, priority=0)
    assert order_of(scheduler) == ["low", "high"] and scheduler.stats()["preemptions"] == 0


def test_priorities_may_be_any_integers():
    scheduler = make(max_num_seqs=1, policy="priority")
    add(scheduler, "c", 3, max_tokens=1, priority=10**400)
    add(scheduler, "b", 3, max_tokens=1, priority=10**17 + 1)
    add(scheduler, "a", 3, max_tokens=1, priority=10**17)
    assert order_of(scheduler) == ["a", "b", "c"]


# -- steps of prompts that have priority


def tokens_of(scheduler) -> dict[str, int]:
    """One step; how many tokens it computed of each request."""
    plan = scheduler.schedule()
    names = [scheduler.sequence(seq_id).request.request_id for seq_id in plan.seq_ids]
    scheduler.commit(plan, {seq_id: [7] for _, seq_id in plan.samples})
    scheduler.check_integrity()
    return dict(zip(names, plan.num_new))


@pytest.mark.parametrize("policy", ["priority", "fcfs"])
def test_a_short_prompt_with_priority_does_not_wait_for_a_long_one_without(policy):
    scheduler = make(max_batch_tokens=40, policy=policy)
    add(scheduler, "short", 3, max_tokens=1, priority=0)
    add(scheduler, "long", 60, max_tokens=1, priority=1)
    first = {"short": 3, "long": 7 if policy == "priority" else 37}  # a quarter of the budget, or all of it
    assert tokens_of(scheduler) == first
    assert tokens_of(scheduler) == {"long": min(40, 60 - first["long"])}


def test_a_long_prompt_with_priority_has_its_last_step_to_itself():
    scheduler = make(max_batch_tokens=40, policy="priority")
    add(scheduler, "waits", 30, max_tokens=1, priority=1)
    add(scheduler, "first", 60, max_tokens=1, priority=0)
    assert [tokens_of(scheduler) for _ in range(3)] == [{"first": 40}, {"first": 20}, {"waits": 30}]


def test_prompts_without_priority_go_on_beside_many_short_ones_that_have_it():
    scheduler = make(max_batch_tokens=40, policy="priority")
    add(scheduler, "long", 60, max_tokens=1, priority=1)
    ran = []
    for number in range(10):
        add(scheduler, f"short{number}", 2, max_tokens=1, priority=0)
        ran.append(tokens_of(scheduler))
    assert all(step[f"short{number}"] == 2 for number, step in enumerate(ran))
    assert [step.get("long", 0) for step in ran] == [8] * 7 + [4, 0, 0]


def test_one_token_is_computed_whatever_prompt_has_priority():
    scheduler = make(max_batch_tokens=8, policy="priority")
    add(scheduler, "decodes", 3, max_tokens=4, priority=9)
    tokens_of(scheduler)
    add(scheduler, "first", 20, max_tokens=1, priority=0)
    add(scheduler, "waits", 3, max_tokens=1, priority=9)
    assert tokens_of(scheduler) == {"decodes": 1, "first": 7}


def test_equal_priorities_and_what_has_aged_share_a_step():
    clock = Clock()
    scheduler = make(max_batch_tokens=40, policy="priority", clock=clock)
    add(scheduler, "old", 9, max_tokens=1, priority=1)
    clock.seconds = AGING_SECONDS + 1
    add(scheduler, "a", 9, max_tokens=1, priority=0)
    add(scheduler, "b", 9, max_tokens=1, priority=0)
    assert tokens_of(scheduler) == {"old": 9, "a": 9, "b": 9}


# -- fair shares


def test_who_asks_for_little_does_not_wait_behind_who_asks_for_much():
    scheduler = make(max_num_seqs=1, policy="fair")
    for number in range(20):
        add(scheduler, f"big{number}", 3, max_tokens=2, user="big")
    add(scheduler, "small", 3, max_tokens=2, user="small")
    assert order_of(scheduler).index("small") == 1


def test_service_is_counted_in_tokens_and_output_counts_more():
    scheduler = make(max_num_seqs=1, policy="fair")
    for number in range(6):
        add(scheduler, f"x{number}", 40, max_tokens=1, user="long prompts")  # 42 each
        add(scheduler, f"y{number}", 2, max_tokens=3, user="short ones")  # 8 each
    order = order_of(scheduler)
    assert order[:2] == ["x0", "y0"] and order[2:7] == [f"y{number}" for number in range(1, 6)]


def test_requests_without_a_user_are_one_users():
    scheduler = make(max_num_seqs=1, policy="fair")
    for name in "abc":
        add(scheduler, name, 3, max_tokens=2)
    add(scheduler, "d", 3, max_tokens=2, user="d")
    assert order_of(scheduler) == ["a", "d", "b", "c"]


def test_nobody_saves_service_up_for_later():
    scheduler = make(max_num_seqs=1, policy="fair")
    add(scheduler, "idle", 3, max_tokens=1, user="idle")
    order_of(scheduler)
    for number in range(60):
        add(scheduler, f"a{number}", 3, max_tokens=8, user="busy")
    for _ in range(200):
        run_step(scheduler)
    for number in range(20):
        add(scheduler, f"i{number}", 3, max_tokens=8, user="idle")
    started = [name[0] for name in order_of(scheduler)]
    first = started[: started.index("i") + 12]
    assert 5 <= first.count("i") <= 8, "they take turns"


def test_who_was_served_most_gives_way_first():
    scheduler = make(block_size=2, max_blocks=10, max_num_seqs=3, policy="fair")
    add(scheduler, "a1", 4, max_tokens=12, user="much")
    run_step(scheduler)
    run_step(scheduler)
    add(scheduler, "a2", 4, max_tokens=4, user="much")
    little = add(scheduler, "b", 4, max_tokens=4, user="little")
    while not little.finished:
        run_step(scheduler)
    assert little.sequences[0].num_preemptions == 0 and scheduler.stats()["preemptions"] > 0
    order_of(scheduler)


def test_newcomers_push_nobody_out():
    scheduler = make(max_num_seqs=1, policy="fair")
    add(scheduler, "a", 3, max_tokens=6, user="much")
    run_step(scheduler)
    add(scheduler, "b", 3, max_tokens=1, user="little")
    assert order_of(scheduler) == ["a", "b"] and scheduler.stats()["preemptions"] == 0


def test_cached_tokens_cost_nothing():
    scheduler = make(max_num_seqs=1, policy="fair", prefix_cache=True)
    for number in range(3):
        add(scheduler, f"x{number}", prompt(1, number, shared=40), max_tokens=1, user="x")
        add(scheduler, f"y{number}", [number + 1] * 24, max_tokens=1, user="y")
    assert order_of(scheduler) == ["x0", "y0", "y1", "x1", "x2", "y2"]


def test_the_counters_of_the_absent_are_few():
    policy = FairShare()

    def request(number: int, **options) -> Request:
        return Request(request_id=str(number), prompt_token_ids=[1], max_tokens=1, **options)

    for number in range(3 * MAX_ABSENT):
        one = request(number, user=f"user {number}")
        policy.enter(one)
        policy.output(one, number + 1)
        policy.leave(one)
    assert len(policy._served) <= MAX_ABSENT + 1
    assert policy.order(one, 0) == (OUTPUT_WEIGHT * 3 * MAX_ABSENT, 0), "the one that owes most was kept"


def test_the_policy_tells_how_far_apart_users_are():
    scheduler = make(max_num_seqs=1, policy="fair")
    for name, user in (("a1", "a"), ("a2", "a"), ("b1", "b")):
        add(scheduler, name, 4, max_tokens=3, user=user)
    run_step(scheduler)
    stats = scheduler.stats()
    assert (stats["users"], stats["users_waiting"], stats["service_gap"]) == (2, 2, 4 + OUTPUT_WEIGHT)


# -- cached prefixes


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.integers(0, 2**32))
def test_the_next_is_always_of_the_user_served_least(seed):
    """Against a look at all of them, whoever comes, goes, is served or passed over."""
    random, policy, served, waiting, last = Random(seed), FairShare(), Counter(), [], ""
    for number in range(300):
        what = random.choice(["come", "come", "go", "serve", "walk"])
        if what == "come":
            user = f"u{random.randint(0, 9)}"
            one = Request(request_id=str(number), prompt_token_ids=[1], max_tokens=1, user=user)
            if all(other.request.user != user for other in waiting):
                floor = min((served[other.request.user] for other in waiting), default=served[last])
                served[user] = max(served[user], floor)
            policy.enter(one)
            waiting.append(Sequence(number, one, 0, policy.order(one, number), 1))
            policy.wait(waiting[-1])
        elif what == "go" and waiting:
            gone = waiting.pop(random.randrange(len(waiting)))
            last = gone.request.user
            policy.remove(gone)
        elif what == "serve" and waiting:
            one, count = random.choice(waiting).request, random.randint(1, 9)
            policy.output(one, count)
            served[one.user] += OUTPUT_WEIGHT * count
        elif what == "walk":
            walk, left = policy.walk(), list(waiting)
            for _ in range(random.randint(1, 12)):
                head = walk.head()
                assert (head is None) == (not left)
                if head is None:
                    break
                least = min(served[other.request.user] for other in left)
                of_user = [other for other in left if other.request.user == head.request.user]
                assert served[head.request.user] == least == head.order[0] and head is min(of_user, key=by_order_of_coming)
                left.remove(head)
                if random.random() < 0.5:
                    walk.pass_over(head)
                else:
                    waiting.remove(head)
                    last = head.request.user
                    policy.remove(head)
        policy.check_integrity()
        assert len(policy) == len(waiting)


def by_order_of_coming(sequence: Sequence) -> int:
    return sequence.seq_id


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair"])
def test_requests_that_share_a_prefix_run_together_while_it_is_cached(policy, monkeypatch):
    """The cache holds four of the eight prefixes: in turns, each is gone before it is wanted again."""

    def hits() -> tuple[int, int]:
        scheduler = make(max_num_seqs=8, policy=policy, prefix_cache=True, max_blocks=48, max_batch_tokens=64)
        for number in range(8):
            for prefix in range(8):
                add(scheduler, f"{prefix} {number}", prompt(prefix, number, shared=40), max_tokens=6)
        order_of(scheduler)
        stats = scheduler.stats()
        return stats["prefix_hit_tokens"], stats["overtakes"]

    together, overtakes = hits()
    monkeypatch.setattr(Overtaking, "choose", lambda self, step, head, before: head)
    one_by_one, none = hits()
    assert one_by_one == none == 0
    assert together >= 0.6 * 7 * 8 * 40 and overtakes > 8, (together, overtakes)


def test_of_two_cached_prefixes_the_longer_goes_first():
    scheduler = make(max_num_seqs=1, prefix_cache=True)
    add(scheduler, "x", prompt(1, 0, shared=40), max_tokens=1)
    order_of(scheduler)
    add(scheduler, "none", 30, max_tokens=1)
    add(scheduler, "short", prompt(1, 1, shared=12), max_tokens=1)
    add(scheduler, "long", prompt(1, 2, shared=20), max_tokens=1)
    assert order_of(scheduler)[0] == "long"


def test_nobody_is_overtaken_by_more_than_twice_as_many_as_run():
    scheduler = make(max_num_seqs=2, prefix_cache=True, max_batch_tokens=16)
    add(scheduler, "a0", prompt(1, 0), max_tokens=2)
    run_step(scheduler)
    add(scheduler, "z", 15, max_tokens=2)
    for number in range(1, 30):
        add(scheduler, f"a{number}", prompt(1, number), max_tokens=2)
    assert order_of(scheduler).index("z") <= 4


def test_the_first_is_not_kept_out_by_one_that_would_overtake_it_and_finds_no_seat():
    scheduler = make(max_num_seqs=2, prefix_cache=True)
    add(scheduler, "a", prompt(1, 0), max_tokens=9)
    run_step(scheduler)
    add(scheduler, "z", 15, max_tokens=1)
    add(scheduler, "b", prompt(1, 1), max_tokens=2, n=2)
    assert run_step(scheduler) == ["a", "z"]


def test_requests_of_other_priorities_and_users_are_not_overtaken():
    for policy, first, second in (("priority", {"priority": 0}, {"priority": 1}), ("fair", {"user": "u"}, {"user": "v"})):
        scheduler = make(max_num_seqs=1, policy=policy, prefix_cache=True)
        add(scheduler, "a", prompt(1, 0), max_tokens=1, **second)
        order_of(scheduler)
        add(scheduler, "z", 3, max_tokens=1, **first)
        add(scheduler, "b", prompt(1, 1), max_tokens=1, **second)
        assert order_of(scheduler) == ["z", "b"], policy


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair"])
def test_a_long_queue_is_not_looked_through_at_every_step(policy, monkeypatch):
    lookups = 0
    find = BlockPool.lookup

    def counting(pool, key):
        nonlocal lookups
        lookups += 1
        return find(pool, key)

    monkeypatch.setattr(BlockPool, "lookup", counting)

    def most_lookups(waiting: int) -> int:
        nonlocal lookups
        scheduler = make(max_num_seqs=4, policy=policy, prefix_cache=True, max_blocks=600)
        for number in range(waiting):
            add(scheduler, f"a{number}", prompt(number % 7, number), max_tokens=2, user=f"u{number % 5}")
        most = 0
        for _ in range(40):
            lookups = 0
            plan = scheduler.schedule()
            scheduler.commit(plan, {seq_id: [7] for _, seq_id in plan.samples})
            most = max(most, lookups)
        return most

    assert most_lookups(3000) <= 1.2 * most_lookups(200)


def test_an_unknown_policy_is_refused_with_those_there_are():
    with pytest.raises(InvalidArgument, match="'fcfs', 'priority', 'fair'"):
        make(policy="lottery")


def test_an_expired_deadline_is_told_of_those_that_wait_under_fair_shares():
    scheduler = make(max_num_seqs=1, policy="fair")
    add(scheduler, "a", 3, max_tokens=9, user="a")
    late = add(scheduler, "b", 3, max_tokens=9, user="b", deadline=5.0)
    run_step(scheduler)
    assert scheduler.expired(6.0) == [late]
    assert scheduler.abort("b") and late.sequences[0].status is SequenceStatus.FINISHED
    scheduler.check_integrity()
