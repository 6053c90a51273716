"""PEFT adapters beside each other in one batch: every request against stock PEFT with its adapter alone."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import random
import shutil
from pathlib import Path

import peft
import pytest
import torch
from peft_adapters import LAYERS, TUNERS, WARNINGS, shake
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoModelForSequenceClassification

import hf_paged
from hf_paged import (
    AsyncEngine,
    Engine,
    EngineConfig,
    InvalidArgument,
    KernelUnavailable,
    SamplingParams,
    UnsupportedOption,
)
from hf_paged.hf.swap import Swapped

pytestmark = pytest.mark.filterwarnings(*WARNINGS)

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "plain": dict(r=4, lora_dropout=0.1, **LAYERS),
    "patterns": dict(r=8, lora_alpha=3, use_rslora=True, target_modules="all-linear", rank_pattern={"q_proj": 2},
                     alpha_pattern={"k_proj": 7}),
    "dora": dict(r=4, use_dora=True, target_modules=["q_proj", "gate_proj", "o_proj"]),
    "lora_bias": dict(r=4, lora_bias=True, target_modules=["up_proj", "o_proj"]),
    "saved": dict(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    "ends": dict(r=4, target_modules=["embed_tokens", "lm_head"]),
    "one_layer": dict(r=3, target_modules=ALL, layers_to_transform=[1]),
}  # fmt: skip


def wrapped(family: str = "llama", seed: int = 1, config: str = "LoraConfig", **options) -> torch.nn.Module:
    model = peft.get_peft_model(tiny_model(family), getattr(peft, config)(task_type="CAUSAL_LM", **options))
    shake(model, seed)
    return model.eval()


def greedy_alone(model, prompt: list[int], count: int = 8) -> list[int]:
    output = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    return output[0, len(prompt) :].tolist()


def logprobs_alone(model, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)


def random_prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Some share a long prefix: adapters must not find each other's blocks."""
    draw = random.Random(seed)
    shared = [draw.randrange(3, 190) for _ in range(33)]
    prompts = [[draw.randrange(3, 190) for _ in range(draw.randrange(1, 40))] for _ in range(count)]
    return [shared + prompt[:5] if draw.random() < 0.5 else prompt for prompt in prompts]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[dict[str | None, torch.nn.Module], dict[str, Path]]:
    """(stock's models by adapter, the folders of the adapters); None: no adapter."""
    models, paths = {None: tiny_model("llama")}, {}
    for seed, (name, options) in enumerate(KINDS.items(), 1):
        models[name] = wrapped(seed=seed, **options)
        paths[name] = tmp_path_factory.mktemp(name)
        models[name].save_pretrained(paths[name])
    return models, paths


GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=2)
SMALL = EngineConfig(max_batch_tokens=32, max_num_seqs=6)


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "plain"])
def test_every_request_of_a_mixture_is_stock_s_with_its_adapter_alone(folders, fuse):
    models, paths = folders
    prompts = random_prompts(24)
    names = [random.Random(1).sample([*models], len(models))[place % len(models)] for place in range(len(prompts))]
    with Engine(tiny_model("llama"), config=SMALL.replace(fuse=fuse)) as engine:
        for name, path in paths.items():
            info = engine.load_adapter(name, path)
            assert info.apart is None and info.num_bytes > 0 and info.kind == "LORA"
        assert engine.adapters["patterns"].rank == 8 and list(engine.adapters) == list(paths)
        for _ in range(2):  # the second time from the prefix cache
            outputs = engine.generate(prompts, GREEDY, adapter=names)
            for prompt, name, output in zip(prompts, names, outputs):
                tokens = output.outputs[0].token_ids
                assert tokens == greedy_alone(models[name], prompt), name
                expected = logprobs_alone(models[name], prompt + tokens)[len(prompt) - 1 :]
                for row, entry in zip(expected, output.outputs[0].logprobs):
                    assert all(abs(row[token] - one.logprob) < 1e-4 for token, one in entry.items())
        assert any(output.metrics.num_cached_tokens for output in outputs)
        assert engine.stats()["adapter_bytes"] == sum(info.num_bytes for info in engine.adapters.values())
        assert "saved: LORA of rank 4 from " in str(hf_paged.explain(engine.model.module))
        assert not hf_paged.explain(engine.model.module).fallbacks.keys() - {"kernels"}


def test_nobody_s_bits_depend_on_others_and_a_batch_without_adapters_is_as_ever(folders):
    _, paths = folders
    prompts = random_prompts(12, seed=3)
    names = [*paths, None] * 2
    config = SMALL.replace(prefix_cache=False, max_num_seqs=12, max_batch_tokens=64)

    def run(engine, jobs) -> list:
        outputs = engine.generate([prompt for prompt, _ in jobs], GREEDY, adapter=[name for _, name in jobs])
        return [(output.outputs[0].token_ids, output.outputs[0].cumulative_logprob) for output in outputs]

    jobs = list(zip(prompts, names))
    with Engine(tiny_model("llama"), config=config) as engine:
        plain = run(engine, [(prompt, None) for prompt in prompts])
        types = [type(module) for module in engine.model.module.modules()]
        for name, path in paths.items():
            engine.load_adapter(name, path)
        assert run(engine, [(prompt, None) for prompt in prompts]) == plain
        together = run(engine, jobs)
        assert [run(engine, [job])[0] for job in jobs] == together
        assert [entry for entry, name in zip(together, names) if name is None] == [
            entry for entry, name in zip(plain, names) if name is None
        ]
        for name in paths:
            engine.unload_adapter(name)
        assert not engine.adapters and engine.stats()["adapter_bytes"] == 0
        assert [type(module) for module in engine.model.module.modules()] == types
        assert run(engine, [(prompt, None) for prompt in prompts]) == plain


def test_preempted_speculating_and_several_completions(folders):
    models, paths = folders
    prompts = [prompt * 3 for prompt in random_prompts(9, seed=5)]
    names = ["plain", "dora", None] * 3
    model = tiny_model("llama")
    block = 2 * 3 * 2 * 12 * 4 * 16  # keys and values, layers, heads, size, bytes, tokens
    config = EngineConfig(kv_cache_memory=16 * block, max_batch_tokens=64, speculation="ngram")
    with Engine(model, config=config) as engine:
        for name in ("plain", "dora"):
            engine.load_adapter(name, paths[name])
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
        outputs = engine.generate(prompts, params, adapter=names)
        assert sum(output.metrics.num_preemptions for output in outputs) > 0
        assert engine.stats()["draft_tokens"] > 0
        for prompt, name, output in zip(prompts, names, outputs):
            assert output.outputs[0].token_ids == greedy_alone(models[name], prompt, 24)
        several = SamplingParams(n=3, seed=7, max_tokens=8, ignore_eos=True)
        together = engine.generate(prompts[:3], several, adapter=names[:3])
        for prompt, name, output in zip(prompts, names, together):
            (alone,) = engine.generate([prompt], several, adapter=name)
            assert [one.token_ids for one in alone.outputs] == [one.token_ids for one in output.outputs]
        assert len({tuple(one.token_ids) for one in together[0].outputs}) > 1
        engine.check_integrity()


def test_embeddings_scores_and_classes(folders, tmp_path):
    models, paths = folders
    prompts = random_prompts(4, seed=8)
    ia3 = wrapped(config="IA3Config", **TUNERS["ia3"][1])
    ia3.save_pretrained(tmp_path / "ia3")
    with Engine(tiny_model("llama"), config=SMALL) as engine:
        for name, path in (("plain", paths["plain"]), ("ia3", tmp_path / "ia3")):
            engine.load_adapter(name, path)
        engine.add(prompts[0] * 2, SamplingParams(max_tokens=30, ignore_eos=True), adapter="ia3")  # a forward beside
        for name, model in (("plain", models["plain"]), ("ia3", ia3), (None, models[None])):
            outputs = engine.embed(prompts, normalize=False, adapter=name)
            for prompt, output in zip(prompts, outputs):
                with torch.no_grad():
                    states = model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
                assert (torch.tensor(output.embedding) - states.mean(0)).abs().max() < 1e-4
            (score,) = engine.score(prompts[0], [[5, 6, 7]], adapter=name)
            rows = logprobs_alone(model, prompts[0] + [5, 6, 7])[len(prompts[0]) - 1 : -1]
            assert abs(score.logprob - rows.gather(1, torch.tensor([[5], [6], [7]])).sum()) < 1e-3

    def classifier():
        torch.manual_seed(0)
        config = tiny_model("llama").config
        config.num_labels, config.pad_token_id = 3, 0
        return AutoModelForSequenceClassification.from_config(config).eval()

    trained = peft.get_peft_model(classifier(), peft.LoraConfig(task_type="SEQ_CLS", r=4, **LAYERS)).eval()
    shake(trained)
    trained.save_pretrained(tmp_path / "classifier")
    plain = classifier()
    with Engine(classifier(), config=SMALL) as engine:
        assert engine.load_adapter("trained", tmp_path / "classifier").apart is None
        for name, model in (("trained", trained), (None, plain)):
            for prompt, output in zip(prompts, engine.classify(prompts, "none", adapter=name)):
                with torch.no_grad():
                    expected = model(input_ids=torch.tensor([prompt])).logits[0]
                assert (torch.tensor(output.scores) - expected).abs().max() < 1e-4


# Adapters that run apart

APART = ("ia3", "trainable_tokens", "ln_tuning", "adalora", "vera")
REST = [name for name in TUNERS if name not in (*APART, "adaption_prompt")]


@pytest.mark.parametrize("live", [False, True], ids=["folder", "live"])
@pytest.mark.parametrize(
    "name", [*APART, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)]
)
def test_every_kind_of_adapter_beside_others(name, live, folders, tmp_path):
    models, paths = folders
    config, options = TUNERS[name]
    model = wrapped(config=config, **options)
    if not live:
        model.save_pretrained(tmp_path)
    prompts = random_prompts(6, seed=2)
    names = ["other", "plain", None] * 2
    with Engine(tiny_model("llama"), config=SMALL) as engine:
        engine.load_adapter("plain", paths["plain"])
        info = engine.load_adapter("other", model if live else tmp_path)
        outputs = engine.generate(prompts, GREEDY, adapter=names)
        stock = {**models, "other": model}
        for prompt, one, output in zip(prompts, names, outputs):
            assert output.outputs[0].token_ids == greedy_alone(stock[one], prompt)
        together = name.partition("-")[0] == "lora"
        assert (info.apart is None) == together
        assert together or "forwards of its own" in hf_paged.explain(engine.model.module).fallbacks["adapter other"]


def test_strict_refuses_what_runs_apart(tmp_path):
    wrapped(config="IA3Config", **TUNERS["ia3"][1]).save_pretrained(tmp_path)
    with Engine(tiny_model("llama"), config=EngineConfig(strict=True)) as engine:
        with pytest.raises(KernelUnavailable, match="strict: adapter 'ia3' .* has PEFT's ia3"):
            engine.load_adapter("ia3", tmp_path)
        assert not engine.adapters


FAMILIES = {
    "conv1d": ("gpt2", dict(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True), True),
    "joined": ("phi3-window", dict(target_modules=["qkv_proj", "gate_up_proj"]), True),
    "tied": ("llama-tied-llama3-rope", dict(target_modules=["embed_tokens", "q_proj"]), True),
    "scaled": ("gemma2", dict(target_modules=["embed_tokens", "o_proj"]), True),
    "experts": ("qwen3_moe", dict(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]), False),
    "state": ("bamba", dict(target_modules=["in_proj", "q_proj"]), False),
}


@pytest.mark.parametrize("place", FAMILIES)
def test_families(place, tmp_path):
    family, options, together = FAMILIES[place]
    model = wrapped(family, r=4, **options)
    model.save_pretrained(tmp_path)
    plain = tiny_model(family)
    prompts = random_prompts(4, seed=4)
    with Engine(tiny_model(family), config=SMALL) as engine:
        info = engine.load_adapter("one", tmp_path)
        outputs = engine.generate(prompts, GREEDY, adapter=["one", None] * 2)
        for prompt, one, output in zip(prompts, [model, plain] * 2, outputs):
            assert output.outputs[0].token_ids == greedy_alone(one, prompt)
    assert (info.apart is None) == together


def test_biases_of_the_model_that_belong_to_an_adapter(tmp_path):
    model = wrapped("qwen2", r=4, target_modules=["q_proj", "o_proj"], bias="all")
    model.save_pretrained(tmp_path)
    prompts = random_prompts(4)
    with Engine(tiny_model("qwen2"), config=SMALL) as engine:
        assert engine.load_adapter("biased", tmp_path).apart is None
        outputs = engine.generate(prompts, GREEDY, adapter=["biased", None] * 2)
    for prompt, one, output in zip(prompts, [model, tiny_model("qwen2")] * 2, outputs):
        assert output.outputs[0].token_ids == greedy_alone(one, prompt)
    model = wrapped("gpt2", r=4, target_modules=["c_attn"], fan_in_fan_out=True, bias="all")
    model.save_pretrained(tmp_path)
    with Engine(tiny_model("gpt2")) as engine:
        with pytest.raises(UnsupportedOption, match="its own biases cannot be had, because .* of its own for .*ln_1"):
            engine.load_adapter("biased", tmp_path)


def test_bf16_is_as_near_as_peft(tmp_path):
    model = wrapped(r=4, **LAYERS)
    model.save_pretrained(tmp_path)
    prompt = random_prompts(1)[0]
    exact = logprobs_alone(model, prompt)[-1]
    narrow = peft.PeftModel.from_pretrained(tiny_model("llama").bfloat16(), tmp_path)
    error = (logprobs_alone(narrow, prompt)[-1].float() - exact).abs().max()
    with Engine(tiny_model("llama").bfloat16()) as engine:
        engine.load_adapter("one", tmp_path)
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=20)
        outputs = engine.generate([prompt] * 2, params, adapter=["one", None])
    entries = outputs[0].outputs[0].logprobs[0]
    assert max(abs(entry.logprob - exact[token]) for token, entry in entries.items()) < 2 * error
    assert entries != outputs[1].outputs[0].logprobs[0]


# Weights of the caller's

def test_training_one_adapter_while_others_are_served(folders):
    models, paths = folders
    model = wrapped(r=4, **LAYERS)
    model.add_adapter("second", peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=ALL))
    prompts = random_prompts(4, seed=6)
    engine = Engine(model, config=SMALL)
    engine.load_adapter("trained", model, adapter_name="default")
    engine.load_adapter("plain", paths["plain"])
    with pytest.raises(InvalidArgument, match="adapter_name must say which .* 'default', 'second'"):
        engine.load_adapter("which", model)
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if "default" in name], lr=1.0)
    names = ["trained", "plain", "__base__", None]
    engine.add(prompts[0] * 2, SamplingParams(max_tokens=30, ignore_eos=True), adapter="plain")
    seen = set()
    for step in range(3):
        outputs = engine.generate(prompts * 2, GREEDY, adapter=names * 2)
        stock = copy.deepcopy(model).eval()
        assert not any(isinstance(module, Swapped) for module in stock.modules())
        for prompt, name, output in zip(prompts * 2, names * 2, outputs):
            if name in ("trained", None):  # the one that is active
                expected = greedy_alone(stock, prompt)
            else:
                expected = greedy_alone(models["plain" if name == "plain" else None], prompt)
            assert output.outputs[0].token_ids == expected, (step, name)
        seen.add(tuple(outputs[0].outputs[0].token_ids))
        model.train()
        model(input_ids=torch.tensor([prompts[0]]), labels=torch.tensor([prompts[0]])).loss.backward()
        optimizer.step()
        model.eval()
    assert len(seen) > 1
    model.merge_adapter()
    with pytest.raises(InvalidArgument, match="default is merged into the model"):
        engine.add(prompts[0], adapter="plain")
    engine.close()


def test_an_adapter_of_another_model_s_is_used_as_it_is():
    other, prompt = wrapped(r=4, use_dora=True, **LAYERS), random_prompts(1)[0] * 2
    with Engine(tiny_model("llama")) as engine:
        engine.load_adapter("live", other)
        for change in (lambda: None, lambda: shake(other, 8), lambda: scale(other)):
            change()
            (output,) = engine.generate([prompt], GREEDY, adapter="live")
            assert output.outputs[0].token_ids == greedy_alone(other, prompt)
        other.delete_adapter("default")
        (after,) = engine.generate([prompt], GREEDY, adapter="live")
        assert after.outputs[0].token_ids == output.outputs[0].token_ids  # what it was, until it is unloaded
        engine.unload_adapter("live")


def test_an_adapter_of_another_model_s_that_runs_apart_is_used_as_it_is():
    other, prompt = wrapped(config="IA3Config", **TUNERS["ia3"][1]), random_prompts(1)[0] * 2
    parameters = [parameter for name, parameter in other.named_parameters() if "ia3" in name]

    def replace() -> None:
        for parameter in parameters:
            parameter.data = parameter.data * 1.5

    seen = set()
    with Engine(tiny_model("llama")) as engine:
        assert engine.load_adapter("live", other).apart
        for change in (lambda: None, lambda: shake(other, 8), replace):
            change()
            (output,) = engine.generate([prompt], GREEDY, adapter="live")
            assert output.outputs[0].token_ids == greedy_alone(other, prompt)
            seen.add(output.outputs[0].logprobs[0][output.outputs[0].token_ids[0]].logprob)
    assert len(seen) == 3


def scale(model) -> None:
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("default", 0.3)


# Coming and going

def test_a_name_used_again_is_another_adapter(folders):
    models, paths = folders
    prompt = random_prompts(1)[0] * 3
    with Engine(tiny_model("llama")) as engine:
        for kind in ("plain", "dora", "plain"):
            engine.load_adapter("name", paths[kind])
            for cached in (False, True):
                (output,) = engine.generate([prompt], GREEDY, adapter="name")
                assert output.outputs[0].token_ids == greedy_alone(models[kind], prompt)
                assert bool(output.metrics.num_cached_tokens) == cached
            engine.unload_adapter("name")


def test_unloading_waits_for_nobody(folders):
    _, paths = folders
    with Engine(tiny_model("llama")) as engine:
        engine.load_adapter("one", paths["plain"])
        engine.load_adapter("two", paths["dora"])
        name = engine.add([5, 6, 7], SamplingParams(max_tokens=20, ignore_eos=True), adapter="one")
        engine.step()
        with pytest.raises(InvalidArgument, match="adapter 'one' cannot be unloaded: 1 unfinished requests have it"):
            engine.unload_adapter("one")
        engine.unload_adapter("two")
        prepared = engine.prepare([5, 6], adapter="one")
        engine.abort(name)
        engine.unload_adapter("one")
        with pytest.raises(InvalidArgument, match="adapter was unloaded before"):
            engine.admit(prepared)
        with pytest.raises(InvalidArgument, match="adapter 'one' is not loaded; there is none"):
            engine.add([5, 6, 7], adapter="one")


def test_asyncio(folders):
    models, paths = folders
    prompt = random_prompts(1)[0]

    async def main() -> None:
        async with AsyncEngine(Engine(tiny_model("llama"))) as engine:
            await engine.load_adapter("plain", paths["plain"])
            output = await engine.complete(prompt, GREEDY, adapter="plain")
            assert output.outputs[0].token_ids == greedy_alone(models["plain"], prompt)
            await engine.unload_adapter("plain")
            with pytest.raises(InvalidArgument, match="adapter 'plain' is not loaded"):
                await engine.complete(prompt, GREEDY, adapter="plain")

    asyncio.run(main())


# What is refused

def edit_config(**changes):
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_weights(change):
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return edit


def without_one(weights: dict) -> dict:
    return dict(list(weights.items())[1:])


def with_another(weights: dict) -> dict:
    return weights | {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 48)}


def with_nan(weights: dict) -> dict:
    first = min(weights)
    return weights | {first: torch.full_like(weights[first], torch.nan)}


def as_pickle(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    torch.save(load_file(path), folder / "adapter_model.bin")
    path.unlink()


BROKEN = {
    "no folder": (shutil.rmtree, "there is no .*adapter_config.json"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "there is no .*safetensors"),
    "pickle": (as_pickle, "adapter_model.bin is a pickle"),
    "no json": (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not the configuration of an adapter"),
    "no kind": (edit_config(peft_type="MAGIC"), "is not the configuration of an adapter"),
    "cut": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\1\0\0"), "cannot be read"),
    "wrong rank": (edit_config(r=7), "does not fit this model"),
    "wrong layers": (edit_config(target_modules=["query"]), "does not fit this model"),
    "missing": (edit_weights(without_one), "lacks .*lora_"),
    "not a number": (edit_weights(with_nan), "holds infinities or NaN in .*lora_"),
    "too many": (edit_weights(with_another), "no place for .*layers.9"),
    "unknown option": (edit_config(magic=True), "this PEFT knows no magic of LORA"),
    "pissa": (edit_config(init_lora_weights="pissa"), "init_lora_weights='pissa' changes the model's own weights"),
    "alora": (edit_config(alora_invocation_tokens=[1]), "alora_invocation_tokens cannot be had"),
    "replicated": (edit_config(layer_replication=[[0, 2]]), "layer_replication cannot be had"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_by_name_and_harms_nobody(case, folders, tmp_path):
    models, paths = folders
    folder = shutil.copytree(paths["plain"], tmp_path / "copy")
    change, message = BROKEN[case]
    change(folder)
    prompt = random_prompts(1)[0]
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [parameter.requires_grad for parameter in model.parameters()]
    with Engine(model) as engine:
        engine.add(prompt, GREEDY)
        engine.step()
        with pytest.raises(InvalidArgument, match=f"adapter 'bad'.*{message}"):
            engine.load_adapter("bad", folder)
        assert not engine.adapters
        assert engine.generate([prompt], GREEDY)[0].outputs[0].token_ids == greedy_alone(models[None], prompt)
        assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


REFUSED = {
    "taken": (dict(name="plain"), "adapter 'plain' is loaded already"),
    "unnamed": (dict(name=""), "name must be a name"),
    "reserved": (dict(name="__base__"), "name must be a name"),
    "number": (dict(source=3), "source must be a folder or a PeftModel"),
    "which": (dict(adapter_name="x"), "adapter_name is for adapters of a PeftModel"),
    "rank": (dict(max_rank=2), "adapter 'new' has rank 4, above max_rank 2"),
    "another family": (lambda: dict(source=wrapped("gpt2", r=4, target_modules=["c_attn"], fan_in_fan_out=True)),
                       "is for another model: this one has no"),
    "prompt tuning": (lambda: dict(source=wrapped(config="PromptTuningConfig", num_virtual_tokens=4)),
                      "PROMPT_TUNING cannot run beside others"),
    "batch": (lambda: dict(source=wrapped(config="LilyConfig", **LAYERS)), "PEFT's lily has not been proven"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, folders):
    _, paths = folders
    options, message = REFUSED[case]
    options = dict(name="new", source=paths["plain"]) | (options() if callable(options) else options)
    with Engine(tiny_model("llama")) as engine:
        engine.load_adapter("plain", paths["plain"])
        with pytest.raises(InvalidArgument, match=message):
            engine.load_adapter(options.pop("name"), options.pop("source"), **options)
        assert list(engine.adapters) == ["plain"]
        with pytest.raises(InvalidArgument, match="adapter 'nobody' is not loaded; there is 'plain'"):
            engine.add([5, 6], adapter="nobody")
        with pytest.raises(InvalidArgument, match="adapter has 1 entries for 2 prompts"):
            engine.generate([[5], [6]], adapter=["plain"])


def test_another_size_is_refused(tmp_path):
    model = tiny_model("llama", hidden_size=64)
    peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **LAYERS)).save_pretrained(tmp_path)
    with Engine(tiny_model("llama")) as engine:
        with pytest.raises(InvalidArgument, match="adapter 'big' does not fit this model: .*size mismatch"):
            engine.load_adapter("big", tmp_path)


# generate

def test_generate_with_adapter_names(folders):
    models, paths = folders
    model = tiny_model("llama")
    hf_paged.patch(model)
    engine = hf_paged.engine_of(model)
    for name in ("plain", "saved"):
        engine.load_adapter(name, paths[name])
    ids = torch.tensor([random_prompts(1)[0]] * 3)
    names = ["plain", "__base__", "saved"]
    stock = [models["plain"], models[None], models["saved"]]
    for options in ({}, dict(num_beams=2), dict(num_beams=2, num_return_sequences=2)):
        options |= dict(max_new_tokens=6, do_sample=False)
        got = model.generate(input_ids=ids, adapter_names=names, **options)
        assert torch.equal(got, torch.cat([one.generate(input_ids=ids[:1], **options) for one in stock]))
    short = dict(max_new_tokens=2, do_sample=False)
    assert torch.equal(model.generate(ids[:1], **short), models[None].generate(ids[:1], **short))
    wrong = {"'nobody' is not loaded": ["nobody"] * 3, "2 names for 3 rows": names[:2], "must be a list": "plain"}
    for message, value in wrong.items():
        with pytest.raises(InvalidArgument, match=message):
            model.generate(ids, adapter_names=value, **short)
    with pytest.warns(UserWarning, match="output_attentions: runs on transformers"):
        with pytest.raises(UnsupportedOption, match="adapter_names: output_attentions takes"):
            model.generate(ids, adapter_names=names, output_attentions=True, return_dict_in_generate=True, **short)
    copied = pickle.loads(pickle.dumps(model))
    assert not any(isinstance(module, Swapped) for module in copied.modules())
    hf_paged.unpatch(model)
    assert not any(isinstance(module, Swapped) for module in model.modules())


# Quantized layers


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_on_quantized_layers(kind, tmp_path):
    sizes = dict(hidden_size=64, intermediate_size=128)

    def quantized() -> torch.nn.Module:
        model = hf_paged.patch(tiny_model("llama", **sizes), quantization=kind)
        return hf_paged.unpatch(model)  # it stays quantized

    models = {None: quantized()}
    for seed, targets in enumerate((["q_proj", "v_proj", "down_proj"], "all-linear"), 1):
        models[str(seed)] = peft.get_peft_model(
            quantized(), peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets)
        ).eval()
        shake(models[str(seed)], seed)
        models[str(seed)].save_pretrained(tmp_path / str(seed))
    prompts = random_prompts(6, seed=9)
    names = [*models] * 2
    with Engine(quantized(), config=SMALL) as engine:
        for name in models:
            if name is not None:
                assert engine.load_adapter(name, tmp_path / name).apart is None
        for prompt, name, output in zip(prompts, names, engine.generate(prompts, GREEDY, adapter=names)):
            assert output.outputs[0].token_ids == greedy_alone(models[name], prompt)
