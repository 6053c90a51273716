"""PEFT adapters on a patched model: their effect, every way of changing it, training them, and what is refused."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from peft_adapters import LAYERS, TUNERS, WARNINGS, shake
from tiny_models import tiny_model

import hf_paged
from hf_paged import Engine, KernelUnavailable, RequestFailed, SamplingParams, UnsupportedModel
from hf_paged.hf.patch import is_patched
from hf_paged.hf.peft import BY_TOKEN
from hf_paged.hf.swap import Swapped

pytestmark = pytest.mark.filterwarnings(*WARNINGS)

PROMPT = torch.tensor([[5, 9, 11, 40, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20] * 2])
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def with_adapter(config: str = "LoraConfig", **options) -> torch.nn.Module:
    model = tiny_model("llama")
    options = options or dict(r=4, lora_dropout=0.1, **LAYERS)
    wrapped = peft.get_peft_model(model, getattr(peft, config)(task_type="CAUSAL_LM", **options))
    shake(wrapped)
    return wrapped.eval()


def greedy(model, **options) -> torch.Tensor:
    return model.generate(input_ids=PROMPT, max_new_tokens=8, do_sample=False, **options)


def stock(model) -> torch.Tensor:
    """What an unpatched copy of the model says."""
    plain = copy.deepcopy(model)
    assert not any(isinstance(module, Swapped) for module in plain.modules())
    return greedy(plain)


@pytest.fixture
def model():
    model = with_adapter()
    yield model
    if is_patched(model):
        hf_paged.unpatch(model)


def test_a_wrapped_model_is_patched_inside_and_unpatched(model):
    expected, plain = greedy(model), greedy(tiny_model("llama"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    types = [type(module) for module in model.modules()]
    assert hf_paged.patch(model) is model
    engine = hf_paged.engine_of(model)
    assert engine is hf_paged.engine_of(model.get_base_model())
    assert torch.equal(greedy(model), expected) and not torch.equal(expected, plain)
    assert engine.stats()["steps"] > 0
    report = hf_paged.explain(model)
    assert not report.fallbacks and report.fused["qkv"] == 9  # the layers inside the adapters are merged
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    hf_paged.patch(model, block_size=32)
    assert engine.closed and hf_paged.engine_of(model).config.block_size == 32
    assert hf_paged.unpatch(model) is model and not is_patched(model)
    assert [type(module) for module in model.modules()] == types
    assert torch.equal(greedy(model), expected)


def test_an_engine_takes_a_wrapped_model(model):
    expected = greedy(model)[0, PROMPT.shape[1] :].tolist()
    with Engine(model) as engine:
        assert engine.generate([PROMPT[0].tolist()], GREEDY)[0].outputs[0].token_ids == expected
    assert not is_patched(model)


def test_verify_and_copies(model):
    hf_paged.patch(model, verify=True)
    expected = greedy(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not is_patched(other) and torch.equal(greedy(other), expected)
        hf_paged.patch(other)
        assert torch.equal(greedy(other), expected)


def add_second(model, tmp_path) -> None:
    model.add_adapter("second", peft.LoraConfig(task_type="CAUSAL_LM", r=2, **LAYERS))
    model.set_adapter("second")
    shake(model, seed=2)
    model.set_adapter("default")


def load(model, tmp_path) -> None:
    other = with_adapter(r=3, **LAYERS)
    shake(other, seed=5)
    other.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "loaded")
    model.set_adapter("loaded")


def train(model, tmp_path) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(input_ids=PROMPT, labels=PROMPT).loss.backward()
    optimizer.step()


def scale(model, tmp_path) -> None:
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("default", 0.1)


CHANGES = {
    "set_adapter": lambda model, _: model.set_adapter("second"),
    "both": lambda model, _: model.base_model.set_adapter(["default", "second"]),
    "disable": lambda model, _: model.base_model.disable_adapter_layers(),
    "merge": lambda model, _: model.merge_adapter(),
    "safe_merge": lambda model, _: model.merge_adapter(safe_merge=True),
    "load": load,
    "train": train,
    "scale": scale,
    "delete": lambda model, _: (model.set_adapter("second"), model.delete_adapter("default")),
    "weighted": lambda model, _: (
        model.add_weighted_adapter(["default", "second"], [0.7, 0.6], "mix", combination_type="cat"),
        model.set_adapter("mix"),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("running", [False, True], ids=["idle", "running"])
def test_every_change_of_adapters_reaches_the_next_token(model, tmp_path, change, running):
    """While a request runs, too: the prompt's blocks in the prefix cache are those of the adapter before."""
    add_second(model, tmp_path)
    hf_paged.patch(model)
    engine = hf_paged.engine_of(model)
    before = greedy(model)
    if running:
        engine.add(list(range(3, 20)), SamplingParams(temperature=0, max_tokens=60, ignore_eos=True), request_id="long")
        engine.step()
    CHANGES[change](model, tmp_path)
    model.eval()  # parts of a new adapter are in train mode
    if change not in ("merge", "safe_merge"):
        assert not torch.equal(greedy(model), before)
    for _ in range(2):  # the second time from the prefix cache
        assert torch.equal(greedy(model), stock(model))
    assert engine.has_unfinished() == running
    engine.abort("long")
    if change == "disable":
        model.base_model.enable_adapter_layers()
        assert torch.equal(greedy(model), before)
    if change == "merge":
        model.unmerge_adapter()
        assert torch.equal(greedy(model), stock(model))


def test_disable_adapter_as_a_context(model):
    hf_paged.patch(model)
    expected = greedy(model)
    with model.disable_adapter():
        assert torch.equal(greedy(model), greedy(tiny_model("llama")))
    assert torch.equal(greedy(model), expected)


def test_adapters_put_on_a_patched_model():
    model = tiny_model("llama")
    hf_paged.patch(model)
    plain = greedy(model)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "gate_proj", "lm_head"])
    outer = peft.get_peft_model(model, config)
    assert torch.equal(greedy(outer), plain)  # a fresh adapter adds nothing
    shake(outer)
    outer.eval()
    assert torch.equal(greedy(outer), stock(outer)) and not torch.equal(greedy(outer), plain)
    assert "model.layers.0.mlp" in hf_paged.explain(outer).off["fused mlp"]
    merged = outer.merge_and_unload()
    assert merged is model and is_patched(model) and not hf_paged.explain(model).off
    assert torch.equal(greedy(model), stock(model)) and not torch.equal(greedy(model), plain)


# Every kind of adapter that is let through

QUICK = ("lora", "lora-dora", "ia3", "trainable_tokens")


def test_the_list_of_adapters_is_what_is_tested():
    assert {name.partition("-")[0] for name in TUNERS} == BY_TOKEN


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TUNERS]
)
def test_adapters_in_a_packed_batch_equal_stock_row_by_row(name):
    config, options = TUNERS[name]
    model = with_adapter(config, **options)
    generator = torch.Generator().manual_seed(0)
    jobs = [torch.randint(3, 190, (length,), generator=generator).tolist() for length in (33, 7, 21)]

    def each(one) -> list[list[int]]:
        rows = (one.generate(input_ids=torch.tensor([job]), max_new_tokens=8, do_sample=False) for job in jobs)
        return [row[0, len(job) :].tolist() for row, job in zip(rows, jobs)]

    expected = each(model)
    assert expected != each(tiny_model("llama"))
    with Engine(model, config=hf_paged.EngineConfig(max_batch_tokens=16)) as engine:
        assert [output.outputs[0].token_ids for output in engine.generate(jobs, GREEDY)] == expected


PLACES = {
    "moe": ("qwen3_moe", dict(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])),
    "saved": ("llama", dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    "ends": ("llama", dict(target_modules=["embed_tokens", "lm_head"])),
    "everywhere": ("llama-tied-llama3-rope", dict(target_modules="all-linear", modules_to_save=["lm_head"])),
    "joined": ("phi3-window", dict(target_modules=["qkv_proj", "gate_up_proj"])),
    "own-softmax": ("bloom", dict(target_modules=["query_key_value"])),
    "latent": ("deepseek_v3", dict(target_modules=["q_a_proj", "o_proj"])),
    "state": ("bamba", dict(target_modules=["in_proj", "q_proj"])),
}


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "place", [pytest.param(name, marks=() if name in ("moe", "saved") else pytest.mark.slow) for name in PLACES]
)
def test_lora_in_every_place_before_and_after_patching(place, late):
    family, options = PLACES[place]
    model = tiny_model(family)
    if late:
        hf_paged.patch(model)
        greedy(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **options)).eval()
    shake(wrapped)
    if not late:
        hf_paged.patch(wrapped)
    expected = stock(wrapped)
    assert not torch.equal(expected, greedy(tiny_model(family)))
    for _ in range(2):
        assert torch.equal(greedy(wrapped), expected)


def test_an_adapter_on_what_latent_attention_reads_asks_for_a_new_patch():
    model = tiny_model("deepseek_v3")
    hf_paged.patch(model)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["kv_b_proj"])
    wrapped = peft.get_peft_model(model, config).eval()
    shake(wrapped)
    with pytest.warns(UserWarning, match="latent attention: .* call hf_paged.patch.model. again"):
        assert torch.equal(greedy(wrapped), stock(wrapped))
    with pytest.raises(RequestFailed, match="kv_b_proj"):
        hf_paged.engine_of(wrapped).generate([PROMPT[0].tolist()], GREEDY)
    hf_paged.patch(wrapped)
    assert torch.equal(greedy(wrapped), stock(wrapped))


# Refusals

PROMPT_LEARNING = {
    "PROMPT_TUNING": ("PromptTuningConfig", dict(num_virtual_tokens=4)),
    "PREFIX_TUNING": ("PrefixTuningConfig", dict(num_virtual_tokens=4)),
    "P_TUNING": ("PromptEncoderConfig", dict(num_virtual_tokens=4, encoder_hidden_size=16)),
}


@pytest.mark.filterwarnings("ignore:Position ids are not supported", "ignore:Both `past_key_values` and `cache`")
@pytest.mark.parametrize("name", PROMPT_LEARNING)
def test_prompt_learning_is_refused_by_name_and_stock_on_a_patched_base(name):
    config, options = PROMPT_LEARNING[name]
    model = with_adapter(config, **options)
    for _ in range(5):  # a large effect
        shake(model)
    base, ids = model.get_base_model(), torch.tensor([[5, 9, 11]])

    def short(one) -> torch.Tensor:
        return one.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)

    expected = short(model)
    for use in (hf_paged.patch, Engine, hf_paged.engine_of):
        with pytest.raises(UnsupportedModel, match=f"'default' is {name}.*get_base_model"):
            use(model)
    hf_paged.patch(base)
    with pytest.warns(UserWarning, match="prepare_inputs_for_generation: runs on transformers' own path"):
        assert torch.equal(short(model), expected)
    plain = short(tiny_model("llama"))
    assert torch.equal(short(base), plain)
    if name != "PREFIX_TUNING":  # whose prefixes PEFT 0.21 hands to transformers 5.24 in vain
        assert not torch.equal(plain, expected)
    hf_paged.patch(base, strict=True)
    with pytest.raises(KernelUnavailable, match="strict: prepare_inputs_for_generation"):
        short(model)


WAYS = {
    "rows": {},
    "beams": dict(num_beams=2),
    "scores": dict(return_dict_in_generate=True, output_scores=True),
    "several": dict(num_beams=2, num_return_sequences=2),
}


@pytest.mark.parametrize("way", WAYS)
def test_adapter_names_give_every_row_its_own(model, tmp_path, way):
    add_second(model, tmp_path)
    ids = PROMPT.repeat(3, 1)
    names = ["default", "second", "__base__"]
    options = dict(max_new_tokens=8, do_sample=False, adapter_names=names, **WAYS[way])
    expected = model.generate(input_ids=ids, **options)
    hf_paged.patch(model)
    for _ in range(2):
        got = model.generate(input_ids=ids, **options)
        if way == "scores":
            assert all((a - b).abs().max() < 1e-4 for a, b in zip(got.scores, expected.scores, strict=True))
            got = got.sequences
        assert torch.equal(got, getattr(expected, "sequences", expected))
    assert not hf_paged.explain(model).calls
    assert torch.equal(greedy(model), stock(model))
    with pytest.warns(UserWarning, match="output_attentions: runs on transformers' own path"):
        options = options | dict(return_dict_in_generate=True, output_attentions=True)
        assert torch.equal(model.generate(input_ids=ids, **options).sequences, getattr(expected, "sequences", expected))


def test_adapter_names_outside_of_generate_are_refused(model, tmp_path):
    add_second(model, tmp_path)
    hf_paged.patch(model)
    with model._enable_peft_forward_hooks(adapter_names=["second"]):
        with pytest.raises(RequestFailed, match="UnsupportedOption: adapter_names cannot be used"):
            hf_paged.engine_of(model).generate([PROMPT[0].tolist()], GREEDY)
    assert torch.equal(greedy(model), stock(model))


def test_activated_lora_is_refused_by_name():
    options = dict(r=4, alora_invocation_tokens=[14, 15], **LAYERS)
    model = with_adapter(**options)
    with pytest.raises(UnsupportedModel, match="alora_invocation_tokens"):
        hf_paged.patch(model)
    expected = greedy(model)
    base = tiny_model("llama")
    hf_paged.patch(base)
    late = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    late.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="alora_.*: runs on transformers' own path"):
        assert torch.equal(greedy(late), expected)


def test_adapters_that_look_at_the_batch_are_refused_by_name():
    model = with_adapter("LilyConfig", **LAYERS)
    with pytest.raises(UnsupportedModel, match="PEFT's lily .*model.layers.0"):
        hf_paged.patch(model)
    expected = greedy(model)
    base = tiny_model("llama")
    hf_paged.patch(base)
    late = peft.get_peft_model(base, peft.LilyConfig(task_type="CAUSAL_LM", **LAYERS)).eval()
    late.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="PEFT's lily: runs on transformers' own path"):
        assert torch.equal(greedy(late), expected)
    with pytest.raises(RequestFailed, match="PEFT's lily cannot be used"):
        hf_paged.engine_of(base).generate([PROMPT[0].tolist()], GREEDY)
