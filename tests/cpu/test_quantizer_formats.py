"""Checkpoints of every writer and format, under transformers' own from_pretrained and save_pretrained."""

from __future__ import annotations

import json

import pytest
import torch
from quantized_checkpoints import (
    assert_same_model,
    awq_layer,
    eight_bit_layer,
    gptq_layer,
    load,
    logits,
    packed_layer_of_ct,
    quantized_names,
    save_files,
    save_quantized,
    source,
)
from safetensors.torch import load_file, save_file

from hf_paged import InvalidArgument

SQUARE = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)


def assert_saved_again(model, folder):
    """A saved model has the configuration and the tensors it was loaded from, and loads as the same."""
    model.save_pretrained(folder / "again")
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, folder / "again"))
    assert after["quantization_config"] == before["quantization_config"]
    before, after = (load_file(path / "model.safetensors") for path in (folder, folder / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(load(folder / "again")), logits(model))


@pytest.mark.parametrize(
    "config, version",
    [
        ({"w_bit": 4, "q_group_size": 16, "zero_point": True, "version": "GEMM"}, "gemm"),
        ({"bits": 4, "group_size": 32, "version": "gemv"}, "gemv"),
        ({"bits": 4, "group_size": 16, "checkpoint_format": "gemm", "format": "gemm", "sym": False}, "gemm"),
    ],
)
def test_awq(config, version, tmp_path):
    expected = source(**SQUARE)
    config["quant_method"] = "awq"
    group_size = config.get("group_size", config.get("q_group_size"))
    save_quantized(
        expected, tmp_path, config, lambda name, N, K: awq_layer(N, K, group_size=group_size, version=version)
    )
    model = load(tmp_path)
    assert len(quantized_names(model)) == 14
    assert_same_model(model, expected)
    assert_saved_again(model, tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": "marlin"}, "q_proj: version must be one of .*not 'marlin'"),
        ({"bits": 3}, "q_proj: bits must be 4, not 3"),
    ],
)
def test_awq_that_is_refused(change, message, tmp_path):
    config = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"} | change
    save_quantized(source(), tmp_path, config, lambda name, N, K: awq_layer(N, K))
    with pytest.raises(InvalidArgument, match=message):
        load(tmp_path)


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


@pytest.mark.parametrize(
    "settings, block, shape, name",
    [
        ({"weight_block_size": [32, 32]}, (32, 32), None, "weight_scale_inv"),
        ({"weight_block_size": [32, 32]}, (32, 32), None, "scale"),
        ({"weight_block_size": [40, 48]}, (40, 48), None, "weight_scale_inv"),  # ragged
        ({"weight_block_size": None}, (None, None), (), "weight_scale_inv"),
        ({"ignored_layers": ["re:.*lm_head"]}, (None, None), (), "weight_scale"),  # AutoFP8
        ({"weight_block_size": None}, (None, None), (), "qscale_weight"),
        ({}, (1, None), None, "weight_scale"),
    ],
)
@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_fp8(settings, block, shape, name, scheme, tmp_path):
    expected = source(**SQUARE)

    def make(module, N, K):
        tensors, weight = eight_bit_layer(N, K, block=block, shape=shape, name=name)
        if scheme == "static":
            tensors["input_scale" if name == "weight_scale" else "activation_scale"] = torch.rand(()) + 0.5
        return tensors, weight

    save_quantized(expected, tmp_path, FP8 | settings | {"activation_scheme": scheme}, make)
    model = load(tmp_path)
    assert len(quantized_names(model)) == 14
    layer = model.model.layers[0].mlp.up_proj.quantized
    assert layer.activations == "fp8" and (layer.input_scale is None) == (scheme == "dynamic")
    assert_same_model(model.dequantize(), expected)
    assert_saved_again(load(tmp_path), tmp_path)


def test_fbgemm(tmp_path):
    expected = source(**SQUARE)
    config = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    save_quantized(expected, tmp_path, config, lambda name, N, K: eight_bit_layer(N, K))
    model = load(tmp_path)
    assert len(quantized_names(model)) == 14
    assert_saved_again(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state |= {f"{name}.input_scale_ub": torch.tensor([1200.0]) for name in quantized_names(model)}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert_same_model(load(tmp_path).dequantize(), expected)


def test_layers_that_fp8_left_alone(tmp_path):
    """transformers leaves a layer as it was where blocks do not fit, whatever the config says of it."""
    expected = source(**SQUARE)

    def make(name, N, K):
        return None if "down_proj" in name else eight_bit_layer(N, K, block=(32, 32), name="weight_scale_inv")

    save_quantized(expected, tmp_path, FP8 | {"weight_block_size": [32, 32]}, make)
    model = load(tmp_path)
    assert len(quantized_names(model)) == 12
    assert_same_model(model.dequantize(), expected)


def test_dequantized_while_loading(tmp_path):
    from transformers import FineGrainedFP8Config

    expected = source(**SQUARE)
    save_quantized(expected, tmp_path, FP8, lambda name, N, K: eight_bit_layer(N, K))
    model = load(tmp_path, quantization_config=FineGrainedFP8Config(dequantize=True))
    assert quantized_names(model) == [] and not hasattr(model.config, "quantization_config")
    assert_same_model(model, expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ("no scale", "model.layers.1.mlp.up_proj: weight_scale_inv is missing"),
        ("type", "model.layers.1.mlp.up_proj: weight is torch.float8_e5m2"),
        ("plain", "model.layers.1.mlp.up_proj: weight is torch.float32, not torch.float8_e4m3fn"),
        ("embedding", "model.embed_tokens: weight of a Embedding is torch.float8_e4m3fn"),
        ("surplus", "model.layers.1.mlp.up_proj: output_scale: no tensor of fp8"),
    ],
)
def test_bad_fp8(change, message, tmp_path):
    save_quantized(source(**SQUARE), tmp_path, FP8, lambda name, N, K: eight_bit_layer(N, K))
    state, layer = load_file(tmp_path / "model.safetensors"), "model.layers.1.mlp.up_proj"
    if change == "no scale":
        del state[f"{layer}.weight_scale"]
    elif change == "embedding":
        state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].to(torch.float8_e4m3fn)
    elif change == "surplus":
        state[f"{layer}.output_scale"] = torch.rand(())
    else:
        state[f"{layer}.weight"] = state[f"{layer}.weight"].to(
            torch.float32 if change == "plain" else torch.float8_e5m2
        )
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidArgument, match=message):
        load(tmp_path)


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": False, "actorder": "group"}
FLOAT = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
BY_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}


def compressed(*groups, **settings):
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "ignore": ["lm_head", r"re:.*layers\.1\..*k_proj"],
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups)},
        **settings,
    }


def test_compressed_tensors(tmp_path):
    """Packed attention, fp8 and int8 MLP layers, and one left out, in one checkpoint."""
    expected = source(**SQUARE)
    config = compressed(
        {"targets": ["Linear"], "weights": INT4, "input_activations": None, "format": "pack-quantized"},
        {"targets": [r"re:.*\.(up|gate)_proj"], "weights": FLOAT, "input_activations": BY_TOKEN},
        {"targets": ["model.layers.0.mlp.down_proj"], "weights": FLOAT | {"type": "int"}, "input_activations": None},
    )

    def make(name, N, K):
        if name == "model.layers.1.self_attn.k_proj":
            return None
        if name.endswith(("up_proj", "gate_proj")):
            return eight_bit_layer(N, K, dtype=torch.bfloat16)
        if name == "model.layers.0.mlp.down_proj":
            return eight_bit_layer(N, K, kind="int8")
        return packed_layer_of_ct(N, K, sym=False, act_order="self_attn" in name)

    save_quantized(expected, tmp_path, config, make)
    model = load(tmp_path)
    assert len(quantized_names(model)) == 13
    kinds = {name: model.get_submodule(name).quantized.kind for name in quantized_names(model)}
    assert kinds["model.layers.0.self_attn.q_proj"] == kinds["model.layers.1.mlp.down_proj"] == "int4"
    assert kinds["model.layers.1.mlp.up_proj"] == "fp8" and kinds["model.layers.0.mlp.down_proj"] == "int8"
    assert_same_model(load(tmp_path).dequantize(), expected)
    assert_saved_again(model, tmp_path)


def test_compressed_tensors_dequantized_while_loading(tmp_path):
    expected = source(**SQUARE)
    config = compressed({"targets": ["Linear"], "weights": FLOAT, "input_activations": None})
    save_quantized(expected, tmp_path, config | {"dequantize": True}, lambda name, N, K: eight_bit_layer(N, K))
    model = load(tmp_path)
    assert quantized_names(model) == []
    assert_same_model(model, expected)


def test_a_cache_scheme_is_not_followed_silently(tmp_path):
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    config = compressed({"targets": ["Linear"], "weights": FLOAT}, kv_cache_scheme=scheme)
    save_quantized(source(**SQUARE), tmp_path, config, lambda name, N, K: eight_bit_layer(N, K))
    with pytest.warns(UserWarning, match="kv_cache_scheme"):
        load(tmp_path)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_folder_as_auto_gptq_left_it(shards, tmp_path):
    """The quantization in a file of its own, and weights under a name of their own."""
    expected, folder = source(), tmp_path / "stored"
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 16}
    save_quantized(expected, folder, settings, lambda name, N, K: gptq_layer(N, K))
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    del quantization["quant_method"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(quantization))
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_files(state, folder, shards, stem="gptq_model-4bit-16g")
    model = load(folder)
    assert len(quantized_names(model)) == 14
    assert_same_model(model, expected)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


def test_a_folder_as_autoawq_left_it(tmp_path):
    expected = source(**SQUARE)
    save_quantized(expected, tmp_path, None, lambda name, N, K: awq_layer(N, K))
    quantization = {"zero_point": True, "q_group_size": 16, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(quantization))
    assert_same_model(load(tmp_path), expected)
