"""Speculation by a draft model: the main model's own output, the draft model's fate nobody else's."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model

import hf_paged
from hf_paged import Engine, EngineClosed, EngineConfig, InvalidArgument, SamplingParams, UnsupportedModel

GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.9, seed=3, n=2, max_tokens=30, logprobs=1, ignore_eos=True)


def prompts(count: int = 4, length: int = 25) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 199, (count, length), generator=generator).tolist()


def noisy(name: str, noise: float = 0.01):
    """A model that agrees with the tiny model of that name now and then."""
    model = tiny_model(name)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    return model


def contents(outputs) -> list:
    return [(c.token_ids, c.logprobs, c.finish_reason) for output in outputs for c in output.outputs]


def plain(model, jobs, params) -> list:
    with Engine(model) as engine:
        return contents(engine.generate(jobs, params))


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3")


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "mistral-window"])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED, replace(SAMPLED, repetition_penalty=1.2, logit_bias={5: 3.0})])
def test_a_draft_model_with_the_same_weights_is_always_right(name, params):
    model, draft = tiny_model(name), tiny_model(name)
    expected = plain(model, prompts(), params)
    with Engine(model, draft_model=draft) as engine:
        outputs = engine.generate(prompts(), params)
        stats = engine.stats()
        assert contents(outputs) == expected
        assert stats["acceptance_rate"] == 1.0 and stats["draft_tokens"] > 0
        assert stats["steps"] < params.max_tokens / 2
        assert engine._draft_engine.stats()["kv_bytes_in_use"] == 0
    assert not hf_paged.hf.patch.is_patched(draft)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "mistral-window"])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_a_draft_model_that_errs_changes_nothing_but_the_number_of_steps(name, params):
    model, draft = tiny_model(name), noisy(name)
    expected = plain(model, prompts(), params)
    with Engine(model, config=EngineConfig(block_size=16), draft_model=draft) as engine:
        outputs = engine.generate(prompts(), params)
        assert contents(outputs) == expected
        assert 0 < engine.stats()["acceptance_rate"] < 1
        engine._draft_engine.check_integrity()


def test_a_draft_model_of_another_architecture(model):
    draft = tiny_model("gemma2", num_hidden_layers=1)
    expected = plain(model, prompts(), SAMPLED)
    with Engine(model, draft_model=draft) as engine:
        assert contents(engine.generate(prompts(), SAMPLED)) == expected
        assert engine.stats()["draft_tokens"] > 0


def test_requests_that_come_go_and_are_aborted(model):
    jobs = prompts(8, length=40)
    expected = plain(model, jobs, GREEDY)
    results = {}
    with Engine(model, config=EngineConfig(max_num_seqs=3), draft_model=noisy("qwen3", 0.003)) as engine:
        for number, job in enumerate(jobs):
            engine.add(job, GREEDY, request_id=str(number), on_output=lambda o: results.__setitem__(o.request_id, o))
            engine.step(), engine.step()
            engine._draft_engine.check_integrity()
            if number % 3 == 2:
                engine.abort(str(number))
        while engine.has_unfinished():
            engine.step()
        assert engine.stats()["accepted_tokens"] > 0
        assert engine._draft_engine.stats()["kv_bytes_in_use"] == 0
    for number, (tokens, _, _) in enumerate(expected):
        got = results[str(number)].outputs[0].token_ids
        assert got == tokens[: len(got)] and (number % 3 == 2 or len(got) == 30)


def test_rows_of_preempted_sequences_make_room_for_others(model):
    jobs = prompts(6)
    config = EngineConfig(max_num_seqs=2, policy="priority")
    results = {}
    with Engine(model, config=config, draft_model=tiny_model("qwen3")) as engine:
        for number, job in enumerate(jobs):
            engine.add(job, GREEDY, request_id=str(number), priority=-number)  # whoever comes pushes others out
            engine.step(), engine.step()
        while engine.has_unfinished():
            results |= {output.request_id: output for output in engine.step()}
            assert len(engine._speculator._proposer._guests) <= 2
        assert engine.stats()["preemptions"] > 2
        assert engine.stats()["acceptance_rate"] == 1.0
    assert contents(results[str(number)] for number in range(6)) == plain(model, jobs, GREEDY)


def test_long_prompts_are_caught_up_with_in_batches(model):
    job = [prompts(1, length=300)[0]]
    draft = tiny_model("qwen3")
    hf_paged.patch(draft, max_batch_tokens=64)
    try:
        with Engine(model, draft_model=draft) as engine:
            engine.add(job[0], GREEDY)
            drafted = []
            while engine.has_unfinished():
                engine.step()
                drafted.append(engine.stats()["draft_tokens"])
            assert drafted[:5] == [0] * 5  # the prompt's step, then four batches of 64 of 301 tokens
            assert drafted[5] > 0 and engine.stats()["acceptance_rate"] == 1.0
    finally:
        hf_paged.unpatch(draft)


def test_beyond_the_draft_models_length_nothing_is_guessed(model):
    jobs = prompts(2)
    draft = tiny_model("qwen3", max_position_embeddings=40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Engine(model, draft_model=draft) as engine:
            outputs = engine.generate(jobs, replace(GREEDY, max_tokens=60))
            assert 0 < engine.stats()["draft_tokens"] <= 2 * (40 - 25)
    assert contents(outputs) == plain(model, jobs, replace(GREEDY, max_tokens=60))


# -- failures


def test_a_draft_model_that_raises_hurts_nobody_and_is_warned_of_once(model):
    draft, calls = noisy("qwen3", 0.003), []

    def sometimes(module, inputs):
        calls.append(1)
        if len(calls) % 7 == 0:
            raise RuntimeError("out of order")

    expected = plain(model, prompts(), GREEDY)
    with Engine(model, draft_model=draft) as engine:
        draft.model.layers[0].register_forward_pre_hook(sometimes)
        with pytest.warns(UserWarning, match="speculation: .*out of order") as caught:
            outputs = engine.generate(prompts(), GREEDY)
        assert len(caught) == 1
        assert engine.stats()["draft_tokens"] > 0
        engine._draft_engine.check_integrity()
        assert engine._draft_engine.stats()["kv_bytes_in_use"] == 0
    assert contents(outputs) == expected


def test_a_draft_model_without_memory_hurts_nobody(model):
    jobs = prompts(4, length=60)
    draft = tiny_model("qwen3")
    hf_paged.patch(draft, kv_cache_memory=3 * 16 * 3 * 2 * 2 * 12 * 4, block_size=16)  # three blocks
    try:
        with pytest.warns(UserWarning, match="speculation: .*no blocks left"), Engine(model, draft_model=draft) as engine:
            outputs = engine.generate(jobs, GREEDY)
        assert contents(outputs) == plain(model, jobs, GREEDY)
        hf_paged.engine_of(draft).check_integrity()
    finally:
        hf_paged.unpatch(draft)


def test_a_draft_model_of_nans_guesses_nothing(model):
    draft = tiny_model("qwen3")
    with torch.no_grad():
        draft.lm_head.weight.fill_(float("nan"))
    with Engine(model, draft_model=draft) as engine:
        outputs = engine.generate(prompts(), GREEDY)
        assert engine.stats()["draft_tokens"] == 0
    assert contents(outputs) == plain(model, prompts(), GREEDY)


def test_weights_of_the_draft_model_may_change_while_it_guesses(model):
    draft = tiny_model("qwen3")
    with Engine(model, draft_model=draft) as engine:
        for job in prompts():
            engine.add(job, GREEDY)
        results = {}
        for number in range(200):
            for output in engine.step():
                results[output.request_id] = output
            if number == 3:
                with torch.no_grad():
                    draft.model.norm.weight.mul_(-1)
            if not engine.has_unfinished():
                break
        assert engine.stats()["acceptance_rate"] < 1
    assert contents(results.values()) == plain(model, prompts(), GREEDY)


# -- patching


def test_generate_of_a_patched_model_uses_its_draft_model(model):
    ids = torch.tensor(prompts())
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    draft = tiny_model("qwen3")
    hf_paged.patch(model, draft_model=draft)
    try:
        assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False), expected)
        assert hf_paged.engine_of(model).stats()["acceptance_rate"] == 1.0
        assert "guesses are a draft model's, at most 7 tokens ahead" in str(hf_paged.explain(model))
        hf_paged.patch(model, speculation=hf_paged.Speculation("ngram", num_tokens=3))  # anew, without a draft model
        assert not hf_paged.hf.patch.is_patched(draft)
        assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False), expected)
        assert "repeat what followed" in str(hf_paged.explain(model))
        hf_paged.patch(model)
        assert "guesses" not in str(hf_paged.explain(model))
    finally:
        hf_paged.unpatch(model)
    assert torch.equal(draft.generate(ids, max_new_tokens=20, do_sample=False), expected)  # stock again


def test_two_models_may_share_a_draft_model(model):
    other, draft = tiny_model("qwen3"), tiny_model("qwen3")
    first, second = Engine(model, draft_model=draft), Engine(other, draft_model=draft)
    assert first._draft_engine is second._draft_engine
    first.close()
    with pytest.raises(EngineClosed):
        first.generate(prompts(), GREEDY)
    outputs = second.generate(prompts(), GREEDY)
    assert second.stats()["acceptance_rate"] == 1.0
    second.close()
    assert not hf_paged.hf.patch.is_patched(draft)
    assert contents(outputs) == plain(model, prompts(), GREEDY)


def test_a_draft_model_may_serve_requests_of_its_own(model):
    draft = tiny_model("qwen3")
    with Engine(draft) as own:
        expected = contents(own.generate(prompts(), GREEDY))
        with Engine(model, draft_model=draft) as engine:
            names = [own.add(job, GREEDY) for job in prompts()]
            for job in prompts():
                engine.add(job, GREEDY)
            results = {}
            while engine.has_unfinished() or own.has_unfinished():
                engine.step()
                results |= {output.request_id: output for output in own.step()}
            assert engine.stats()["accepted_tokens"] > 0
        assert contents(results[name] for name in names) == expected
        assert not own.closed


def test_what_the_draft_model_remembers_gives_way_to_its_own_requests(model):
    draft = tiny_model("qwen3")
    memory = 8 * 16 * 3 * 2 * 2 * 12 * 4  # eight blocks
    expected = plain(model, prompts(2), replace(GREEDY, max_tokens=20))
    with Engine(draft, config=EngineConfig(block_size=16, kv_cache_memory=memory)) as own:
        with Engine(model, draft_model=draft) as engine:
            results = {}
            for job in prompts(2):
                engine.add(job, replace(GREEDY, max_tokens=20))
            engine.step(), engine.step(), engine.step()
            assert own.stats()["kv_bytes_in_use"] >= memory / 2
            assert contents(own.generate([prompts(1)[0] * 4], replace(GREEDY, max_tokens=20)))[0][0]  # all eight
            while engine.has_unfinished():
                results |= {output.request_id: output for output in engine.step()}
            assert engine.stats()["accepted_tokens"] > 0
            own.check_integrity()
    assert contents(results.values()) == expected


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(draft_model=tiny_model("qwen3", vocab_size=201)), InvalidArgument, "draft_model: .*201 tokens.*199"),
        (dict(draft_model=tiny_model("qwen3"), speculation="ngram"), InvalidArgument, "'ngram' uses no draft_model"),
        (dict(speculation="draft"), InvalidArgument, "needs a draft_model"),
        (dict(draft_model=torch.nn.Linear(2, 2)), UnsupportedModel, "^draft_model: Linear"),
    ],
)
def test_what_does_not_fit_is_refused_when_patching(model, options, error, message):
    with pytest.raises(error, match=message):
        hf_paged.patch(model, **options)
    assert not hf_paged.hf.patch.is_patched(model)


def test_the_model_is_not_its_own_draft_model(model):
    with pytest.raises(InvalidArgument, match="draft_model is the model itself"):
        Engine(model, draft_model=model)
    assert not hf_paged.hf.patch.is_patched(model)


def test_a_draft_model_that_cannot_be_opened_leaves_everything_as_it_was(model):
    draft = tiny_model("qwen3")
    with pytest.raises(InvalidArgument, match="tokenizer"):
        Engine(model, tokenizer="no tokenizer", draft_model=draft)
    assert not hf_paged.hf.patch.is_patched(model) and not hf_paged.hf.patch.is_patched(draft)
