"""Whatever comes, nobody starves, and users who always have something waiting are served alike."""

import itertools
import zlib
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_paged.core.fair import OUTPUT_WEIGHT, PROMPT_WEIGHT
from hf_paged.core.request import Request
from hf_paged.core.scheduler import GroupSpec, Scheduler

BLOCK_SIZE, MAX_MODEL_LEN = 4, 48
POLICIES = ["fcfs", "priority", "fair"]


def make(random: Random, policy: str, **options) -> Scheduler:
    blocks = random.choice([14, 20, 40, 200])
    return Scheduler(
        groups=[GroupSpec()],
        block_size=BLOCK_SIZE,
        num_blocks=[2],
        max_blocks=[blocks],
        max_batch_tokens=random.choice([4, 16, 64]),
        max_num_seqs=random.choice([1, 3, 8]),
        max_model_len=MAX_MODEL_LEN,
        policy=policy,
        **options,
    )


def request(number: int, random: Random, **options) -> Request:
    return Request(
        request_id=str(number),
        prompt_token_ids=[random.randint(0, 2)] * random.choice([0, 8, 16]) + [number],
        max_tokens=random.randint(1, 16),
        **options,
    )


def step(scheduler: Scheduler) -> dict[str, int]:
    """One step, with checks; the tokens that every request got."""
    plan = scheduler.schedule()
    tokens = {seq_id: [zlib.crc32(repr(scheduler.sequence(seq_id).token_ids).encode())] for _, seq_id in plan.samples}
    got = {scheduler.sequence(seq_id).request.request_id: len(new) for seq_id, new in tokens.items()}
    scheduler.commit(plan, tokens)
    scheduler.check_integrity()
    return got


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 5))
def test_users_with_a_backlog_are_served_alike(seed, num_users):
    """The bound of the Virtual Token Counter, for every two users and every span of time in which both wait."""
    random = Random(seed)
    scheduler = make(random, "fair", prefix_cache=random.random() < 0.5)
    capacity = min(scheduler.max_num_seqs * MAX_MODEL_LEN, scheduler.max_blocks[0] * BLOCK_SIZE)
    if scheduler._prefix_cache:  # blocks may be several sequences'
        capacity = scheduler.max_num_seqs * MAX_MODEL_LEN
    bound = 2 * max(PROMPT_WEIGHT * 17, OUTPUT_WEIGHT * capacity)
    users = [f"u{index}" for index in range(num_users)]
    served = dict.fromkeys(users, 0)
    spans: dict[tuple, tuple[int, int]] = {}  # of two users: the least and the most that one was ahead of the other
    numbers, started, open_ = itertools.count(), set(), {}
    eager = {user: random.random() for user in users}
    for _ in range(150):
        for user in users:
            if random.random() < eager[user]:
                one = request(next(numbers), random, user=user)
                scheduler.add(one)
                open_[one.request_id] = one
        if not scheduler.has_unfinished():
            continue
        for name, count in step(scheduler).items():
            served[open_[name].user] += OUTPUT_WEIGHT * count
        for name, one in open_.items():
            if one.first_scheduled is not None and name not in started:
                started.add(name)
                served[one.user] += PROMPT_WEIGHT * (len(one.prompt_token_ids) - one.sequences[0].num_cached_tokens)
        waiting = {one.user for one in open_.values() if not one.finished and one.first_scheduled is None}
        for pair in itertools.combinations(users, 2):
            if not waiting.issuperset(pair):
                spans.pop(pair, None)
                continue
            ahead = served[pair[0]] - served[pair[1]]
            least, most = spans.get(pair, (ahead, ahead))
            spans[pair] = least, most = min(least, ahead), max(most, ahead)
            assert most - least <= bound, f"{pair}: one got {most - least} more than the other, the bound is {bound}"


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=8, derandomize=True, deadline=None)
@given(st.integers(0, 2**32))
def test_nobody_starves(policy, seed):
    """New requests come for ever, faster than they are served, of better priority, shared prefixes and other users."""
    random = Random(seed)
    clock = itertools.count(step=1_000_000_000)  # a second passes with every request
    scheduler = make(random, policy, clock=clock.__next__)
    numbers = itertools.count()
    for _ in range(10):
        scheduler.add(request(next(numbers), random, priority=random.randint(0, 2), user="new"))
    poor = request(next(numbers), random, priority=3, user="poor")
    scheduler.add(poor)
    ahead = 10 + 3 * 30 + 2 * scheduler.max_num_seqs  # came first, of better priority, and with cached prefixes
    for _ in range(60 * ahead):
        if poor.finished:
            break
        if scheduler.num_waiting < 3 * ahead:
            user = f"new {random.randint(0, 3)}" if random.random() < 0.5 else "new"
            scheduler.add(request(next(numbers), random, priority=0, user=user))
        step(scheduler)
    assert poor.finished, "it was never served"


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.integers(0, 2**32))
def test_every_policy_gives_every_request_the_same_tokens(seed):
    def outputs(policy: str) -> list[list[int]]:
        random = Random(seed)
        scheduler = make(random, policy)
        requests = []
        for number in range(12):
            options = dict(priority=random.randint(0, 2), user=f"u{random.randint(0, 2)}", n=random.choice([1, 1, 2]))
            requests.append(request(number, random, **options))
        for one in requests:
            if one.n <= scheduler.max_num_seqs:
                scheduler.add(one)
            if random.random() < 0.5 and scheduler.has_unfinished():
                step(scheduler)
        while scheduler.has_unfinished():
            step(scheduler)
        return [seq.output_ids for one in requests for seq in one.sequences]

    first, *others = map(outputs, POLICIES)
    assert all(other == first for other in others)
