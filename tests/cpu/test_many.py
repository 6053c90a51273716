"""Several threads on one model, several models and engines in one process."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from tiny_models import tiny_model

import hf_paged
from hf_paged import Engine, EngineConfig, InvalidArgument, SamplingParams
from hf_paged.hf.patch import is_patched

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 190, (7 + 5 * row,), generator=generator).tolist() for row in range(count)]


def greedy(model, prompt, **options) -> list[int]:
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, **options)
    return ids[0, len(prompt) :].tolist()


def in_threads(jobs: list) -> None:
    """Run the callables at once, each in a thread of its own; raise the first error."""
    errors = []

    def guarded(job):
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def test_four_threads_generate_on_one_model():
    """Rows, batches, beams and sampled rows side by side; each call gets what it gets alone."""
    model = tiny_model("llama")
    jobs = prompts(4)
    ways = [{}, {"num_beams": 3}, {"output_scores": True, "return_dict_in_generate": True}, {"num_return_sequences": 1}]

    def call(one, prompt, options) -> torch.Tensor:
        result = one.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, **options)
        return result if torch.is_tensor(result) else result.sequences

    expected = [[call(model, job, options) for options in ways] for job in jobs]
    hf_paged.patch(model, max_batch_tokens=32, kv_cache_memory="2MiB")
    wrong = []

    def work(place: int):
        for turn in range(8):
            way = (place + turn) % len(ways)
            if not torch.equal(call(model, jobs[place], ways[way]), expected[place][way]):
                wrong.append((place, way))

    in_threads([lambda place=place: work(place) for place in range(4)])
    assert not wrong
    engine = hf_paged.engine_of(model)
    assert not engine.has_unfinished() and engine.stats()["kv_bytes_in_use"] == 0
    engine.check_integrity()
    hf_paged.unpatch(model)


def test_a_thread_s_bad_call_disturbs_no_other():
    model = tiny_model("llama")
    jobs = prompts(3)
    expected = [greedy(model, job) for job in jobs]
    hf_paged.patch(model)

    def bad():
        def refuse(ids, scores):
            raise LookupError("mine")

        for _ in range(6):
            with pytest.raises(Exception, match="mine"):
                greedy(model, jobs[0], logits_processor=[refuse])

    def good(place: int):
        for _ in range(6):
            assert greedy(model, jobs[place]) == expected[place]

    in_threads([bad, lambda: good(1), lambda: good(2)])
    hf_paged.unpatch(model)


def test_threads_share_an_engine_of_their_own_adds_and_steps():
    model = tiny_model("qwen3")
    jobs = prompts(4)
    expected = [greedy(model, job) for job in jobs]
    with Engine(model) as engine:

        def work(place: int):
            for _ in range(5):
                assert engine.generate([jobs[place]], GREEDY)[0].outputs[0].token_ids == expected[place]

        in_threads([lambda place=place: work(place) for place in range(4)])


def test_two_engines_step_in_turns_and_close_in_any_order():
    models = tiny_model("llama"), tiny_model("gemma2")
    jobs = prompts(3)
    expected = [[greedy(model, job) for job in jobs] for model in models]
    engines = [Engine(models[0]), Engine(models[1], config=EngineConfig(block_size=32))]
    with pytest.raises(InvalidArgument, match="already has an engine"):
        Engine(models[0])
    states = [[engine.submit(job, GREEDY) for job in jobs] for engine in engines]
    while any(engine.has_unfinished() for engine in engines):
        for engine in engines:
            engine.step()
    for own, right in zip(states, expected):
        assert [state.output.outputs[0].token_ids for state in own] == right
    engines[0].close()
    assert not is_patched(models[0]) and is_patched(models[1])
    assert engines[1].generate(jobs, GREEDY)[0].outputs[0].token_ids == expected[1][0]
    engines[1].close()
    assert [greedy(model, jobs[0]) for model in models] == [right[0] for right in expected]


def test_copies_of_a_patched_model_are_patched_and_unpatched_by_themselves():
    model = tiny_model("llama")
    job = prompts(1)[0]
    expected = greedy(model, job)
    hf_paged.patch(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(InvalidArgument, match="not patched; call hf_paged.patch"):
            hf_paged.unpatch(other)
        hf_paged.patch(other, block_size=32)
        assert hf_paged.engine_of(other) is not hf_paged.engine_of(model)
        with torch.no_grad():
            other.model.layers[0].self_attn.q_proj.weight.mul_(-1)
        assert greedy(other, job) != expected and greedy(model, job) == expected
        hf_paged.unpatch(other)
        assert is_patched(model) and not is_patched(other)
        assert greedy(model, job) == expected
    hf_paged.unpatch(model)


def test_what_is_not_patched_is_told_so():
    model = tiny_model("llama")
    for use in (hf_paged.unpatch, hf_paged.engine_of, hf_paged.explain):
        with pytest.raises(InvalidArgument, match="LlamaForCausalLM is not patched"):
            use(model)
        with pytest.raises(InvalidArgument, match="model: this Linear is not patched"):
            use(torch.nn.Linear(2, 2))
        with pytest.raises(InvalidArgument, match="model: this NoneType is not patched"):
            use(None)
