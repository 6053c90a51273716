"""Quantized checkpoints under transformers' own from_pretrained and save_pretrained."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from quantized_checkpoints import (
    PROMPT,
    assert_same_model,
    eight_bit_layer,
    gptq_layer,
    load,
    logits,
    quantized_names,
    save_quantized,
    source,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedConfig
from transformers.quantizers import auto

import hf_paged
from hf_paged import InvalidArgument

GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "sym": False}


def gptq(name, N, K):
    return gptq_layer(N, K, act_order=True)


@pytest.fixture
def stored(tmp_path):
    """(the dequantized model, the folder of its GPTQ checkpoint)"""
    model = source()
    save_quantized(model, tmp_path / "stored", GPTQ_CONFIG, gptq)
    return model, tmp_path / "stored"


def test_loads_as_the_dequantized_model(stored):
    expected, folder = stored
    model = load(folder)
    assert len(quantized_names(model)) == 14 and type(model.lm_head) is torch.nn.Linear
    assert_same_model(model, expected)
    assert model.generate(PROMPT, max_new_tokens=8).tolist() == expected.generate(PROMPT, max_new_tokens=8).tolist()


@pytest.mark.parametrize("label", ["llama-mha-bias", "llama-tied-llama3-rope", "qwen2", "gpt2", "opt"])
def test_families(label, tmp_path):
    """Biases, tied embeddings, and names under another base model's prefix."""
    expected = source(label)
    save_quantized(expected, tmp_path, GPTQ_CONFIG, gptq)
    assert_same_model(load(tmp_path), expected)


def test_shards(tmp_path):
    expected = source()
    save_quantized(expected, tmp_path, GPTQ_CONFIG, gptq, shards=3)
    model = load(tmp_path)
    assert_same_model(model, expected)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 3
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


def test_layers_left_out_are_as_they_were(tmp_path):
    expected = source()
    save_quantized(expected, tmp_path, GPTQ_CONFIG, lambda name, N, K: None if "v_proj" in name else gptq(name, N, K))
    model = load(tmp_path)
    assert len(quantized_names(model)) == 12 and not any("v_proj" in name for name in quantized_names(model))
    assert_same_model(model, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_that_of_everything_else(stored, dtype):
    expected, folder = stored
    model = load(folder, dtype=dtype)
    assert model.dtype == dtype and model.model.embed_tokens.weight.dtype == dtype
    assert model.model.layers[0].mlp.up_proj.quantized.scales.dtype == torch.float16
    exact = logits(expected)
    if dtype == torch.float32:
        return assert_same_model(model, expected)
    rounding = (logits(expected.to(dtype)).float() - exact).abs().max()  # of stock's layers in this type
    assert (logits(model).float() - exact).abs().max() < 2 * rounding


def test_saved_config_is_the_one_found(stored, tmp_path):
    _, folder = stored
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["meta"] = {"quantizer": ["gptqmodel:4.0.0"], "uri": "somewhere"}
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    config["quantization_config"]["modules_in_block_to_quantize"] = [["self_attn.q_proj"]]  # optimum's business
    (folder / "config.json").write_text(json.dumps(config))
    load(folder).save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["quantization_config"] == config["quantization_config"]


def test_dynamic_overrides(tmp_path):
    """gptqmodel's settings for modules of their own: the first pattern that matches."""
    expected = source()
    config = GPTQ_CONFIG | {
        "dynamic": {r"-:.*\.k_proj": {}, r"+:.*\.mlp\..*": {"bits": 8, "group_size": 32}, r".*o_proj": {"bits": 2}}
    }

    def make(name, N, K):
        if "k_proj" in name:
            return None
        if "mlp" in name:
            return gptq_layer(N, K, bits=8, group_size=32)
        return gptq_layer(N, K, bits=2 if "o_proj" in name else 4)

    save_quantized(expected, tmp_path, config, make)
    model = load(tmp_path)
    assert_same_model(model, expected)
    kinds = [getattr(model.model.layers[0].self_attn, name).quantized.kind for name in ("q_proj", "v_proj", "o_proj")]
    assert kinds == ["int4", "int4", "int2"]
    assert model.model.layers[0].mlp.up_proj.quantized.kind == "int8"


def test_a_quantized_head(tmp_path):
    expected = source(vocab_size=200)
    save_quantized(expected, tmp_path, GPTQ_CONFIG | {"lm_head": True}, gptq, head=True)
    model = load(tmp_path)
    assert len(quantized_names(model)) == 15
    assert_same_model(model, expected)
    tokens = expected.generate(PROMPT, max_new_tokens=8, do_sample=False)
    assert torch.equal(hf_paged.patch(model).generate(PROMPT, max_new_tokens=8, do_sample=False), tokens)
    hf_paged.unpatch(model)


def test_paged_tokens_are_the_dequantized_models(stored):
    expected, folder = stored
    tokens = expected.generate(PROMPT, max_new_tokens=12, do_sample=False)
    model = hf_paged.patch(load(folder))
    assert torch.equal(model.generate(PROMPT, max_new_tokens=12, do_sample=False), tokens)
    hf_paged.unpatch(model)
    assert_same_model(model, expected)


def test_state_dict_in_another_model(stored, tmp_path):
    """As stored; the layers it goes into keep their memory."""
    expected, folder = stored
    save_quantized(source(seed=7), tmp_path / "other", GPTQ_CONFIG, gptq)
    model, other = load(folder), load(tmp_path / "other")
    data = other.model.layers[0].mlp.up_proj.quantized.data.data_ptr()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    assert other.model.layers[0].mlp.up_proj.quantized.data.data_ptr() == data
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))
    assert_same_model(copied.dequantize(), expected)


def test_pytorch_files(stored, tmp_path):
    expected, folder = stored
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    assert_same_model(load(tmp_path), expected)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(stored, device_map):
    expected, folder = stored
    assert_same_model(load(folder, device_map=device_map), expected)


def test_offloading_is_refused(stored, tmp_path):
    _, folder = stored
    names = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    device_map = dict.fromkeys(names, "cpu") | {"model.layers.1": "disk"}
    with pytest.raises(InvalidArgument, match="model.layers.1.self_attn.q_proj: device_map"):
        load(folder, device_map=device_map, offload_folder=tmp_path / "offloaded")


def test_other_heads(stored):
    """A model without its head, and one with a new one; but a layer must not be missing there either."""
    expected, folder = stored
    base = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(base(PROMPT)[0], expected.model(PROMPT)[0], atol=1e-4, rtol=1e-4)
    assert len(quantized_names(AutoModelForSequenceClassification.from_pretrained(folder))) == 14
    state = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if LAYER not in name}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidArgument, match=r"layers.1.self_attn.o_proj.weight is missing"):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_routers_are_refused(tmp_path):
    """They inherit from Linear and give more than a product."""
    model = source("phimoe")
    save_quantized(
        model, tmp_path, {"quant_method": "fp8"}, lambda name, N, K: eight_bit_layer(N, K) if "router" in name else None
    )
    with pytest.raises(InvalidArgument, match="router: PhimoeTopKRouter cannot be quantized"):
        load(tmp_path)


def test_zero_biases_of_auto_gptq_are_dropped_and_others_added(tmp_path):
    expected = source()
    save_quantized(expected, tmp_path, GPTQ_CONFIG, gptq, biases=True)
    model = load(tmp_path)
    assert all(model.get_submodule(name).bias is None for name in quantized_names(model))
    assert_same_model(model, expected)
    state = load_file(tmp_path / "model.safetensors")
    bias = state["model.layers.1.mlp.up_proj.bias"] = torch.randn(96)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    expected.model.layers[1].mlp.up_proj.bias = torch.nn.Parameter(bias)
    assert_same_model(load(tmp_path), expected)


def test_dequantize(stored):
    expected, folder = stored
    model = load(folder).dequantize()
    assert quantized_names(model) == [] and not hasattr(model.config, "quantization_config")
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, expected.model.layers[1].mlp.up_proj.weight)
    assert_same_model(model, expected)


LAYER = "model.layers.1.self_attn.o_proj"


def change(state, config, what):
    if what == "missing":
        del state[f"{LAYER}.scales"]
    elif what == "all missing":
        for name in ("qweight", "qzeros", "scales", "g_idx"):
            del state[f"{LAYER}.{name}"]
    elif what == "norm missing":
        del state["model.norm.weight"]
    elif what == "truncated":
        state[f"{LAYER}.qweight"] = state[f"{LAYER}.qweight"][:4].clone()
    elif what == "type":
        state[f"{LAYER}.qzeros"] = state[f"{LAYER}.qzeros"].float()
    elif what == "nan":
        state[f"{LAYER}.scales"][1, 5] = float("nan")
    elif what == "g_idx":
        state[f"{LAYER}.g_idx"][:] = 0
    elif what == "bias":
        state[f"{LAYER}.bias"] = torch.zeros(7)
    else:
        config["quantization_config"].update(what)


@pytest.mark.parametrize(
    "what, message",
    [
        ("missing", f"{LAYER}: scales is missing"),
        ("all missing", f"{LAYER}.weight is missing"),
        ("norm missing", "model.norm.weight is missing"),
        ("truncated", rf"{LAYER}: qweight has shape \[4, 64\], not \[6, 64\]"),
        ("type", f"{LAYER}: qzeros is torch.float32, not torch.int32"),
        ("nan", f"{LAYER}: scales has values that are not finite"),
        ("g_idx", f"{LAYER}: g_idx puts 0 to 48 features in a group"),
        ("bias", rf"{LAYER}: bias is torch.float32 \[7\]"),
        ({"bits": 5}, "model.layers.0.self_attn.q_proj: bits must be one of"),
        ({"group_size": 48}, "model.layers.0.self_attn.q_proj: group_size 48 does not divide in_features 64"),
        ({"group_size": 32}, r"model.layers.0.self_attn.q_proj: qzeros has shape \[4, 6\], not \[2, 6\]"),
        ({"checkpoint_format": "gptq_p"}, "model.layers.0.self_attn.q_proj: format must be one of"),
        ({"is_marlin_format": True}, "model.layers.0.self_attn.q_proj: format must be one of .*not 'marlin'"),
        ({"pack_dtype": "int16"}, "model.layers.0.self_attn.q_proj: pack_dtype int16"),
    ],
    ids=str,
)
def test_bad_checkpoints(stored, what, message):
    _, folder = stored
    state, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(state, config, what)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidArgument, match=message):
        load(folder)


def test_a_file_cut_short(stored):
    _, folder = stored
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InvalidArgument, match=r"model.safetensors cannot be read"):
        load(folder, dtype=torch.float32)


def test_registration():
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"].__module__ == "hf_paged.hf.quantizers"
    hf_paged.unregister_quantizers()
    try:
        assert auto.AUTO_QUANTIZER_MAPPING["gptq"].__module__.startswith("transformers.")
        assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"].__module__.startswith("transformers.")
        assert not hasattr(PreTrainedConfig.get_config_dict, "hf_paged_original")
        hf_paged.unregister_quantizers()
    finally:
        hf_paged.register_quantizers()
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"].__module__ == "hf_paged.hf.quantizers"


def test_registration_may_be_what_imports_transformers():
    code = "import hf_paged; hf_paged.register_quantizers"
    code += "; from transformers.quantizers import auto; print(auto.AUTO_QUANTIZER_MAPPING['gptq'].__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["hf_paged.hf.quantizers"]


def test_quantizing_while_loading_is_left_to_transformers():
    config = auto.GPTQConfig(bits=4, dataset="c4", tokenizer="none")
    with pytest.raises(ImportError, match="optimum|gptqmodel"):
        auto.AutoHfQuantizer.from_config(config, pre_quantized=False).validate_environment()
