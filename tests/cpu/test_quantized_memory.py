"""Loading a quantized checkpoint takes little more memory than the checkpoint has."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import pytest
import torch
from quantized_checkpoints import awq_layer, eight_bit_layer, gptq_layer, save_quantized
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

CHILD = """
import sys
import hf_paged
from transformers import AutoModelForCausalLM

def resident(which):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(which)) * 1024

small, large = sys.argv[1:]
AutoModelForCausalLM.from_pretrained(small)  # so that no library counts
before = resident("VmRSS")
AutoModelForCausalLM.from_pretrained(large)
print(resident("VmHWM") - before)
"""
SIZES = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=8, num_key_value_heads=8, head_dim=128)
MOE_SIZES = dict(SIZES, hidden_size=512, moe_intermediate_size=1024, num_experts=16, num_experts_per_tok=2, head_dim=64)
CONFIG = {"bits": 4, "group_size": 128, "weight_block_size": None}
CASES = {  # model, number of layers, sizes, method, layer
    "gptq": ("llama", 12, SIZES, "gptq", lambda N, K: gptq_layer(N, K, group_size=128)),
    "awq": ("llama", 12, SIZES, "awq", lambda N, K: awq_layer(N, K, group_size=128)),
    "fp8": ("llama", 6, SIZES, "fp8", eight_bit_layer),
    "gptq-experts": ("qwen3_moe", 12, MOE_SIZES, "gptq", lambda N, K: gptq_layer(N, K, group_size=128)),
    "fp8-experts": ("qwen3_moe", 8, MOE_SIZES, "fp8", eight_bit_layer),
}


@pytest.mark.parametrize("case", ["gptq", *(pytest.param(name, marks=pytest.mark.slow) for name in list(CASES)[1:])])
def test_peak(case, tmp_path):
    label, most, sizes, method, maker = CASES[case]
    make = cache(maker)

    def copied(name, N, K):
        tensors, weight = make(N, K)
        return {key: tensor.clone() for key, tensor in tensors.items()}, weight

    for folder, layers in ("small", 1), ("large", most):
        with torch.device("meta"):
            config = tiny_config(label, **sizes, num_hidden_layers=layers)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        save_quantized(model.to_empty(device="cpu"), tmp_path / folder, CONFIG | {"quant_method": method}, copied)
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", CHILD, tmp_path / "small", tmp_path / "large"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.8 * size < int(done.stdout) < 1.3 * size
