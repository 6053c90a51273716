"""Checkpoints that the real tools wrote: their logits, their greedy tokens, and their own bytes back."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch
from quantized_checkpoints import same_bits
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_paged
from hf_paged.quant.linear import QuantLinear

ARCHIVE = Path(__file__).parents[1] / "golden" / "checkpoints.tar.xz"
NAMES = [
    *("autoawq-g64-gemm", "autogptq-g64-sym", "fp8-block64"),
    *("ct-fp8-dynamic", "ct-w4a16-g64", "ct-w8a8-int8"),
]
ROUNDED_INPUTS = "ct-w8a8-int8"  # multiplies in int8; fp8 inputs are rounded only where there is hardware for it


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def assert_close_to_half(logits, reference, tolerance=1e-3):
    """`reference` is what some logits within `tolerance` of these are in half precision."""
    assert ((logits - tolerance).half() <= reference.half()).all()
    assert ((logits + tolerance).half() >= reference.half()).all()


@pytest.mark.parametrize("name", NAMES)
def test_logits(golden, name):
    model, reference = load(golden / name), load_file(golden / name / "reference.safetensors")
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(layers) == 7 and not any(isinstance(module, torch.nn.Linear) for module in model.model.modules())
    if name == ROUNDED_INPUTS:
        model.dequantize()
    with torch.no_grad():
        assert_close_to_half(model(reference["input_ids"]).logits, reference["logits"])


@pytest.mark.parametrize("name", NAMES)
def test_saved_again(golden, name, tmp_path):
    model, reference = load(golden / name), load_file(golden / name / "reference.safetensors")
    model.save_pretrained(tmp_path)
    before, after = load_file(golden / name / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    gone = before.keys() - after.keys()
    assert all(key.endswith(".bias") and not before[key].any() for key in gone)  # auto-gptq's zeros
    assert before.keys() - gone == after.keys()
    for key, tensor in after.items():
        expected = before[key] if key.count(".") > 3 and not key.endswith("layernorm.weight") else before[key].float()
        assert same_bits(tensor, expected), key
    again = load(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(reference["input_ids"]).logits, model(reference["input_ids"]).logits)


def plain_model(golden, name):
    """Stock layers with the dequantized weights, and inputs rounded as the checkpoint's config says."""
    plain = load(golden / name).dequantize()
    if name == ROUNDED_INPUTS:
        for module in plain.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(rounded_to_int8)
    return plain


def rounded_to_int8(module, args):
    """Each row to 127 steps up and down to its largest value."""
    scale = args[0].abs().amax(-1, keepdim=True) / 127
    return (args[0] / scale).round() * scale


@pytest.mark.parametrize("name", NAMES)
def test_tokens(golden, name):
    """The paged engine's greedy tokens are the reference's, and those of stock `generate` on the dequantized model."""
    reference = load_file(golden / name / "reference.safetensors")
    ids, options = reference["input_ids"], dict(max_new_tokens=16, do_sample=False, pad_token_id=0)
    plain = plain_model(golden, name)
    stock = plain.generate(ids, **options)
    if name != ROUNDED_INPUTS:
        assert torch.equal(stock[:, ids.shape[1] :], reference["greedy"])
    model = load(golden / name)
    with torch.no_grad():
        difference = (model(ids).logits - plain(ids).logits).abs().amax(-1)
    if name == ROUNDED_INPUTS:  # the last bit of a float decides now and then where an input is rounded to
        assert (difference < 1e-3).float().mean() > 0.9 and (difference < 0.5).all()
    else:
        assert (difference < 1e-3).all()
    hf_paged.patch(model)
    assert torch.equal(model.generate(ids, **options), stock)
    hf_paged.unpatch(model)


def test_how_far_rounded_inputs_lead(golden):
    """Outliers make the steps of a row's int8 inputs wide: 5 % of the logits' size. A rounded weight is 1 % off."""
    reference = load_file(golden / ROUNDED_INPUTS / "reference.safetensors")
    with torch.no_grad():
        logits = load(golden / ROUNDED_INPUTS)(reference["input_ids"]).logits
    difference = (logits - reference["logits"]).pow(2).mean() / reference["logits"].pow(2).mean()
    assert 1e-4 < difference < 4e-3
