"""Hooks inside a step: what they can ask, whom they may change, and what is not shared because of them."""

from __future__ import annotations

import asyncio
import copy

import pytest
import torch
from tiny_models import tiny_model

import hf_paged
from hf_paged import AsyncEngine, Engine, EngineConfig, InvalidArgument, RequestFailed, SamplingParams

CONFIG = EngineConfig(block_size=16, max_batch_tokens=48, max_num_seqs=8)
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
LAYER = "model.layers.1"


@pytest.fixture(scope="module")
def stock():
    """An unpatched copy, for expected values. Never changed."""
    return tiny_model("llama")


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def engine(model):
    with Engine(model, config=CONFIG) as engine:
        yield engine
        assert not engine.has_unfinished() and engine.stats()["kv_bytes_in_use"] == 0
        engine.check_integrity()


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 190, (length,), generator=generator).tolist() for length in lengths]


def greedy(model, prompt, hooks=None, new=8) -> list[int]:
    """Stock's tokens, with torch forward hooks {module name: hook(activation) -> activation}."""
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, args, output, f=function: f(output))
        for name, function in (hooks or {}).items()
    ]
    try:
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False)
    finally:
        for handle in handles:
            handle.remove()
    return ids[0, len(prompt) :].tolist()


def run(engine, jobs: list, **common) -> dict[str, hf_paged.RequestOutput]:
    """Outputs by id of requests given as (prompt, options of `add`)."""
    results = {}
    keep = lambda output: results.update({output.request_id: output})  # noqa: E731
    for prompt, options in jobs:
        engine.add(prompt, **{"params": GREEDY, **common, **options}, on_output=keep)
    while engine.has_unfinished():
        engine.step()
    return results


def tokens(output) -> list[int]:
    return output.outputs[0].token_ids


# current_batch


def test_every_row_of_the_batch_is_told_by_request_and_position(engine, model, stock):
    seen: dict[str, dict[int, tuple]] = {}

    def look(module, args, output):
        batch = hf_paged.current_batch()
        assert batch is hf_paged.current_batch() and output.shape[:2] == (1, batch.num_tokens)
        spans = [list(range(segment.rows.start, segment.rows.stop)) for segment in batch.segments]
        assert sum(spans, []) == list(range(batch.num_tokens))
        for place, segment in enumerate(batch.segments):
            assert batch.position_ids[0, segment.rows].tolist() == list(segment.positions)
            assert batch.input_ids[0, segment.rows].tolist() == segment.token_ids
            assert (batch.segment_ids == place).nonzero()[:, 0].tolist() == spans[place]
            assert segment in batch.segments_of(segment.request_id) and segment.row is None and segment.index == 0
            mine = seen.setdefault(segment.request_id, {})
            for position, token, row in zip(segment.positions, segment.token_ids, output[0, segment.rows]):
                assert position not in mine
                mine[position] = token, row.clone(), segment.is_prefill

    model.model.layers[1].register_forward_hook(look)
    jobs = prompts(70, 3, 21)  # one longer than a step's budget
    results = run(engine, [(job, {"request_id": f"r{i}"}) for i, job in enumerate(jobs)])
    for i, job in enumerate(jobs):
        ids = job + tokens(results[f"r{i}"])
        assert tokens(results[f"r{i}"]) == greedy(stock, job)
        mine = seen[f"r{i}"]
        assert sorted(mine) == list(range(len(ids) - 1))
        with torch.no_grad():
            hidden = stock(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
        for position, (token, row, is_prefill) in mine.items():
            assert token == ids[position] and is_prefill == (position < len(job))
            torch.testing.assert_close(row, hidden[position], atol=1e-4, rtol=1e-4)


def test_completions_of_one_request_are_told_apart(engine, model):
    indices = []
    model.model.layers[0].register_forward_hook(
        lambda *_: indices.append([segment.index for segment in hf_paged.current_batch().segments])
    )
    run(engine, [(prompts(9)[0], {"params": SamplingParams(n=3, max_tokens=3, seed=0, ignore_eos=True)})])
    assert indices == [[0], [0, 1, 2], [0, 1, 2]]


def test_the_head_s_rows_are_told(engine, model):
    shapes = []

    def look(module, args, output):
        batch = hf_paged.current_batch()
        shapes.append((output.shape[1], batch.num_tokens))
        assert output.shape[1] == len(batch.logit_rows) <= batch.num_tokens
        ends = [segment.rows.stop - 1 for segment in batch.segments if len(segment.token_ids) < 48]
        assert batch.logit_rows.tolist() == ends

    model.lm_head.register_forward_hook(look)
    run(engine, [(job, {}) for job in prompts(60, 4)])
    assert (0, 48) in shapes and (2, 2) in shapes


def test_outside_a_step_there_is_no_batch(model):
    seen = []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(hf_paged.current_batch()))
    hf_paged.patch(model)
    assert seen == []  # patching runs the model, but nobody's hooks
    model(torch.tensor([[5, 6, 7]]))
    assert seen == [None]

    def process(ids, logits):
        seen.append(hf_paged.current_batch())
        return logits

    run(hf_paged.engine_of(model), [(prompts(5)[0], {"logits_processors": [process]})])
    assert seen.count(None) == 1 + 8 and len(seen) == 1 + 2 * 8
    hf_paged.unpatch(model)


@pytest.mark.parametrize("ways", [{}, {"num_beams": 2}, {"output_scores": True, "return_dict_in_generate": True}])
def test_rows_of_generate_are_told_by_their_number(model, stock, ways):
    """A hook that changes one row of the batch does the same as in stock, where that row is an index."""
    ids = torch.tensor([job[:10] for job in prompts(10, 10, 10)])
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :1] = 0
    options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, **ways)
    turned, names = 2, set()

    def stock_hook(module, args, output):
        return torch.cat([output[:turned], output[turned : turned + 1] * -0.5, output[turned + 1 :]])

    def hook(module, args, output):
        output = output.clone()
        for segment in hf_paged.current_batch().segments:
            names.add((segment.request_id, segment.row))
            if segment.row == turned:
                output[0, segment.rows] *= -0.5
        return output

    twin = copy.deepcopy(stock)
    plain = twin.generate(ids, **options)
    twin.get_submodule(LAYER).register_forward_hook(stock_hook)
    expected = twin.generate(ids, **options)
    hf_paged.patch(model)
    model.generate(ids, **options)
    model.get_submodule(LAYER).register_forward_hook(hook)
    actual = model.generate(ids, **options)
    sequences = [result if torch.is_tensor(result) else result.sequences for result in (actual, expected, plain)]
    assert torch.equal(sequences[0], sequences[1]) and not torch.equal(sequences[1], sequences[2])
    rows = 3 * ways.get("num_beams", 1)
    assert {row for _, row in names} == set(range(rows))
    assert len({name for name, _ in names}) == rows and all(name.endswith(f"/{row}") for name, row in names)
    hf_paged.unpatch(model)


# Hooks on modules, for all requests


def test_a_hook_may_steer_one_request_by_asking_whose_rows_they_are(engine, model, stock):
    job = prompts(40)[0]
    plain, steered = greedy(stock, job), greedy(stock, job, {LAYER: lambda x: x * -0.5})
    assert plain != steered

    def steer(module, args, output):
        output = output.clone()
        for segment in hf_paged.current_batch().segments_of("steered"):
            output[0, segment.rows] *= -0.5
        return output

    run(engine, [(job, {})])  # leaves its blocks to be found
    handle = model.get_submodule(LAYER).register_forward_hook(steer)
    results = run(engine, [(job, {"request_id": "steered"}), (job, {"request_id": "plain"})])
    assert tokens(results["steered"]) == steered and tokens(results["plain"]) == plain
    assert results["plain"].metrics.num_cached_tokens == 0
    assert LAYER in hf_paged.explain(model).off["prefix sharing"] and "off     prefix" in str(hf_paged.explain(model))

    handle.remove()
    assert not hf_paged.explain(model).off
    first, second = (run(engine, [(job, {"request_id": name})])[name] for name in "ab")
    assert tokens(first) == tokens(second) == plain
    assert (first.metrics.num_cached_tokens, second.metrics.num_cached_tokens) == (0, 32)


def test_a_hook_on_all_of_torch_s_modules_counts_too(engine, model, stock):
    job = prompts(40)[0]
    run(engine, [(job, {})])
    gate = model.model.layers[0].mlp.gate_proj
    bend = lambda module, args, output: output * 2 if module is gate else None  # noqa: E731
    handle = torch.nn.modules.module.register_module_forward_hook(bend)
    try:
        output = run(engine, [(job, {"request_id": "r"})])["r"]
        report = hf_paged.explain(model)
    finally:
        handle.remove()
    assert tokens(output) == greedy(stock, job, {"model.layers.0.mlp.gate_proj": lambda x: x * 2}) != greedy(stock, job)
    assert "every module" in report.off["prefix sharing"] and "model.layers.0.mlp" in report.off["fused mlp"]


def test_patching_asks_no_hook_of_all_modules_for_rows(model):
    """It may be called while the model is looked at: there is no batch then."""
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append(hf_paged.current_batch()))
    seen = []
    try:
        hf_paged.patch(model, verify=True)
    finally:
        handle.remove()
    assert None in seen
    hf_paged.unpatch(model)


def test_a_hook_that_changes_its_input_in_place_acts_as_in_stock(engine, model, stock):
    def halve(module, args):
        args[0][..., ::2] *= 0.5

    job = prompts(20)[0]
    twin = copy.deepcopy(stock)
    for one in (model, twin):
        one.model.layers[0].self_attn.k_proj.register_forward_pre_hook(halve)
    assert tokens(run(engine, [(job, {"request_id": "r"})])["r"]) == greedy(twin, job) != greedy(stock, job)


def test_strict_refuses_what_hooks_switch_off(model):
    model.model.layers[1].register_forward_hook(lambda *_: None)
    with pytest.raises(hf_paged.KernelUnavailable, match="prefix sharing is off: forward hooks, on model.layers.1"):
        hf_paged.patch(model, strict=True)
    model.model.layers[1]._forward_hooks.clear()
    with Engine(model, config=CONFIG.replace(strict=True)) as engine:
        engine.generate(prompts(5), GREEDY)
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
        with pytest.raises(hf_paged.KernelUnavailable, match="strict: prefix sharing is off"):
            engine.add(prompts(5)[0], GREEDY)
    with Engine(model, config=CONFIG.replace(prefix_cache=False)) as engine:
        with pytest.raises(hf_paged.KernelUnavailable, match="strict: fused mlp is off: parts of model.layers.0.mlp"):
            hf_paged.explain(model).raise_on_fallback()


def test_transformers_own_hooks_switch_nothing_off(engine, model):
    model(torch.tensor([[5, 6]]), output_hidden_states=True)  # leaves recorders behind
    model.enable_input_require_grads()
    assert not hf_paged.explain(model).off
    job = prompts(40)[0]
    for cached in (0, 32):
        assert run(engine, [(job, {"request_id": "r"})])["r"].metrics.num_cached_tokens == cached


def test_backward_hooks_are_stock_s(model, stock):
    def gradients(one) -> list[torch.Tensor]:
        seen = []
        keep = lambda module, inputs, outputs: seen.append(outputs[0].clone())  # noqa: E731
        handle = one.model.layers[1].mlp.register_full_backward_hook(keep)
        ids = torch.tensor([prompts(12)[0]])
        one(ids, labels=ids).loss.backward()
        handle.remove()
        return seen

    expected = gradients(copy.deepcopy(stock))
    hf_paged.patch(model)
    model.generate(torch.tensor([prompts(12)[0]]), max_new_tokens=2, do_sample=False)
    (actual,) = gradients(model)
    assert torch.equal(actual, expected[0])
    hf_paged.unpatch(model)


# Functions of one request


def steer(activation, positions):
    return activation * -0.5


def test_a_request_s_function_changes_that_request_only_and_sees_all_of_it(engine, stock):
    job, other = prompts(50, 23)
    plain, steered = greedy(stock, job), greedy(stock, job, {LAYER: lambda x: x * -0.5})
    assert plain != steered
    seen = []

    def watch(activation, positions):
        assert activation.shape == (len(positions), 48)
        seen.extend(positions.tolist())
        return steer(activation, positions)

    run(engine, [(job, {})])  # its blocks must not be used by the next, nor the next one's by others
    results = run(
        engine,
        [
            (job, {"request_id": "steered", "forward_hooks": {LAYER: watch}}),
            (job, {"request_id": "same prompt"}),
            (other, {"request_id": "other"}),
        ],
    )
    assert tokens(results["steered"]) == steered and sorted(seen) == list(range(len(job) + 7))
    assert tokens(results["same prompt"]) == plain and tokens(results["other"]) == greedy(stock, other)
    assert results["steered"].metrics.num_cached_tokens == 0 < results["same prompt"].metrics.num_cached_tokens
    assert not hf_paged.explain(engine.model.module).off  # a request's own functions are nobody else's business
    assert not any(module._forward_hooks for module in engine.model.module.modules())


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens",
        "model.layers.0.self_attn",
        "model.layers.0.self_attn.k_proj",
        "model.layers.2.mlp.gate_proj",
        "model.layers.1.input_layernorm",
        "model.norm",
        "model",
        "lm_head",
    ],
)
def test_functions_on_every_kind_of_module_act_as_stock_s_hooks(engine, stock, name):
    """A tuple's first tensor, a part that a fused kernel bypasses, the head with its few rows."""

    def bend(x):
        if isinstance(x, tuple):
            return (bend(x[0]), *x[1:])
        if isinstance(x, dict):
            x["last_hidden_state"] = bend(x["last_hidden_state"])
            return x
        return x * torch.linspace(-1, 1.5, x.shape[-1])

    job, other = prompts(30, 30)
    results = run(
        engine,
        [
            (other, {"request_id": "other"}),
            (job, {"request_id": "bent", "forward_hooks": {name: lambda x, positions: bend(x)}}),
        ],
    )
    assert tokens(results["bent"]) == greedy(stock, job, {name: bend}) != greedy(stock, job)
    assert tokens(results["other"]) == greedy(stock, other)


def test_changes_in_place_and_by_position(engine, stock):
    def late(activation, positions):
        activation[positions >= 10] *= -0.5

    job = prompts(20)[0]
    expected = copy.deepcopy(stock)

    def hook(module, args, output):
        where = torch.arange(output.shape[1]) + (0 if output.shape[1] > 1 else 10)  # later calls are decodes
        return torch.where((where >= 10)[None, :, None], output * -0.5, output)

    expected.get_submodule(LAYER).register_forward_hook(hook)
    results = run(engine, [(job, {"request_id": "r", "forward_hooks": {LAYER: late}}), (job, {"request_id": "other"})])
    assert tokens(results["r"]) == greedy(expected, job) != greedy(stock, job)
    assert tokens(results["other"]) == greedy(stock, job)


def test_completions_of_a_request_with_functions_share_its_prompt(engine, stock):
    job = prompts(32)[0]
    engine.reset_stats()
    params = SamplingParams(n=3, temperature=0, max_tokens=8, ignore_eos=True)
    output = run(engine, [(job, {"request_id": "r", "params": params, "forward_hooks": {LAYER: steer}})])["r"]
    assert [c.token_ids for c in output.outputs] == [greedy(stock, job, {LAYER: lambda x: x * -0.5})] * 3
    assert engine.stats()["tokens"] == 32 + 3 * 7


def test_preempted_requests_with_functions_are_computed_again(model, stock):
    jobs = prompts(40, 41, 42, 43)
    memory = 12 * 16 * 3 * 2 * 2 * 12 * 4  # 12 blocks
    with Engine(model, config=CONFIG.replace(kv_cache_memory=memory)) as engine:
        params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
        hooks = {"forward_hooks": {LAYER: steer}}
        results = run(engine, [(job, {"request_id": str(i), **hooks}) for i, job in enumerate(jobs)], params=params)
        assert engine.stats()["preemptions"] > 0
    for i, job in enumerate(jobs):
        assert tokens(results[str(i)]) == greedy(stock, job, {LAYER: lambda x: x * -0.5}, new=30)


def test_nothing_is_guessed_for_a_request_with_functions(model, stock):
    job, seen = [7, 8, 9, 10] * 8, []
    with Engine(model, config=CONFIG.replace(speculation="ngram")) as engine:
        hooks = {LAYER: lambda _, positions: seen.extend(positions.tolist())}
        results = run(engine, [(job, {"request_id": "r", "forward_hooks": hooks}), (job, {"request_id": "other"})])
    assert tokens(results["r"]) == tokens(results["other"]) == greedy(stock, job)
    assert seen == list(range(len(job) + 7))
    assert results["r"].metrics.num_draft_tokens == 0 < results["other"].metrics.num_draft_tokens


def test_nothing_is_guessed_while_a_forward_hook_might_act_on_guesses(model, stock):
    """This one changes the last row of every request, which is its newest token: with guesses it would be another."""
    job = [7, 8, 9, 10] * 8

    def steer_newest(module, args, output):
        for segment in hf_paged.current_batch().segments:
            output[0, segment.rows.stop - 1] *= -0.5
        return output

    def outputs(engine):
        return tokens(run(engine, [(job, {"request_id": "r"})])["r"])

    with Engine(model, config=CONFIG) as engine:
        handle = model.get_submodule(LAYER).register_forward_hook(steer_newest)
        expected = outputs(engine)
    handle.remove()
    hf_paged.patch(model, CONFIG.replace(speculation="ngram"))
    with Engine(model) as engine:
        assert outputs(engine) == greedy(stock, job) and engine.stats()["draft_tokens"] > 0
        handle = model.get_submodule(LAYER).register_forward_hook(steer_newest)
        engine.reset_stats()
        assert outputs(engine) == expected != greedy(stock, job)
        assert engine.stats()["draft_tokens"] == 0
        assert "guesses: forward hooks, on" in str(hf_paged.explain(model))
        handle.remove()


def fail(activation, positions):
    raise LookupError("nothing there")


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ({LAYER: fail}, "LookupError: nothing there"),
        ({LAYER: lambda x, p: x[:, :5]}, rf"function on '{LAYER}' returned \[\d+, 5\] torch.float32; it must return"),
        ({LAYER: lambda x, p: x.double()}, r"torch.float64; it must return None or a tensor \[\d+, 48\] torch.float32"),
        ({LAYER: lambda x, p: "x"}, f"function on '{LAYER}' returned str"),
        ({LAYER: lambda x: x}, "TypeError"),
        ({LAYER: lambda x, p: fail(x, p) if p[0] > 20 else None}, "LookupError"),
        ({"model.rotary_emb": lambda x, p: x, "model.layers.0": fail}, "LookupError"),
    ],
    ids=["raises", "shape", "dtype", "type", "signature", "raises-in-decode", "second-module"],
)
@pytest.mark.parametrize("n", [1, 2])
def test_a_function_that_fails_ends_its_own_request_only(engine, stock, hooks, message, n):
    jobs = prompts(20, 60, 9)
    params = SamplingParams(n=n, temperature=0, max_tokens=8, ignore_eos=True)
    options = [{}, {"forward_hooks": hooks, "params": params}, {}]
    results = run(engine, [(job, {"request_id": str(i), **options[i]}) for i, job in enumerate(jobs)])
    assert tokens(results["0"]) == greedy(stock, jobs[0]) and tokens(results["2"]) == greedy(stock, jobs[2])
    assert isinstance(results["1"].error, RequestFailed) and results["1"].finished
    assert all(completion.finish_reason == "error" for completion in results["1"].outputs)
    with pytest.raises(RequestFailed, match=message):
        raise results["1"].error


def test_a_module_that_does_not_run_is_an_error(engine, model, stock):
    model.spare = torch.nn.Linear(4, 4)
    job = prompts(9)[0]
    spare = {"request_id": "r", "forward_hooks": {"spare": steer}}
    results = run(engine, [(job, spare), (job, {"request_id": "other"})])
    assert "module 'spare' did not run" in str(results["r"].error)
    assert tokens(results["other"]) == greedy(stock, job)


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ({"model.layer.1": steer}, r"no module 'model.layer.1'; did you mean model.layers.1"),
        ({"": steer}, "no module ''"),
        ({5: steer}, "no module 5"),
        ({"model.layers": steer}, "ModuleList, which is never called"),
        ({LAYER: 3}, f"{LAYER!r} needs a function, got int"),
        ([steer], "must map module names to functions, got list"),
    ],
)
def test_wrong_functions_are_refused_when_added(engine, hooks, message):
    with pytest.raises(InvalidArgument, match=f"forward_hooks.*{message}"):
        engine.add(prompts(5)[0], GREEDY, forward_hooks=hooks)


def test_the_async_engine_takes_functions(model, stock):
    job = prompts(20)[0]

    async def main():
        async with AsyncEngine(Engine(model, config=CONFIG)) as engine:
            return await asyncio.gather(
                engine.complete(job, GREEDY, forward_hooks={LAYER: steer}), engine.complete(job, GREEDY)
            )

    steered, plain = asyncio.run(main())
    assert tokens(steered) == greedy(stock, job, {LAYER: lambda x: x * -0.5}) and tokens(plain) == greedy(stock, job)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gpt_oss", "model.layers.1.mlp"),
        ("bloom", "transformer.h.1"),
        ("deepseek_v3", "model.layers.1.self_attn.o_proj"),
        ("bamba", "model.layers.0.mamba"),
        ("qwen3_next", "model.layers.2"),
    ],
)
def test_functions_on_other_kinds_of_layers(family, name):
    def bend(x):
        return (bend(x[0]), *x[1:]) if isinstance(x, tuple) else x * torch.linspace(-1, 1.5, x.shape[-1])

    model = tiny_model(family)
    job, other = prompts(30, 30)
    expected, plain = greedy(model, job, {name: bend}), greedy(model, other)
    assert expected != greedy(model, job)
    with Engine(model, config=CONFIG) as engine:
        bent = {"request_id": "bent", "forward_hooks": {name: lambda x, positions: bend(x)}}
        results = run(engine, [(other, {"request_id": "other"}), (job, bent)])
    assert tokens(results["bent"]) == expected and tokens(results["other"]) == plain
