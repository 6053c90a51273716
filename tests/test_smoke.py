"""The real model, as a user meets it: chat answers in one batch, the tokens of stock transformers, text and streaming."""

from __future__ import annotations

import pytest
import torch
from transformers import pipeline

import hf_paged
from hf_paged import SamplingParams
from hf_paged.hf.build import load_model

QUESTIONS = ["What is the capital of France?", "Name three colours.", "Write one sentence about the sea."]


@pytest.fixture(scope="module")
def loaded():
    return load_model(progress=False)


def test_chat_answers_are_stock_s_tokens(loaded):
    model, tokenizer = loaded
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    stock = [
        model.generate(ids[mask.bool()][None], max_new_tokens=24, do_sample=False)[0, int(mask.sum()) :].tolist()
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"])
    ]
    with torch.no_grad():
        before = model(batch["input_ids"][:1]).logits
    hf_paged.patch(model, tokenizer=tokenizer)
    try:
        paged = model.generate(**batch, max_new_tokens=24, do_sample=False)
        for row, expected in zip(paged[:, batch["input_ids"].shape[1] :].tolist(), stock):
            assert row[: len(expected)] == expected
            assert set(row[len(expected) :]) <= {tokenizer.pad_token_id}
        engine = hf_paged.engine_of(model)
        outputs = engine.generate(chats, SamplingParams(temperature=0, max_tokens=24))
        assert [output.outputs[0].token_ids for output in outputs] == stock
        assert "Paris" in outputs[0].outputs[0].text
        for output, tokens in zip(outputs, stock):
            assert output.outputs[0].text == tokenizer.decode(tokens, skip_special_tokens=True)
    finally:
        hf_paged.unpatch(model)
    with torch.no_grad():
        assert torch.equal(model(batch["input_ids"][:1]).logits, before)


def test_the_pipeline_answers_as_stock_s(loaded):
    model, tokenizer = loaded
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS[:2]]
    options = dict(max_new_tokens=12, do_sample=False)
    stock = pipeline("text-generation", model=model, tokenizer=tokenizer)(chats, **options)
    with pipeline("text-generation", model=model, tokenizer=tokenizer, backend="paged") as pipe:
        assert pipe(chats, **options) == stock
        assert "".join(pipe.stream(chats[0], **options)) == stock[0][0]["generated_text"][-1]["content"]
