"""LoRA on quantized layers: trained, served, saved, and what is refused; copies and states of models with such layers."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import peft
import pytest
import torch
from quantized_checkpoints import gptq_layer, save_quantized
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

import hf_paged
from hf_paged import InvalidArgument
from hf_paged.hf.lora import LoraQuantLinear
from hf_paged.hf.patch import is_patched
from hf_paged.quant.linear import QuantLinear

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",  # PEFT's own, on transformers 5.24
    "ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning",
)

PROMPT = torch.tensor([[5, 9, 11, 40, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]])
CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "sym": False}
SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2)
NUM_LAYERS = 14


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(the dequantized model, the folder of its GPTQ checkpoint)"""
    torch.manual_seed(0)
    model, folder = tiny_model("llama", **SIZES), tmp_path_factory.mktemp("stored")
    save_quantized(model, folder, CONFIG, lambda name, N, K: gptq_layer(N, K, act_order=True))
    return model, folder


@pytest.fixture
def model(stored):
    model = AutoModelForCausalLM.from_pretrained(stored[1])
    yield model
    if is_patched(model):
        hf_paged.unpatch(model)


def lora(model, **options):
    torch.manual_seed(1)
    options = dict(r=4, target_modules="all-linear") | options
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))


def shake(model, seed: int = 1) -> None:
    """Give every trainable parameter a value of its own: fresh adapters add nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def greedy(model) -> torch.Tensor:
    return model.generate(input_ids=PROMPT, max_new_tokens=8, do_sample=False)


def loss(model) -> torch.Tensor:
    return model(input_ids=PROMPT, labels=PROMPT).loss


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss(model).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapters(model) -> list[LoraQuantLinear]:
    return [module for module in model.modules() if isinstance(module, LoraQuantLinear)]


def test_all_linear_layers_get_adapters_and_nothing_else_is_trained(model):
    wrapped = lora(model)
    assert len(adapters(wrapped)) == NUM_LAYERS
    assert all(layer.lora_A["default"].in_features == layer.get_base_layer().in_features for layer in adapters(wrapped))
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * NUM_LAYERS and all("lora_" in name for name in trained)


def test_gradients_are_those_of_the_dequantized_model(model, stored):
    wrapped, float_one = lora(model), lora(copy.deepcopy(stored[0]))
    for each in (wrapped, float_one):
        shake(each)
    mine, expected = gradients(wrapped), gradients(float_one)
    assert mine.keys() == expected.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], expected[name], rtol=1e-3, atol=1e-5 * float(expected[name].abs().max()) + 1e-9)


def test_gradients_with_checkpointing_are_the_same(model):
    wrapped = lora(model).train()
    shake(wrapped)
    expected = gradients(wrapped)
    wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = gradients(wrapped)
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_training_a_model_prepared_by_peft_lowers_the_loss(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepared = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": True})
    wrapped = lora(prepared).train()
    optimizer = torch.optim.AdamW((p for p in wrapped.parameters() if p.requires_grad), lr=1e-2)
    first = loss(wrapped).item()
    for _ in range(8):
        optimizer.zero_grad()
        loss(wrapped).backward()
        optimizer.step()
    assert loss(wrapped).item() < 0.7 * first
    after = wrapped.unload().state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("patched_first", [False, True])
def test_served_tokens_are_those_of_the_unpatched_model(model, stored, patched_first):
    plain = greedy(model)
    if patched_first:
        hf_paged.patch(model)
        greedy(model)
    wrapped = lora(model).eval()
    shake(wrapped)
    reference = lora(AutoModelForCausalLM.from_pretrained(stored[1])).eval()
    shake(reference)
    expected = greedy(reference)
    hf_paged.patch(wrapped)
    assert torch.equal(greedy(wrapped), expected) and not torch.equal(expected, plain)
    with wrapped.disable_adapter():
        assert torch.equal(greedy(wrapped), plain)
    wrapped.add_adapter("second", peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"]))
    wrapped.set_adapter("second")
    shake(wrapped, seed=2)
    paged = greedy(wrapped)
    assert torch.equal(paged, greedy(copy.deepcopy(wrapped))) and not torch.equal(paged, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_on_16_bit_hidden_states(stored, dtype):
    wrapped = lora(AutoModelForCausalLM.from_pretrained(stored[1], dtype=dtype))
    shake(wrapped)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients(wrapped).values())
    hf_paged.patch(wrapped.eval(), verify=True)
    hf_paged.unpatch(wrapped)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_before_anything_is_merged(model, merge):
    model.quantization_method = None  # PEFT refuses gptq by itself; other methods it does not know
    wrapped = lora(model).eval()
    shake(wrapped)
    expected = greedy(wrapped)
    with pytest.raises(InvalidArgument, match="q_proj are quantized"):
        getattr(wrapped, merge)()
    assert len(adapters(wrapped)) == NUM_LAYERS and not any(layer.merged for layer in adapters(wrapped))
    assert torch.equal(greedy(wrapped), expected)
    with pytest.raises(InvalidArgument, match="quantized"):
        adapters(wrapped)[0].merge()


def test_adapters_are_saved_and_loaded(model, stored, tmp_path):
    wrapped = lora(model).eval()
    shake(wrapped)
    expected = greedy(wrapped)
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stored[1]), tmp_path)
    assert torch.equal(greedy(again), expected)
    through_transformers = AutoModelForCausalLM.from_pretrained(stored[1])
    hf_paged.patch(through_transformers)
    through_transformers.load_adapter(tmp_path)
    assert len(adapters(through_transformers)) == NUM_LAYERS
    assert torch.equal(greedy(through_transformers), expected)
    hf_paged.unpatch(through_transformers)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.LoraConfig(target_modules=["q_proj"], use_dora=True), "use_dora"),
        (peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="olora"), "init_lora_weights='olora'"),
        (peft.LoHaConfig(target_modules=["q_proj"]), "not supported"),
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "not supported"),
    ],
)
def test_what_needs_the_float_weight_is_refused(model, config, message):
    with pytest.raises((TypeError, ValueError), match=message):
        peft.get_peft_model(model, config)


@pytest.mark.slow
def test_a_model_is_quantized_on_the_spot_before_adapters_not_after():
    adapted = lora(tiny_model("llama", **SIZES), target_modules=["q_proj"]).eval()
    with pytest.raises(InvalidArgument, match="quantization: this LlamaForCausalLM has PEFT adapters on it"):
        hf_paged.patch(adapted, quantization="int8")
    assert not any(isinstance(module, QuantLinear) for module in adapted.modules())
    model = tiny_model("llama", **SIZES)
    hf_paged.patch(model, quantization="int8")
    hf_paged.unpatch(model)
    adapted = lora(model, target_modules=["q_proj"])
    assert any(isinstance(module, LoraQuantLinear) for module in adapted.modules())


def test_peft_may_be_imported_after_hf_paged():
    code = "import hf_paged, peft; print(hasattr(peft.LoraModel._create_new_module, '__wrapped__'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "True"


def round_trips(model):
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)


@pytest.mark.parametrize("patched", [False, True])
def test_copies_and_pickles(model, patched):
    expected = greedy(model)
    if patched:
        hf_paged.patch(model)
        greedy(model)
    for other in round_trips(model):
        assert not is_patched(other) and torch.equal(greedy(other), expected)
        layer = other.model.layers[0].mlp.down_proj
        assert type(layer) is QuantLinear
        mine = model.model.layers[0].mlp.down_proj
        assert layer.quantized.data.data_ptr() != mine.quantized.data.data_ptr()
        hf_paged.patch(other)
        assert torch.equal(greedy(other), expected)
        hf_paged.unpatch(other)


def test_a_state_dict_is_loaded_into_another_model(model, stored):
    other = AutoModelForCausalLM.from_pretrained(stored[1])
    with torch.no_grad():
        for layer in (module for module in other.modules() if isinstance(module, QuantLinear)):
            layer.quantized.scales.mul_(0.5)
    expected, changed = greedy(model), greedy(other)
    assert not torch.equal(expected, changed)
    hf_paged.patch(other)
    assert torch.equal(greedy(other), changed)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    assert all(tensor.dtype == torch.int32 for name, tensor in state.items() if name.endswith("qweight"))
    other.load_state_dict(state)
    assert torch.equal(greedy(other), expected)  # reached the next token
    hf_paged.unpatch(other)


def test_a_state_dict_with_tensors_missing_or_too_many(model):
    state = model.state_dict()
    name = "model.layers.1.mlp.up_proj"
    part = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
    with pytest.raises(RuntimeError, match=rf"Missing key.*{name}\.qweight"):
        model.load_state_dict(part)
    assert f"{name}.qweight" not in part and not model.load_state_dict(part, strict=False).unexpected_keys
    with pytest.raises(RuntimeError, match=rf"Unexpected key.*{name}\.weight"):
        model.load_state_dict(state | {f"{name}.weight": torch.zeros(96, 64)})
    with pytest.raises(RuntimeError, match=rf"{name}\.scales is missing"):
        model.load_state_dict({key: value for key, value in state.items() if key != f"{name}.scales"})
