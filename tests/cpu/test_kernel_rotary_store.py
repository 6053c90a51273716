"""rotary_store on the CPU is bit for bit the norms, the rotary embedding and the write that it stands for."""

from __future__ import annotations

import pytest
import torch

from hf_paged_kernels import fused, ops
from hf_paged_kernels.cpu import build
from hf_paged_kernels.norm import Norm

pytestmark = pytest.mark.skipif(not build.available(), reason=str(build.why_unavailable()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bits_are_those_of_the_separate_kernels(dtype):
    qkv = torch.randn(9, (6 + 2 + 2) * 64).to(dtype)
    query, key, value = (part.unflatten(1, (-1, 64)) for part in qkv.split([384, 128, 128], 1))
    cos, sin = torch.randn(9, 32).to(dtype), torch.randn(9, 32).to(dtype)
    slots = torch.randperm(48)[:9]
    slots[4] = -1
    q_weight, k_weight = torch.randn(64).to(dtype), torch.randn(64).to(dtype)
    caches = [[tensor.zero_() for tensor in ops.allocate_kv(3, 2, 64, 64, 16, dtype, "cpu")] for _ in range(2)]

    actual = ops.rotary_store(query, key, value, *caches[0], slots, cos, sin, q_norm=Norm(q_weight, 1e-5),
                              k_norm=Norm(k_weight, 1e-6, 1.0, "weight_before"))  # fmt: skip
    normed_q = fused.rms_norm(query, q_weight, 1e-5)
    normed_k = fused.rms_norm(key, k_weight, 1e-6, offset=1.0, cast="weight_before")
    expected, rotated = fused.rotary(normed_q, normed_k, cos, sin)
    ops.store_kv(rotated, value, *caches[1], slots)
    assert torch.equal(actual, expected)
    assert all(torch.equal(a, e) for a, e in zip(*caches))
