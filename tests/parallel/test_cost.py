"""The cost model: by hand, and in the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_paged.benchmarks.parallel.cost import H100, LLAMA_70B, Sizes, link_bytes, predict, summed_per_token, table


def test_a_known_model():
    assert LLAMA_70B.parameters == pytest.approx(70.55e9, rel=1e-3)
    assert LLAMA_70B.kv_bytes_per_token == 2 * 80 * 8 * 128 * 2
    assert summed_per_token(LLAMA_70B) == 2 * 80 * 8192 * 2


def test_tied_embeddings_count_once():
    sizes = dict(layers=1, hidden=4, intermediate=8, heads=2, kv_heads=1, head_dim=2, vocabulary=10)
    assert Sizes(**sizes).parameters == 4 * 2 * 6 + 3 * 4 * 8 + 80
    assert Sizes(**sizes, tied=True).parameters == 4 * 2 * 6 + 3 * 4 * 8 + 40


def test_one_rank_sends_nothing():
    found = predict(LLAMA_70B, H100, 1, sequences=4, context=100)
    assert found.link_bytes == found.link_time == 0
    assert link_bytes(100, 2) == 100 and link_bytes(100, 4) == 150


def test_ranks_share():
    two, four = (predict(LLAMA_70B, H100, ranks, sequences=4, context=100) for ranks in (2, 4))
    assert two.weights == 2 * four.weights and two.kv_time == 2 * four.kv_time
    assert four.cached_tokens > 2 * two.cached_tokens
    assert four.step == four.weight_time + four.kv_time + four.link_time < two.step


def test_fewer_key_heads_than_ranks():
    eight, sixteen = (predict(LLAMA_70B, H100, ranks, sequences=4, context=100) for ranks in (8, 16))
    assert sixteen.kv_per_token == eight.kv_per_token
    assert eight.weights / 2 < sixteen.weights < eight.weights / 2 * 1.03


def test_uneven_heads_are_refused():
    with pytest.raises(ValueError, match="8 key/value heads cannot be dealt out to 12 ranks"):
        predict(LLAMA_70B, H100, 12, sequences=1, context=1)


def test_the_page_has_the_predictions():
    assert table() in (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
