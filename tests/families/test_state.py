"""Models whose layers keep a state per sequence: stock's tokens and logits, whatever happens to the sequences."""

from __future__ import annotations

import copy
import functools
import inspect

import pytest
import torch
from family_checks import NEW, Comparison
from tiny_models import CACHE, tiny_model
from transformers import DynamicCache

import hf_paged
from hf_paged import EngineConfig, InvalidArgument, RequestFailed, SamplingParams, UnsupportedOption

# Each kind of layer, alone and beside attention, that goes on by chunks and that needs whole prompts; `make models`
# does the same for all families.
FAMILIES = ["mamba", "mamba2", "jamba", "falcon_h1", "nemotron_h", "qwen3_next", "lfm2"]
WHOLE_PROMPTS = {"mamba", "jamba", "nemotron_h"}
# Mixers with several outputs, attention that is told its layer by the call, a cache of the family's own.
UNUSUAL = ["zaya", "zamba2", "minimax"]
KINDS = ["mamba2", "jamba", "qwen3_next", "lfm2"]
GREEDY = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)


@functools.cache
def comparison_of(name: str) -> Comparison:
    return Comparison(tiny_model(name))


@pytest.fixture(params=FAMILIES)
def family(request):
    return comparison_of(request.param)


@pytest.fixture(params=KINDS)
def kind(request):
    return comparison_of(request.param)


def small_engine(model, **options):
    return hf_paged.Engine(model, config=EngineConfig(**{"block_size": 16, "max_batch_tokens": 24, **options}))


def test_tokens_vary(family):
    family.check_is_telling()


def test_chunked_prefill_mixed_with_decodes_and_no_prefix_hits(family):
    family.check_chunks_and_prefix_hits()


def test_preemption(family):
    family.check_preemption()


def test_generate_with_left_padding_returns_stock_tokens_and_logits(family):
    family.check_generate()


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_mixers(name):
    comparison = comparison_of(name)
    comparison.check_chunks_and_prefix_hits()
    comparison.check_preemption()
    if name == "minimax":
        with pytest.warns(UserWarning, match="masks its padded rows wrongly"):
            comparison.check_generate()
        tokens, _ = comparison.expected[0]
        hf_paged.patch(comparison.model)
        out = comparison.model.generate(torch.tensor([comparison.jobs[0]]), max_new_tokens=NEW, do_sample=False)
        hf_paged.unpatch(comparison.model)
        assert out[0, -NEW:].tolist() == tokens
    else:
        comparison.check_generate()


def test_sequences_computed_again_in_the_middle_have_stock_probabilities(family):
    """What a step that failed once took back is computed anew: prompts as stock computes them, outputs as it decodes."""
    calls = 0

    def fail_once(module, args):
        nonlocal calls
        calls += 1
        if calls == 16:
            raise RuntimeError("once")

    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=0)
    handle = family.model.get_input_embeddings().register_forward_pre_hook(fail_once)
    try:
        with small_engine(family.model) as engine:
            outputs = engine.generate(family.jobs, params)
    finally:
        handle.remove()
    assert calls > 16
    for output, (tokens, logits) in zip(outputs, family.expected):
        completion = output.outputs[0]
        assert completion.token_ids == tokens
        found = torch.tensor([entry[token].logprob for token, entry in zip(tokens, completion.logprobs)])
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_one_token_steps(kind):
    """The smallest budget there is: prompts come in pieces of one token, or whole."""
    with small_engine(kind.model, max_batch_tokens=1) as engine:
        outputs = engine.generate(kind.jobs[:4], GREEDY)
    assert [output.outputs[0].token_ids for output in outputs] == [tokens for tokens, _ in kind.expected[:4]]


def test_completions_share_the_prompt_and_go_their_own_ways(kind):
    prompt = kind.jobs[5]
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=NEW, ignore_eos=True, logprobs=0)
    with small_engine(kind.model) as engine:
        engine.add(kind.jobs[0], GREEDY)
        completions = engine.generate(prompt, params)[0].outputs
        engine.check_integrity()
    assert len({tuple(completion.token_ids) for completion in completions}) == 3
    for completion in completions:  # each has the probabilities that stock gives its own history
        tokens = completion.token_ids
        found = [entry[token].logprob for token, entry in zip(tokens, completion.logprobs)]
        logits = kind.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=1e-4)


def test_held_rows_fork_with_their_state_and_cannot_take_it_back(kind):
    model, long, short = kind.model, kind.jobs[6], kind.jobs[0]

    def check(chunks, rows):
        found = {span.row: chunk.result[i] for chunk in chunks for i, span in enumerate(chunk.spans)}
        for row, tokens in rows.items():
            torch.testing.assert_close(found[row], model(torch.tensor([tokens])).logits[0, -1], atol=2e-4, rtol=1e-4)

    with small_engine(model) as engine:
        engine.add(kind.jobs[1], GREEDY)
        rows = engine.hold(2)
        check(rows.forward([long, short]), {0: long, 1: short})
        rows.reorder([0, 1, 0, 0])
        engine.step()
        check(rows.forward([[11], [12], [13], []]), {0: long + [11], 1: short + [12], 2: long + [13]})
        rows.reorder([3, 1, 2])
        check(rows.forward([[14], [], [15]]), {0: long + [14], 2: long + [13, 15]})
        with pytest.raises(InvalidArgument, match="keep a state"):
            rows.truncate(0, len(long))
        rows.close()
        engine.check_integrity()
        assert engine.generate(kind.jobs[1], GREEDY)[0].outputs[0].token_ids == kind.expected[1][0]


def padded(jobs):
    width = max(map(len, jobs))
    ids = torch.tensor([[0] * (width - len(job)) + job for job in jobs])
    return dict(input_ids=ids, attention_mask=(torch.arange(width) >= width - torch.tensor([[len(job)] for job in jobs])).long())


def test_beams_fork_their_states_as_stock_reorders_them(kind):
    options = dict(num_beams=3, num_return_sequences=2, max_new_tokens=12, do_sample=False)
    rows = [kind.jobs[0], kind.jobs[5]]
    expected = [kind.model.generate(torch.tensor([row]), **options)[:, len(row) :].tolist() for row in rows]
    hf_paged.patch(kind.model, max_batch_tokens=24)
    try:
        inputs = padded(rows)
        out = kind.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()
    finally:
        hf_paged.unpatch(kind.model)
    assert out == expected[0] + expected[1]


def test_a_cache_of_the_callers_own_holds_states_too_so_stock_uses_it(kind):
    model, ids = kind.model, torch.tensor([kind.jobs[0]])
    name = CACHE if CACHE in inspect.signature(model.forward).parameters else "cache_params"

    def in_two_calls():
        cache = {name: DynamicCache(config=model.config)}
        first = model.generate(ids, **cache, max_new_tokens=4, do_sample=False)
        return model.generate(first, **cache, max_new_tokens=8, do_sample=False)

    expected = in_two_calls()
    hf_paged.patch(model)
    try:
        with pytest.warns(UserWarning, match="pages have|a layer of it"):
            assert torch.equal(in_two_calls(), expected)
    finally:
        hf_paged.unpatch(model)


def test_aborts_and_failures_harm_nobody_else(kind):
    """One request is aborted at every age, one fails by itself, one makes the whole step fail."""
    model, jobs = kind.model, kind.jobs
    poison = 198
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logit_bias={poison: -100.0})
    jobs = [[token if token != poison else 3 for token in job] for job in jobs]
    with small_engine(model, max_num_seqs=8) as engine:
        expected = [output.outputs[0].token_ids for output in engine.generate(jobs, params)]

    def refuse(module, args):
        if (args[0] == poison).any():
            raise RuntimeError("poisoned")

    def fail(token_ids, logits):
        if len(token_ids) > 20:
            raise ValueError("enough")
        return logits

    handle = model.get_input_embeddings().register_forward_pre_hook(refuse)
    try:
        with small_engine(model, max_num_seqs=8) as engine:
            outputs = {}
            note = lambda output: outputs.__setitem__(output.request_id, output)  # noqa: E731
            good = [engine.add(job, params, on_output=note) for job in jobs]
            bad = engine.add([5, 6, poison], params, on_output=note)
            failing = engine.add(jobs[2], params, logits_processors=[fail], on_output=note)
            for age in range(6):
                gone = engine.add(jobs[4], params)
                for _ in range(age):
                    engine.step()
                engine.abort(gone)
                engine.check_integrity()
            while engine.has_unfinished():
                engine.step()
                engine.check_integrity()
            assert engine.stats()["state_bytes_in_use"] == 0
    finally:
        handle.remove()
    assert [outputs[name].outputs[0].token_ids for name in good] == expected
    assert "poisoned" in str(outputs[bad].error) and "enough" in str(outputs[failing].error)


def test_outside_a_step_the_model_is_its_own_to_the_last_bit(kind):
    model = kind.model
    ids = torch.tensor([kind.jobs[0]])

    def forward_and_backward():
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return [loss.detach(), *gradients]

    before = forward_and_backward()
    state, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    hf_paged.patch(model, fuse=False)
    try:
        model.generate(ids, max_new_tokens=3, do_sample=False)
        patched = forward_and_backward()
    finally:
        hf_paged.unpatch(model)
    assert all(map(torch.equal, before, patched)) and len(before) == len(patched)
    after = model.state_dict()
    assert list(state) == list(after) and all(torch.equal(state[name], after[name]) for name in state)
    assert [type(module) for module in model.modules()] == kinds


def test_explain_and_stats_tell_of_states(family):
    name = family.model.config.model_type
    with small_engine(family.model) as engine:
        text = str(hf_paged.explain(family.model))
        engine.add(family.jobs[0], GREEDY)
        engine.step()
        stats = engine.stats()
    assert "stock's own, by sequence" in text and "no prefix cache" in text
    assert ("needs a prompt in one step" in text) == (name in WHOLE_PROMPTS)
    size = sum(spec.num_bytes for spec in engine.model.states)
    assert stats["state_bytes_in_use"] == stats["state_bytes_peak"] == size <= stats["state_bytes_allocated"]


def test_states_and_blocks_stay_within_the_memory_given(family):
    with small_engine(family.model, kv_cache_memory="400KiB") as engine:
        engine.generate(family.jobs * 2, GREEDY)
        stats = engine.stats()
        assert stats["state_bytes_allocated"] + stats["kv_bytes_allocated"] <= 400 * 1024
        assert stats["state_bytes_in_use"] == 0


def test_hooks_on_parts_of_a_layer_with_a_state_are_told_to_hook_the_layer(kind):
    model = kind.model
    with small_engine(model) as engine:
        name = engine.model.states[0].name
        mixer = model.get_submodule(name)
        seen = []
        handle = mixer.register_forward_hook(lambda *args: seen.append(hf_paged.current_batch().num_tokens))
        engine.generate([[5, 6, 7], [8, 9]], SamplingParams(max_tokens=2, ignore_eos=True))
        handle.remove()
        assert seen == [5, 2]
        handle = mixer.out_proj.register_forward_hook(lambda *args: hf_paged.current_batch() and None)
        with pytest.raises(RequestFailed, match=f"inside {name}"):
            engine.generate([[5, 6, 7]], GREEDY)
        handle.remove()
        assert engine.generate(kind.jobs[0], GREEDY)[0].outputs[0].token_ids == kind.expected[0][0]


def test_nothing_can_be_guessed_where_a_state_cannot_be_taken_back():
    model, attending = tiny_model("lfm2"), tiny_model("llama")
    with pytest.raises(UnsupportedOption, match="^speculation='ngram': this model's layers keep a state"):
        hf_paged.patch(model, speculation="ngram")
    with pytest.raises(UnsupportedOption, match="^speculation='draft': this model's layers keep a state"):
        hf_paged.Engine(model, draft_model=attending)
    with pytest.raises(UnsupportedOption, match="^draft_model: its layers keep a state"):
        hf_paged.Engine(attending, draft_model=model)
    assert not any(map(hf_paged.hf.patch.is_patched, (model, attending)))


@pytest.mark.parametrize(("name", "allowed"), [("qwen3_next", True), ("jamba", False), ("nemotron_h", False)])
def test_pages_go_on_by_several_tokens_only_where_the_layers_do(name, allowed):
    comparison = comparison_of(name)
    model, ids = comparison.model, torch.tensor([comparison.jobs[0]])
    more = torch.tensor([[7, 8, 9]])
    expected = model.generate(torch.cat((ids, more), 1), max_new_tokens=6, do_sample=False)
    hf_paged.patch(model)
    try:
        pages = model.generate(ids, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)[CACHE]
        if allowed:
            assert torch.equal(model.generate(torch.cat((ids, more), 1), **{CACHE: pages}, max_new_tokens=6), expected)
        else:
            with pytest.raises(UnsupportedOption, match="row 0 goes on by 3 tokens"):
                model.generate(torch.cat((ids, more), 1), **{CACHE: pages}, max_new_tokens=6)
    finally:
        hf_paged.unpatch(model)


@pytest.mark.filterwarnings("ignore:attention_mask")
def test_pages_handed_out_go_on_with_their_states():
    model = tiny_model("lfm2")
    ids = torch.randint(3, 199, (2, 20), generator=torch.Generator().manual_seed(1))
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    hf_paged.patch(model)
    try:
        first = model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
        again = model.generate(first.sequences, max_new_tokens=6, do_sample=False, **{CACHE: first[CACHE]})
        assert torch.equal(again, expected)
        holes = torch.ones_like(again)
        holes[0, 5] = 0
        with pytest.raises(UnsupportedOption, match="past_key_values: attention_mask"):
            model.generate(again, attention_mask=holes, max_new_tokens=2, **{CACHE: first[CACHE]})
    finally:
        hf_paged.unpatch(model)
