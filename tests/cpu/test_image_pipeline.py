"""`pipeline("image-text-to-text", ..., backend="paged")` against the same calls of transformers' own pipeline."""

from __future__ import annotations

import pytest
from pictures import picture
from tiny_processors import tiny_pair
from transformers import pipeline

import hf_paged
from hf_paged import EngineClosed, EngineConfig, InvalidArgument
from hf_paged.hf.patch import is_patched
from hf_paged.integrations.pipeline import PagedImageTextToTextPipeline

GREEDY = dict(generate_kwargs=dict(do_sample=False, max_new_tokens=8))


def chat(*parts) -> list[dict]:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return [{"role": "user", "content": content}]


CHATS = [
    chat(picture(1), "what is it?"),
    chat("only a text, and a longer one than the others"),
    chat("two: ", picture(2, 30, 9), picture(3), "?"),
    chat(picture(1), "what is it?"),
]


def make(label: str, **options):
    model, processor, _ = tiny_pair(label)
    return pipeline("image-text-to-text", model=model, processor=processor, **options)


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def pipes(request):
    with make(request.param, backend="paged", engine_config=EngineConfig(max_batch_tokens=24)) as paged:
        assert type(paged) is PagedImageTextToTextPipeline and is_patched(paged.model)
        yield make(request.param), paged


def text_of(results) -> list:
    return [[one["generated_text"] for one in (result if isinstance(result, list) else [result])] for result in results]


def test_results_are_stocks(pipes):
    plain, paged = pipes
    assert type(plain).__name__ == "ImageTextToTextPipeline"
    assert text_of([paged(text=CHATS[0], **GREEDY)]) == text_of([plain(text=CHATS[0], **GREEDY)])
    expected = text_of(plain(text=CHATS, return_full_text=False, **GREEDY))
    assert text_of(paged(text=CHATS, return_full_text=False, **GREEDY)) == expected
    assert hf_paged.engine_of(paged.model).stats()["prefix_hit_tokens"] > 0
    assert len({one for (one,) in expected}) > 1


def test_many_run_side_by_side(pipes):
    _, paged = pipes
    engine = hf_paged.engine_of(paged.model)
    engine.reset_stats()
    paged(text=[chat(picture(seed), "what is it?") for seed in range(6)], progress=True, **GREEDY)
    assert engine.stats()["steps"] < 6 * 8


def test_batches_are_padded_as_in_stock(pipes):
    plain, paged = pipes
    options = dict(batch_size=2, return_full_text=False, **GREEDY)
    chats = [CHATS[0], CHATS[3], chat(picture(5), "what is it?")]
    assert text_of(paged(text=chats, **options)) == text_of(plain(text=chats, **options))


def test_it_is_closed_and_other_backends_are_refused():
    paged = make("llava", backend="paged")
    paged.close()
    assert not is_patched(paged.model)
    with pytest.raises(EngineClosed):
        paged(text=CHATS[0], **GREEDY)
    with pytest.raises(InvalidArgument, match="backend"):
        make("llava", backend="other")
