"""Random traffic against a fake KV memory: whatever happens, every query sees its own sequence's history.

The memory records for every slot whose keys and values were last written there: the weights' version, the cache salt
and the tokens up to that position; for every state slot likewise, the tokens of the state. A plan is executed as a model
would: copies, then all writes of keys and values, then all reads; of states first all reads, then all writes. The fake
sampler's token depends on the sequence's history only, so the outputs must too.

With `overlap` the tokens of a step are told only after the next one was planned and executed, as on a device whose
results are read late; now and then a step turns out only then to have failed.
"""

import itertools
import zlib
from collections import Counter
from dataclasses import dataclass
from random import Random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_paged.base.errors import InvalidArgument, RequestTooLarge
from hf_paged.core.host_tier import HostTier
from hf_paged.core.plan import StepPlan
from hf_paged.core.request import Request, Sequence, SequenceStatus
from hf_paged.core.scheduler import GroupSpec, Scheduler

EOS, STOP, MAX_MODEL_LEN = 6, 5, 40
POISON = "left behind by a step that failed"
BASES = [[zlib.crc32(bytes([base, i])) % 5 for i in range(40)] for base in range(2)]


def sample(token_ids, index) -> int:
    """The fake model and sampler: 0 to 6, by history and completion index alone."""
    return zlib.crc32(repr((token_ids, index)).encode()) % 7


def expected_output(request: Request, index: int) -> tuple[list[int], str, int | None]:
    """What completion `index` must be, from the request alone."""
    tokens = list(request.prompt_token_ids)
    if not request.max_tokens:
        return [], "stop", None
    while True:
        tokens.append(sample(tokens, index))
        output = tokens[len(request.prompt_token_ids) :]
        if len(output) >= request.min_tokens:
            if tokens[-1] in request.eos_token_ids:
                return output, "stop", None
            if tokens[-1] in request.stop_token_ids:
                return output, "stop", tokens[-1]
        if len(output) >= request.max_tokens or len(tokens) >= MAX_MODEL_LEN:
            return output, "length", None


CHUNK = GroupSpec(chunk=6)


def lowest(kind, position: int) -> int:
    """The first position that a query at `position` sees in a group of this kind: None, a window or CHUNK."""
    if kind is CHUNK:
        return position - position % kind.chunk
    return 0 if kind is None else max(0, position - kind + 1)


@dataclass
class Launched:
    """A step that was executed, and whose tokens the scheduler does not know yet. If it `failed` it has none."""

    plan: StepPlan
    members: dict[int, Sequence]
    tokens: dict[int, list[int]]
    failed: bool

    def token(self, place: int) -> int:
        """What entry `place` of the plan's samples gives; anything, if the step failed."""
        return 0 if self.failed else self.tokens[self.plan.samples[place][1]][0]


class World:
    """A scheduler, the fake memory its plans run on, and the checks after each operation.

    `guesses`: draft tokens a step may have; some are right, some are not. `overlap`: steps stay launched for a while.
    """

    def __init__(self, windows, block_size, guesses, overlap, scheduler: Scheduler):
        self.windows, self.block_size, self.guesses, self.scheduler = windows, block_size, guesses, scheduler
        self.overlap = overlap
        self.launched: Launched | None = None
        self.histories: dict[int, list[int]] = {}  # of the current plan's sequences: all their tokens, guesses too
        self.drafts: dict[int, list[int]] = {}  # of the current plan
        self.memory = [{} for _ in windows]
        self.states = {}
        self.host_memory, self.host_states = [{} for _ in windows], {}
        self.version = 0  # of the weights
        self.stale = set()  # sequences that were running when the weights last changed
        self.requests: list[Request] = []
        self.ended_by_us = set()
        self.plan, self.members = None, {}

    # -- operations

    def add(self, spec):
        base, shared, tail, n, max_tokens, min_tokens, salt, priority, most_cached = spec
        request = Request(
            request_id=f"r{len(self.requests)}",
            prompt_token_ids=BASES[base][:shared] + tail,
            n=n,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            eos_token_ids=frozenset([EOS]),
            stop_token_ids=frozenset([STOP]),
            priority=priority,
            user=[None, "a", "b"][priority],
            cache_salt=salt,
            max_cached_tokens=most_cached,
        )
        try:
            self.scheduler.add(request)
        except (RequestTooLarge, InvalidArgument):
            return
        self.requests.append(request)

    def step(self, only=None, fail=False, fail_late=False, abort=None, lose_sample=False):
        """One step; `abort` picks a request to abort between schedule and commit.

        It may `fail` at once, or, with `overlap`, when its tokens are asked for after the next step was launched.
        """
        if only is not None:
            self.collect()
        if not self.schedule(only):
            return self.collect()
        stale = set(self.stale)  # as the plan saw it: an abort takes its sequences out
        if abort is not None:
            self.abort(abort)
        if fail:
            self.poison()
            self.scheduler.rollback(self.plan)
            self.collect()
        else:
            self.launch(stale, fail_late and self.overlap, lose_sample, wait=only is not None)
        self.check()
        return True

    def launch(self, stale, fail_late, lose_sample, wait):
        """Execute the plan, then tell the tokens of the step before it, and with `wait` its own."""
        before = self.launched
        failed = fail_late or (before is not None and before.failed)
        if failed:
            self.poison()
        else:
            self.execute(stale)
        tokens = {seq_id: self.accepted(self.members[seq_id]) for _, seq_id in self.plan.samples}
        after = Launched(self.plan, self.members, tokens, failed)
        if not self.overlap:
            return self.commit(after, lose_sample)
        self.scheduler.launched(self.plan)
        self.check()
        self.launched = after
        if before is not None and before.failed:
            self.scheduler.rollback(after.plan)
            self.scheduler.rollback(before.plan)
            self.launched = None
        elif before is not None:
            self.commit(before, lose_sample)
        if wait:
            self.collect()

    def collect(self):
        """Tell the tokens of the step that is still under way. False if there is none."""
        step, self.launched = self.launched, None
        if step is None:
            return False
        if step.failed:
            self.scheduler.rollback(step.plan)
        else:
            self.commit(step, False)
        self.check()
        return True

    def commit(self, step, lose_sample):
        tokens = dict(step.tokens)
        lost = step.plan.samples[-1][1] if lose_sample and tokens else None
        tokens.pop(lost, None)
        before = {seq_id: len(step.members[seq_id].token_ids) for seq_id in tokens}
        for seq in self.scheduler.commit(step.plan, tokens):
            if not seq.request.max_tokens:
                assert seq.finish_reason == "stop" and seq.num_computed == 0
                continue
            new = seq.token_ids[before[seq.seq_id] :]
            assert new and new == tokens[seq.seq_id][: len(new)]
            assert seq.finish_reason is not None or len(new) == len(tokens[seq.seq_id])
        if lost is not None:
            self.ended_by_us.add(lost)
            self.scheduler.finish(lost, "error")

    def schedule(self, only):
        plan = self.plan = self.scheduler.schedule(only)
        if plan is None:
            self.check()
            return False
        plan = self.plan = self.guess(plan) if self.guesses else plan
        ids = [*plan.seq_ids, *(seq_id for _, seq_id in plan.samples)]
        self.members = {seq_id: self.scheduler.sequence(seq_id) for seq_id in ids}
        self.histories = {seq_id: self.tokens_of(seq) for seq_id, seq in self.members.items()}
        for row, seq_id in plan.samples:  # a fork carries on what its leader computed
            if seq_id not in plan.seq_ids and self.owner(row) in self.stale:
                self.stale.add(seq_id)
        self.check_plan(only)
        self.check()
        return True

    def abort(self, pick):
        live = list(self.scheduler.requests)
        if live:
            request = self.scheduler.requests[live[pick % len(live)]]
            first = request.sequences[0].seq_id
            self.ended_by_us.update(range(first, first + request.n))
            assert self.scheduler.abort(request.request_id)
            assert len(request.sequences) == request.n and request.finished
            self.check()

    def finish(self, pick):
        live = [s for r in self.scheduler.requests.values() for s in r.sequences if s.finish_reason is None]
        if live:
            seq = live[pick % len(live)]
            self.ended_by_us.update(range(seq.seq_id, seq.seq_id + seq.seats))
            self.scheduler.finish(seq.seq_id, "stop", "a stop string")
            self.check()

    def change_weights(self, recompute):
        self.version += 1
        if recompute:
            self.scheduler.recompute_all()
            self.launched = None
            assert self.scheduler.num_running == 0
        else:
            self.scheduler.reset_prefix_cache()
            sequences = [s for r in self.scheduler.requests.values() for s in r.sequences]
            self.stale.update(s.seq_id for s in sequences if s.status is SequenceStatus.RUNNING)
        self.check()

    def drain(self):
        for _ in range(3000):
            if not self.scheduler.has_unfinished():
                break
            assert self.step(), "unfinished requests, but nothing to run"
        if self.launched is not None:  # rows of sequences that have ended, all of them
            assert all(seq.finish_reason is not None for seq in self.launched.members.values())
            self.scheduler.recompute_all()
            self.check()
        assert not self.scheduler.has_unfinished(), "it does not come to an end"
        assert self.scheduler.stats()["blocks_in_use"] == [0] * len(self.windows)
        assert self.scheduler.stats()["slots_in_use"] == 0
        for request in self.requests:
            assert len(request.sequences) == request.n
            for seq in request.sequences:
                if seq.seq_id not in self.ended_by_us:
                    assert (seq.output_ids, seq.finish_reason, seq.stop_reason) == expected_output(request, seq.index)

    # -- draft tokens

    def guess(self, plan):
        """The plan with guesses added, right ones and wrong ones, by history alone."""
        room, candidates = self.scheduler.draftable()
        self.drafts = {}
        for seq, most in candidates:
            chance, tokens = Random(repr(seq.token_ids)), list(seq.token_ids)
            for _ in range(min(chance.randint(0, self.guesses), most, room)):
                right = sample(tokens, seq.index)
                tokens.append(right if chance.random() < 0.7 else (right + 1) % 7)
            if len(tokens) > len(seq.token_ids):
                self.drafts[seq.seq_id] = tokens[len(seq.token_ids) :]
                room -= len(self.drafts[seq.seq_id])
        changed = self.scheduler.add_drafts(self.drafts)
        planned = dict(zip(changed.seq_ids, changed.num_drafts))
        assert set(planned) == set(plan.seq_ids) and changed.copies == plan.copies
        self.drafts = {seq_id: tokens[: planned[seq_id]] for seq_id, tokens in self.drafts.items()}  # blocks may lack
        return changed

    def accepted(self, seq):
        """What the rows of `seq` in the plan sample, up to the first that is not what was guessed."""
        drafts = self.drafts.get(seq.seq_id, [])
        tokens = self.history(seq)[: len(self.history(seq)) - len(drafts)]
        num_known = len(tokens)
        for guess in [*drafts, None]:
            tokens.append(sample(tokens, seq.index))
            if tokens[-1] != guess:
                return tokens[num_known:]

    def tokens_of(self, seq):
        """Its tokens, the one the scheduler does not know yet and guesses of this step included."""
        unknown = [self.launched.tokens[seq.seq_id][0]] if seq.num_unknown else []
        return seq.token_ids + unknown + self.drafts.get(seq.seq_id, [])

    def history(self, seq):
        """`tokens_of` when the current plan was made."""
        return self.histories[seq.seq_id]

    # -- the fake model

    def content(self, seq, position):
        return self.version, seq.request.cache_salt, tuple(self.history(seq)[: position + 1])

    def rows(self):
        plan = self.plan
        for row, (seq_id, new, context) in enumerate(zip(plan.seq_ids, plan.num_new, plan.num_context)):
            yield row, self.members[seq_id], context, context + new

    def owner(self, packed_row):
        """The sequence whose logits are in a packed row."""
        for seq_id, new in zip(self.plan.seq_ids, self.plan.num_new):
            packed_row -= new
            if packed_row < 0:
                return seq_id
        raise AssertionError("a row beyond the plan")

    def slot(self, group, row, position):
        return self.plan.block_tables[group][row][position // self.block_size], position % self.block_size

    def move(self):
        """What the plan moves to and from host memory, a whole block at a time; all that leaves before all that comes."""
        moves = self.plan.moves
        if moves is None:
            return
        for group, (out, back) in enumerate(zip(moves.out, moves.back)):
            device, host = self.memory[group], self.host_memory[group]
            filled, read = [slot for _, slot in out], [slot for slot, _ in back]
            assert len(set(filled)) == len(filled) and all(0 <= slot < moves.num_slots[group] for slot in filled + read)
            assert len({block for _, block in back}) == len(back)
            leaving = [[device.get((block, offset)) for offset in range(self.block_size)] for block, _ in out]
            host.update(zip(filled, leaving))
            for slot, block in back:
                assert block < self.plan.num_blocks[group]
                device.update({(block, offset): content for offset, content in enumerate(host[slot])})
        self.host_states.update([(slot, self.states[state]) for state, slot in moves.states_out])
        self.states.update([(state, self.host_states[slot]) for slot, state in moves.states_back])

    def copy(self):
        self.move()
        for group, copies in enumerate(self.plan.copies):
            sources, destinations = {s for s, _ in copies}, [d for _, d in copies]
            assert len(set(destinations)) == len(destinations) and not sources & set(destinations)
            for source, destination in copies:
                for offset in range(self.block_size):
                    self.memory[group][destination, offset] = self.memory[group].get((source, offset))

    def poison(self):
        self.copy()
        for group in range(len(self.windows)):
            for row, _, begin, end in self.rows():
                for position in range(begin, end):
                    self.memory[group][self.slot(group, row, position)] = POISON
        self.states.update((write, POISON) for _, write in self.plan.states)

    def execute(self, stale):
        self.copy()
        for group in range(len(self.windows)):
            written = set()
            for row, seq, begin, end in self.rows():
                for position in range(begin, end):
                    slot = self.slot(group, row, position)
                    assert 0 <= slot[0] < self.plan.num_blocks[group], "a block beyond the tensors"
                    assert slot not in written, "two sequences write one slot"
                    written.add(slot)
                    self.memory[group][slot] = self.content(seq, position)
        for group, kind in enumerate(self.windows):
            for row, seq, begin, end in self.rows():
                for position in range(lowest(kind, begin), end):
                    block, offset = self.slot(group, row, position)
                    assert block >= 0, "a block was given back too early"
                    found, wanted = self.memory[group].get((block, offset)), self.content(seq, position)
                    if seq.seq_id in stale:
                        found, wanted = found[1:], wanted[1:]
                    assert found == wanted, f"{seq} sees other tokens at {position} in group {group}"
        self.execute_states(stale)

    def execute_states(self, stale):
        plan = self.plan
        assert len(plan.states) == (len(plan.seq_ids) if self.scheduler.has_state else 0)
        writes = [write for _, write in plan.states]
        assert len(set(writes)) == len(writes), "two sequences write one state"
        assert all(0 <= write < plan.num_slots for write in writes), "a slot beyond the tensors"
        for (read, _), (_, seq, begin, _) in zip(plan.states, self.rows()):
            assert (read == -1) == (begin == 0), "only a sequence at its start has an empty state"
            if begin:
                found, wanted = self.states.get(read), self.content(seq, begin - 1)
                if seq.seq_id in stale:
                    found, wanted = found[1:], wanted[1:]
                assert found == wanted, f"{seq} goes on from the state of other tokens"
        for write, (_, seq, _, end) in zip(writes, self.rows()):
            self.states[write] = self.content(seq, end - 1)

    # -- checks

    def check(self):
        self.scheduler.check_integrity()
        sequences = {s.seq_id: s for r in self.scheduler.requests.values() for s in r.sequences}
        self.stale = {i for i in self.stale if i in sequences and sequences[i].status is SequenceStatus.RUNNING}

    def check_plan(self, only):
        plan, scheduler = self.plan, self.scheduler
        assert 0 < plan.num_tokens == sum(plan.num_new)
        over = max(plan.num_new) if scheduler.whole_prompts else 0  # the last prompt admitted may exceed the budget
        assert plan.num_tokens <= max(scheduler.max_batch_tokens, scheduler.max_batch_tokens - 1 + over)
        assert len(set(plan.seq_ids)) == len(plan.seq_ids)
        assert scheduler.num_running <= scheduler.max_num_seqs
        assert only is None or set(plan.seq_ids) <= only
        assert plan.num_new == [n for n in plan.num_new if n == 1] + [n for n in plan.num_new if n > 1]
        packed = []
        known = [token if token >= 0 else self.launched.token(-1 - token) for token in plan.token_ids]
        failed = self.launched is not None and self.launched.failed  # what it sampled is anything
        for row, seq, begin, end in self.rows():
            assert not scheduler.whole_prompts or begin >= seq.num_prompt or (begin, end) == (0, seq.num_prompt)
            packed += self.history(seq)[begin:end]
            is_due = end == len(self.history(seq)) and seq.request.max_tokens > 0
            assert (seq.seq_id in {i for _, i in plan.samples}) == is_due
            assert begin > 0 or seq.num_cached_tokens <= (seq.request.max_cached_tokens or 99)
            for tables in plan.block_tables:
                assert len(tables[row]) == -(-end // self.block_size)
        assert failed or packed == known
        sampled = {}
        for row, seq_id in plan.samples:
            assert self.members[self.owner(row)].request is self.members[seq_id].request
            sampled.setdefault(seq_id, []).append(known[row])
        for seq_id, tokens in sampled.items():
            assert failed or tokens == self.histories[seq_id][-1 - len(self.drafts.get(seq_id, [])) :]


SPECS = st.tuples(
    st.integers(0, 1),  # which base
    st.integers(0, 30),  # tokens shared with others of that base
    st.lists(st.integers(0, 4), min_size=1, max_size=5),
    st.sampled_from([1, 1, 1, 2, 3, 4]),  # n
    st.integers(0, 14),  # max_tokens
    st.sampled_from([0, 0, 6]),  # min_tokens
    st.sampled_from([None, None, None, "salt", b"salt"]),
    st.integers(0, 2),  # priority
    st.sampled_from([None, None, None, 0, 7]),  # max_cached_tokens
)
PICK = st.integers(0, 9)
OPERATIONS = st.one_of(
    st.tuples(st.just("add"), SPECS),
    st.tuples(st.just("add"), SPECS),
    st.tuples(st.just("steps"), st.integers(1, 6)),
    st.tuples(st.just("steps"), st.integers(1, 3)),
    st.tuples(st.just("fail"), PICK),
    st.tuples(st.just("fail_late"), PICK),
    st.tuples(st.just("abort"), PICK),
    st.tuples(st.just("abort_in_step"), PICK),
    st.tuples(st.just("abort_in_failing_step"), PICK),
    st.tuples(st.just("lose_sample"), PICK),
    st.tuples(st.just("finish"), PICK),
    st.tuples(st.just("change_weights"), st.booleans()),
    st.tuples(st.just("interrupt"), PICK),
)
CONFIGS = st.fixed_dictionaries(
    dict(
        windows=st.sampled_from([[None], [None], [None, 3], [5], [None, 4, 9], [1], [None, CHUNK], [CHUNK, 4]]),
        max_slots=st.sampled_from([0, 0, 0, 3, 9]),
        block_size=st.sampled_from([1, 2, 4]),
        max_blocks=st.integers(4, 40),
        max_batch_tokens=st.sampled_from([1, 2, 5, 8, 16, 64]),
        max_num_seqs=st.integers(1, 6),
        prefix_cache=st.sampled_from([True, True, True, False]),
        policy=st.sampled_from(["fcfs", "priority", "fair"]),
        guesses=st.sampled_from([0, 3, 9]),
        overlap=st.booleans(),
        host_slots=st.sampled_from([None, None, 2, 8, 60]),
        swaps=st.sampled_from(["never", "always", "long"]),
    )
)


def make_world(
    windows,
    block_size,
    max_blocks,
    max_slots,
    prefix_cache,
    guesses,
    overlap,
    whole_prompts=False,
    host_slots=None,
    swaps="always",
    **limits,
) -> World:
    # smaller pools for sliding groups, so that each kind runs short now and then
    most = [max_blocks if window is None else max(2, max_blocks // 2) for window in windows]
    scheduler = Scheduler(
        groups=[kind if isinstance(kind, GroupSpec) else GroupSpec(kind) for kind in windows],
        block_size=block_size,
        num_blocks=[min(2, count) for count in most],
        max_blocks=most,
        max_model_len=MAX_MODEL_LEN,
        max_slots=max_slots,
        whole_prompts=whole_prompts,
        prefix_cache=prefix_cache and not max_slots,
        clock=itertools.count(step=12_000_000_000).__next__,  # every few requests a level of priority is worth less
        host=None if host_slots is None else host_tier(len(windows), host_slots, swaps, prefix_cache and not max_slots),
        **limits,
    )
    guesses = 0 if max_slots or overlap else guesses  # a state cannot be taken back; guesses follow known tokens
    return World(windows, block_size, guesses, overlap, scheduler)


def host_tier(num_groups: int, num_slots: int, swaps: str, keeps_prefixes: bool) -> HostTier:
    prefers = {"never": lambda *_: False, "always": lambda *_: True, "long": lambda tokens, *_: tokens > 6}
    return HostTier(
        [num_slots] * num_groups,
        max_states=min(num_slots, 4),
        prefers_copy=prefers[swaps],
        keeps_prefixes=keeps_prefixes,
    )


def apply(world: World, operation: str, argument) -> None:
    if operation == "add":
        world.add(argument)
    elif operation == "steps":
        for _ in range(argument):
            world.step()
    elif operation == "fail":  # then each half by itself, as an engine looks for the culprit
        if world.step(fail=True) and world.plan is not None:
            ids = world.plan.seq_ids
            half = set(ids[: (len(ids) + 1) // 2])
            world.step(only=half, fail=argument % 2 == 0)
            world.step(only=set(ids) - half)
    elif operation == "fail_late":
        world.step(fail_late=True)
    elif operation == "abort_in_step":
        world.step(abort=argument)
    elif operation == "abort_in_failing_step":
        world.step(abort=argument, fail=True)
    elif operation == "lose_sample":
        world.step(lose_sample=True)
    elif operation == "interrupt":  # planned, never run: the next schedule() takes it back
        world.schedule(None)
    else:
        getattr(world, operation)(argument)


@settings(max_examples=200, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(CONFIGS, st.lists(OPERATIONS, min_size=10, max_size=30))
def test_every_query_sees_its_own_history_and_everything_drains(config, operations):
    world = make_world(**config)
    for operation, argument in operations:
        apply(world, operation, argument)
    world.drain()


@settings(max_examples=350, derandomize=True, deadline=None)
@given(st.integers(0, 2**32))
def test_heavy_traffic_on_scarce_blocks(seed):
    """Longer runs than hypothesis builds from lists: many forks, preemptions and failures at once."""
    random = Random(seed)
    block_size = random.choice([1, 2, 4])
    world = make_world(
        windows=random.choice([[None], [None, 3], [5], [None, 4, 9], [1], [None, CHUNK], [CHUNK, 4]]),
        block_size=block_size,
        max_blocks=random.choice([16, 24, 32, 48, 80]) // block_size,
        max_slots=0,
        max_batch_tokens=random.choice([1, 4, 8, 16, 64]),
        max_num_seqs=random.randint(2, 7),
        prefix_cache=random.random() < 0.85,
        policy=random.choice(["fcfs", "priority", "fair"]),
        guesses=random.choice([0, 2, 5, 12]),
        overlap=random.random() < 0.5,
        host_slots=random.choice([None, 4, 16, 60]),
        swaps=random.choice(["never", "always", "long"]),
    )
    heavy_traffic(world, random)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.integers(0, 2**32))
def test_heavy_traffic_on_scarce_state_slots(seed):
    """Models with a state in every sequence, some without any keys and values."""
    random = Random(seed)
    windows = random.choice([[], [], [None], [None, 4]])
    world = make_world(
        windows=windows,
        block_size=2,
        max_blocks=random.choice([16, 32, 80]),
        max_slots=random.choice([4, 5, 8]),
        whole_prompts=4 not in windows and random.random() < 0.5,
        max_batch_tokens=random.choice([1, 4, 8, 16, 64]),
        max_num_seqs=random.randint(2, 7),
        prefix_cache=False,
        policy=random.choice(["fcfs", "priority", "fair"]),
        guesses=0,
        overlap=random.random() < 0.5,
        host_slots=random.choice([None, 4, 16, 60]),
        swaps=random.choice(["never", "always", "long"]),
    )
    heavy_traffic(world, random)


def test_long_outputs_that_push_each_other_to_host_memory():
    """Outputs that outgrow the blocks together, so that most of the preempted go on from a copy in host memory."""
    counts = Counter()
    for seed in range(150):
        random = Random(seed)
        world = crowded_world(random)
        heavy_traffic(world, random, long_spec)
        counts.update({name: world.scheduler.stats()[name] for name in ("swaps_out", "swaps_in", "host_hit_tokens")})
    assert counts["swaps_out"] > 150 and counts["swaps_in"] > 120 and counts["host_hit_tokens"] > 50, counts


def crowded_world(random: Random) -> World:
    block_size, has_state = random.choice([1, 2, 4]), random.random() < 0.25
    kinds = [[], [None], [None, 4]] if has_state else [[None], [None], [None, 3], [5], [None, CHUNK]]
    return make_world(
        windows=random.choice(kinds),
        block_size=block_size,
        max_blocks=random.choice([36, 44, 60]) // block_size,
        max_slots=random.choice([4, 5]) if has_state else 0,
        max_batch_tokens=random.choice([4, 8, 16, 64]),
        max_num_seqs=random.randint(4, 7),
        prefix_cache=random.random() < 0.8,
        policy=random.choice(["fcfs", "priority"]),
        guesses=random.choice([0, 2, 5]),
        overlap=random.random() < 0.5,
        host_slots=random.choice([12, 40, 120]),
        swaps=random.choice(["always", "always", "long"]),
    )


def heavy_traffic(world: World, random: Random, spec=None) -> None:
    names = ["steps", "fail", "abort", "abort_in_step", "abort_in_failing_step", "lose_sample", "finish"]
    names += ["fail_late", "change_weights", "interrupt"]
    for _ in range(40):
        if random.random() < 0.5:
            world.add((spec or random_spec)(random))
        name = random.choices(names, weights=[20] + [1] * 9)[0]
        apply(world, name, random.random() < 0.5 if name == "change_weights" else random.randint(1, 5))
    world.drain()


def random_spec(random: Random) -> tuple:
    return (
        random.randint(0, 1),
        random.choice([0, 3, 8, 12, 16]),
        [random.randint(0, 4) for _ in range(random.randint(1, 2))],
        random.choice([1, 1, 2, 3, 4]),
        random.randint(1, 14),
        random.choice([0, 6]),
        random.choice([None] * 6 + ["salt", b"salt"]),
        random.randint(0, 2),
        random.random() < 0.85,
    )


def long_spec(random: Random) -> tuple:
    base, shared, tail, _, _, _, *others = random_spec(random)
    return base, shared, tail, random.choice([1, 1, 1, 2]), random.choice([10, 14]), 6, *others
