"""Spans of images in prompts: whose cached blocks they share, how they cut a prompt, what a step may have encoded."""

import random

import pytest
from scheduling import expected, sample

from hf_paged.base.errors import RequestTooLarge
from hf_paged.core.host_tier import HostTier
from hf_paged.core.media import EncoderBudget, MediaRows
from hf_paged.core.request import MediaSpan, Request
from hf_paged.core.scheduler import GroupSpec, Scheduler


def make(windows=(None,), block_size=4, max_blocks=64, encoder=None, **limits) -> Scheduler:
    defaults = dict(max_batch_tokens=64, max_num_seqs=8, max_model_len=256)
    return Scheduler(
        groups=[GroupSpec(window) for window in windows],
        block_size=block_size,
        num_blocks=[1] * len(windows),
        max_blocks=[max_blocks] * len(windows),
        encoder=encoder,
        **{**defaults, **limits},
    )


def span(start, length, key=b"one", bidirectional=False) -> MediaSpan:
    return MediaSpan(start, length, key, bidirectional)


def add(scheduler, name, num_tokens, media=(), max_tokens=2, **options) -> Request:
    tokens = list(range(num_tokens))
    request = Request(request_id=name, prompt_token_ids=tokens, max_tokens=max_tokens, media=tuple(media), **options)
    scheduler.add(request)
    return request


def step(scheduler) -> tuple[dict[str, tuple[int, int]], list[MediaRows]]:
    """(request id -> (tokens from the cache, tokens computed), the rows of media) of one step."""
    plan = scheduler.schedule()
    scheduler.check_integrity()
    names = [scheduler.sequence(seq_id).request.request_id for seq_id in plan.seq_ids]
    result = dict(zip(names, zip(plan.num_context, plan.num_new)))
    sequences = [scheduler.sequence(seq_id) for _, seq_id in plan.samples]
    scheduler.commit(plan, {s.seq_id: [sample(s.token_ids, s.index)] for s in sequences})
    scheduler.check_integrity()
    return result, plan.media


def drain(scheduler) -> None:
    for _ in range(500):
        if not scheduler.has_unfinished():
            return
        step(scheduler)
    raise AssertionError("it does not come to an end")


# -- the prefix cache


def cached(first, second, num_tokens=17, **options) -> int:
    """Tokens that a second prompt of the same tokens has from the cache."""
    scheduler = make(**options)
    add(scheduler, "first", num_tokens, first)
    drain(scheduler)
    add(scheduler, "second", num_tokens, second)
    return step(scheduler)[0]["second"][0]


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_same_image_at_the_same_place_is_shared(bidirectional):
    media = [span(6, 5, bidirectional=bidirectional)]
    assert cached(media, media) == 16


@pytest.mark.parametrize(
    "other",
    [
        [span(6, 5, b"two")],
        [],
        [span(7, 5)],
        [span(6, 4)],
        [span(6, 5, bidirectional=True)],
        [span(6, 5, b"on"), span(11, 1, b"e")],
    ],
    ids=["another image", "none", "another place", "another length", "another sight", "cut otherwise"],
)
def test_blocks_before_an_image_are_shared_and_none_from_there_on(other):
    assert cached([span(6, 5)], other) == 4
    assert cached(other, [span(6, 5)]) == 4


def test_a_second_image_separates_from_its_own_beginning():
    same, one, two = span(1, 3), span(9, 2, b"a"), span(9, 2, b"b")
    assert cached([same, one], [same, two]) == 8
    assert cached([same, one], [same, one]) == 16


def test_text_has_the_keys_it_had():
    from hf_paged.core.prefix import extend_keys

    with_media, without = [], []
    extend_keys(with_media, list(range(8)), 2, 4, "salt", 0, (span(8, 2),))
    extend_keys(without, list(range(8)), 2, 4, "salt", 0)
    assert with_media == without


# -- chunks


def test_rows_of_an_image_that_sees_backwards_only_are_cut_anywhere():
    scheduler = make(max_batch_tokens=6)
    add(scheduler, "one", 13, [span(4, 5)])
    seq_id = scheduler.requests["one"].sequences[0].seq_id
    assert step(scheduler) == ({"one": (0, 6)}, [MediaRows(seq_id, 4, 2, b"one", 0, 0)])
    assert step(scheduler) == ({"one": (6, 6)}, [MediaRows(seq_id, 0, 3, b"one", 2, 0)])
    assert step(scheduler) == ({"one": (12, 1)}, [])


def test_rows_of_a_bidirectional_image_are_computed_in_one_step_and_see_its_end():
    scheduler = make(max_batch_tokens=6)
    add(scheduler, "one", 15, [span(4, 5, bidirectional=True)])
    seq_id = scheduler.requests["one"].sequences[0].seq_id
    assert step(scheduler) == ({"one": (0, 4)}, [])
    assert step(scheduler) == ({"one": (4, 6)}, [MediaRows(seq_id, 0, 5, b"one", 0, 9)])
    assert step(scheduler) == ({"one": (10, 5)}, [])


def test_bidirectional_images_side_by_side_see_each_other():
    scheduler = make(max_batch_tokens=8)
    add(scheduler, "one", 12, [span(2, 3, b"a", True), span(5, 4, b"b", True)])
    assert step(scheduler)[0] == {"one": (0, 2)}
    plan, rows = step(scheduler)
    assert plan == {"one": (2, 8)}
    assert [(row.key, row.row, row.count, row.seen) for row in rows] == [(b"a", 0, 3, 9), (b"b", 3, 4, 9)]


def test_an_image_takes_its_turn_beside_decodes_that_leave_it_too_little_budget():
    scheduler = make(max_batch_tokens=6)
    add(scheduler, "text", 4, max_tokens=8)
    step(scheduler)
    add(scheduler, "image", 9, [span(0, 6, bidirectional=True)])
    assert step(scheduler)[0] == {"text": (4, 1), "image": (0, 6)}


def test_an_image_that_exceeds_every_step_is_refused():
    with pytest.raises(RequestTooLarge, match="max_batch_tokens"):
        add(make(max_batch_tokens=5), "one", 13, [span(4, 6, bidirectional=True)])
    add(make(max_batch_tokens=5), "one", 13, [span(4, 6)])


def test_a_hit_may_end_within_a_bidirectional_image():
    scheduler = make()
    media = [span(2, 8, bidirectional=True)]
    add(scheduler, "first", 13, media)
    drain(scheduler)
    add(scheduler, "second", 9 + 2, media)
    plan, rows = step(scheduler)
    assert plan == {"second": (8, 3)}
    assert [(row.row, row.count, row.offset, row.seen) for row in rows] == [(0, 2, 6, 10)]


# -- the encoder's budget


def test_a_step_encodes_no_more_than_its_budget():
    encoder = EncoderBudget(6, lambda key: False)
    scheduler = make(encoder=encoder, prefix_cache=False)
    add(scheduler, "one", 12, [span(1, 4, b"a"), span(6, 4, b"b")])
    add(scheduler, "two", 8, [span(0, 4, b"c")])
    add(scheduler, "text", 3)
    assert step(scheduler)[0] == {"one": (0, 6), "text": (0, 3)}
    assert step(scheduler)[0] == {"one": (6, 6), "text": (3, 1)}
    assert step(scheduler)[0] == {"one": (12, 1), "two": (0, 8)}


def test_what_is_encoded_costs_nothing_and_the_same_image_once():
    encoder = EncoderBudget(6, lambda key: key == b"known")
    scheduler = make(encoder=encoder, prefix_cache=False)
    add(scheduler, "one", 12, [span(1, 5, b"a"), span(6, 6, b"known")])
    add(scheduler, "two", 8, [span(0, 5, b"a")])
    assert step(scheduler)[0] == {"one": (0, 12), "two": (0, 8)}


def test_one_image_is_encoded_however_large():
    scheduler = make(encoder=EncoderBudget(1, lambda key: False))
    add(scheduler, "one", 12, [span(1, 5, b"a"), span(6, 5, b"b")])
    assert step(scheduler)[0] == {"one": (0, 6)}
    assert step(scheduler)[0] == {"one": (6, 6)}


def test_random_images_in_little_memory_all_end_with_their_own_tokens():
    for seed in range(60):
        rng = random.Random(seed)
        encoded: set[bytes] = set()
        encoder = EncoderBudget(rng.choice([1, 6, 64]), encoded.__contains__)
        limits = dict(max_blocks=14, max_batch_tokens=rng.choice([8, 16]), max_num_seqs=rng.choice([2, 5]))
        windows = rng.choice([(None,), (None, 6)])
        host = HostTier([20] * len(windows), max_states=0, prefers_copy=lambda *_: True, keeps_prefixes=True)
        more = dict(policy=rng.choice(["fcfs", "fair"]), host=rng.choice([None, host]))
        scheduler = make(windows, encoder=encoder, **limits, **more)
        requests = []
        for index in range(10):
            media, end = [], rng.randrange(4)
            while end < 20 and rng.random() < 0.6:
                length = rng.randrange(1, 8)
                media.append(span(end, length, b"%d" % rng.randrange(3), rng.random() < 0.5))
                end += length + rng.randrange(1, 4)
            requests.append(
                add(
                    scheduler,
                    f"{index}",
                    max(end, 1) + rng.randrange(4),
                    media,
                    max_tokens=6,
                    n=rng.choice([1, 2]),
                    user=rng.choice("ab"),
                )
            )
        for _ in range(800):
            if not scheduler.has_unfinished():
                break
            _, rows = step(scheduler)
            encoded.update(row.key for row in rows)
            assert all(row.offset + row.count <= 8 for row in rows)
            if rng.random() < 0.2:
                encoded.discard(rng.choice([b"0", b"1", b"2"]))
        assert not scheduler.has_unfinished(), seed
        for request in requests:
            for sequence in request.sequences:
                assert sequence.output_ids == expected(request, sequence.index)
