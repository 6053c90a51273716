"""copy_blocks on Triton against the reference."""

from __future__ import annotations

import pytest
import torch

from hf_paged_kernels import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_are_copied_and_the_others_left_alone(device, dtype):
    k_cache, v_cache = ops.allocate_kv(7, 2, 24, 40, 16, dtype, device, backend="triton")
    k_cache.normal_()
    v_cache.normal_()
    pairs = torch.tensor([[0, 3], [6, 1], [0, 5]], device=device)
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    ops.copy_blocks(expected_k, expected_v, pairs, backend="reference")
    ops.copy_blocks(k_cache, v_cache, pairs, backend="triton")
    assert torch.equal(k_cache, expected_k) and torch.equal(v_cache, expected_v)
    assert torch.equal(k_cache[3], k_cache[0]) and torch.equal(k_cache[1], k_cache[6])


def test_no_pairs_are_no_work(device):
    cache = ops.allocate_kv(2, 1, 16, 16, 16, torch.float32, device, backend="triton")
    ops.copy_blocks(*cache, torch.empty(0, 2, dtype=torch.int64, device=device), backend="triton")
