"""Run by torchrun: what an engine and `generate` do beside plain decoding, of a model on two ranks and of the whole one."""

from __future__ import annotations

import sys
from pathlib import Path

import checks
import torch
from checks import NEW, EngineConfig, SamplingParams, hf_paged, pairs, prompts, ragged, rank, refused
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer
from transformers import LogitsProcessorList, StoppingCriteriaList

checks.MODELS = {"llama": dict(vocab_size=300)}
checks.CHECKS = []
check = checks.check


def close(actual, expected) -> None:
    if actual is not None:  # on rank 0
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def prompts_alone() -> dict:
    """Rows without padding: of that, pages show no hidden states."""
    return {"input_ids": prompts(), "attention_mask": torch.ones(3, 20, dtype=torch.int64)}


def one_prompt() -> dict:
    return {"input_ids": prompts(1), "attention_mask": torch.ones(1, 20, dtype=torch.int64)}


def alike(**options) -> None:
    """`generate` on all ranks gives what stock gives in one process: tokens, and what else was asked for."""
    pair = pairs["llama"]
    options = ragged() | dict(max_new_tokens=NEW, do_sample=False) | options
    torch.manual_seed(0)
    expected = pair.whole.generate(**options)
    hf_paged.patch(pair.shards)
    try:
        torch.manual_seed(0)
        actual = pair.shards.generate(**options)
    finally:
        hf_paged.unpatch(pair.shards)
    if not options.get("return_dict_in_generate"):
        assert torch.equal(actual, expected), (actual, expected)
        return
    assert torch.equal(actual.sequences, expected.sequences)
    for name in ("scores", "logits", "hidden_states", "sequences_scores"):
        if getattr(expected, name, None) is not None:
            torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=1e-4, atol=1e-4)


def draft() -> torch.nn.Module:
    torch.manual_seed(7)
    model = tiny_model("llama", vocab_size=300, num_hidden_layers=1)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


@check
def scores():
    def work(engine):
        found = engine.score(prompts(2).tolist(), [[[5, 6, 7], [8]], [[9, 10]]])
        return [[(one.logprob, *one.token_logprobs) for one in of] for of in found]

    pair = pairs["llama"]
    close(pair.led(work), pair.alone(work))


@check
def logprobs_of_prompts():
    def work(engine):
        params = SamplingParams(max_tokens=2, temperature=0.0, logprobs=3, prompt_logprobs=2, detokenize=False)
        found = []
        for output in engine.generate(prompts(3, 50).tolist(), params):
            for steps in (output.prompt_logprobs[1:], output.outputs[0].logprobs):
                found += [sorted((token, entry.logprob) for token, entry in step.items()) for step in steps]
        return found

    pair = pairs["llama"]
    config = EngineConfig(max_batch_tokens=32)
    close(pair.led(work, config), pair.alone(work, config))


@check
def classes_are_for_models_with_such_a_head():
    def work(engine):
        refused(hf_paged.UnsupportedOption, "classif", engine.classify, prompts(1).tolist())
        return checks.tokens(engine, prompts(1))

    pairs["llama"].same(work)


@check
def guesses_of_a_draft_model():
    def work(engine):
        found = checks.tokens(engine, prompts(2))
        assert engine.stats()["draft_tokens"] > 0
        return found

    pairs["llama"].same(work, draft_model=draft())


@check
def an_assistant_model():
    alike(**one_prompt(), assistant_model=draft())


@check
def prompt_lookup():
    alike(**one_prompt(), prompt_lookup_num_tokens=3)


@check
def guidance():
    alike(guidance_scale=1.5)


@check
def scores_and_hidden_states():
    alike(**prompts_alone(), return_dict_in_generate=True, output_scores=True, output_logits=True, output_hidden_states=True)


@check
def scores_of_beams():
    alike(return_dict_in_generate=True, output_scores=True, num_beams=3, length_penalty=0.7)


@check
def callables_of_the_caller():
    """Rank 0's count; those of the others are not called."""
    seen = []

    def prefer(ids, scores):
        seen.append(len(ids))
        scores = scores.clone()
        scores[:, 5::7] += 2
        return scores

    stop = lambda ids, scores, **_: ids[:, -1] == 5  # noqa: E731
    alike(logits_processor=LogitsProcessorList([prefer]), stopping_criteria=StoppingCriteriaList([stop]))


@check
def a_callable_that_fails():
    def broken(ids, scores):
        raise RuntimeError("no such word")

    pair = pairs["llama"]
    hf_paged.patch(pair.shards)
    try:
        for options in ({}, dict(num_beams=2)):
            refused(RuntimeError, "no such word", pair.shards.generate, prompts(), max_new_tokens=3, do_sample=False,
                    logits_processor=LogitsProcessorList([broken]), **options)  # fmt: skip
        expected = pair.whole.generate(prompts(), max_new_tokens=NEW, do_sample=False)
        assert torch.equal(pair.shards.generate(prompts(), max_new_tokens=NEW, do_sample=False), expected)
    finally:
        hf_paged.unpatch(pair.shards)


@check
def functions_of_single_requests():
    def work(engine):
        ids = prompts(2).tolist()
        names = [
            engine.add(ids[0], SamplingParams(max_tokens=NEW, temperature=0.0, detokenize=False),
                       logits_processors=[lambda ids, logits: logits + (torch.arange(len(logits)) % 7 == 5)]),
            engine.add(ids[1], SamplingParams(max_tokens=NEW, temperature=0.0, detokenize=False),
                       stopping_criteria=[lambda ids: len(ids) >= 4]),
        ]  # fmt: skip
        found = {}
        while engine.has_unfinished():
            found |= {output.request_id: output.outputs[0].token_ids for output in engine.step() if output.finished}
        return [list(found[name]) for name in names]

    pairs["llama"].same(work)


@check
def outputs_of_a_form():
    import json

    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"]}

    def work(engine):
        params = [
            SamplingParams(structured_outputs=form, max_tokens=30, temperature=0.0)
            for form in ({"json": json.dumps(schema)}, {"choice": ["yes", "no"]}, {"regex": "[a-c]{3}x"})
        ]
        return [output.outputs[0].text for output in engine.generate(["say", "is it", "so"], params)]

    pair = pairs["llama"]
    models = pair.whole, pair.shards
    try:
        for model in models:
            model.generation_config.eos_token_id = 2
        pair.same(work, tokenizer=tiny_tokenizer(300))
    finally:
        for model in models:
            model.generation_config.eos_token_id = None


@check
def stop_strings():
    alike(stop_strings=["e", "th"], tokenizer=tiny_tokenizer(300))


@check
def hooks_on_all_ranks():
    """They see, and may replace, what is whole on every rank: a layer's output."""
    pair = pairs["llama"]

    def steer(module, inputs, output):
        return output + 0.3 if isinstance(output, torch.Tensor) else (output[0] + 0.3, *output[1:])

    expected = [pair.whole.generate(prompts(), max_new_tokens=NEW, do_sample=False)]
    handle = pair.whole.model.layers[1].register_forward_hook(steer)
    expected.append(pair.whole.generate(prompts(), max_new_tokens=NEW, do_sample=False))
    handle.remove()
    assert not torch.equal(*expected)
    hf_paged.patch(pair.shards)
    try:
        for wanted in (expected[1], expected[0]):
            if wanted is expected[1]:
                handle = pair.shards.model.layers[1].register_forward_hook(steer)
            found = pair.shards.generate(prompts(), max_new_tokens=NEW, do_sample=False)
            handle.remove()
            assert torch.equal(found, wanted)
    finally:
        hf_paged.unpatch(pair.shards)


@check
def refusals_on_all_ranks():
    """Each with one error, after which the next call is right."""
    pair = pairs["llama"]
    sharded_draft = checks.AutoModelForCausalLM.from_pretrained(
        Path(checks.FOLDER[0]) / "llama", distributed_config=checks.distributed_config(2)
    )

    def asks_the_model(ids, scores):
        return scores + pair.shards(ids).logits[:, -1]

    hf_paged.patch(pair.shards)
    try:
        for name, options in {
            "cache_implementation": dict(cache_implementation="static"),
            "adapter 'a' is not loaded": dict(adapter_names=["a", "b", "c"]),
            "synced_gpus": dict(synced_gpus=True),
            "attention_mask": dict(attention_mask=torch.ones(3, 1, 20, 20)),
            "nonsense": dict(nonsense=1),
            "assistant_model": dict(assistant_model=sharded_draft, **one_prompt()),
            "called by a function": dict(logits_processor=LogitsProcessorList([asks_the_model])),
        }.items():
            try:
                pair.shards.generate(**prompts_alone() | dict(max_new_tokens=3, do_sample=False) | options)
            except (hf_paged.UnsupportedOption, ValueError) as error:
                assert name in str(error), error
            else:
                raise AssertionError(f"{name} was not refused")
        if not rank():
            engine = hf_paged.engine_of(pair.shards)
            refused(hf_paged.UnsupportedOption, "load_adapter", engine.load_adapter, "a", "nowhere")
        expected = pair.whole.generate(prompts(), max_new_tokens=NEW, do_sample=False)
        assert torch.equal(pair.shards.generate(prompts(), max_new_tokens=NEW, do_sample=False), expected)
    finally:
        hf_paged.unpatch(pair.shards)


@check
def patched_alike():
    pair = pairs["llama"]
    refused(hf_paged.ParallelError, "what hf_paged.patch was told", hf_paged.patch, pair.shards, fuse=rank() == 0)
    pair.same(lambda engine: checks.tokens(engine, prompts(1)))


if __name__ == "__main__":
    checks.main(sys.argv[1])
