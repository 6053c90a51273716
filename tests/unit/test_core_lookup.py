"""Prompt lookup: which earlier place a guess is copied from."""

from random import Random

import pytest

from hf_paged.core.lookup import PromptLookup


def guess(tokens, count=4, shortest=2, longest=4):
    return PromptLookup(shortest, longest).guess(list(tokens), count)


def test_what_followed_the_same_tokens_before_is_guessed():
    assert guess([1, 2, 3, 4, 5, 6, 9, 1, 2]) == [3, 4, 5, 6]
    assert guess([1, 2, 3, 4, 5, 6, 9, 1, 2], count=2) == [3, 4]


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3], [1, 2, 3, 1], [2, 1, 3, 1, 2]])
def test_nothing_is_guessed_where_nothing_repeats(tokens):
    assert guess(tokens) == []


def test_of_several_places_the_one_that_agrees_longest_is_taken_and_of_equals_the_latest():
    assert guess([8, 1, 2, 50, 9, 1, 2, 60, 7, 8, 1, 2]) == [50, 9, 1, 2]  # 8 1 2 beats 1 2
    assert guess([8, 1, 2, 50, 9, 1, 2, 60, 7, 0, 1, 2]) == [60, 7, 0, 1]
    assert guess([5, 8, 1, 2, 50, 6, 8, 1, 2, 60, 5, 8, 1, 2], longest=3) == [60, 5, 8, 1]


def test_a_period_is_continued():
    assert guess([7, 7, 7], count=5) == [7] * 5
    assert guess([1, 2, 3, 1, 2, 3, 1, 2], count=7) == [3, 1, 2, 3, 1, 2, 3]


def test_single_tokens_may_be_enough():
    assert guess([5, 6, 7, 5], shortest=1, count=3) == [6, 7, 5]
    assert guess([5, 6, 7, 5], shortest=2) == []


def test_an_index_that_grows_guesses_what_a_new_one_does():
    random = Random(3)
    lookup, tokens = PromptLookup(2, 5), []
    for _ in range(300):
        tokens.append(random.randint(0, 3))
        if random.random() < 0.6:
            assert lookup.guess(tokens, 6) == guess(tokens, 6, 2, 5)


def test_a_guess_is_what_some_earlier_place_with_the_same_tokens_continues_with():
    random = Random(4)
    for _ in range(200):
        tokens = [random.randint(0, 4) for _ in range(random.randint(3, 40))]
        found = guess(tokens, count=1)
        follows = [tokens[i + 2] for i in range(len(tokens) - 2) if tokens[i : i + 2] == tokens[-2:]]
        assert found == [] if not follows else found[0] in follows
