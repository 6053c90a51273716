"""What a launcher chooses can be set from outside, for a while; the result stays the same."""

from __future__ import annotations

import pytest
import torch

from hf_paged.benchmarks.gpu import kernels
from hf_paged_kernels import fused
from hf_paged_kernels.triton.launch import recording, tuned, tuning


def launched_depth(x, weight) -> int:
    found = []
    with recording("sm_90", lambda kernel, grid, arguments, meta: found.append(meta["BLOCK_K"])):
        fused.linear(x, weight, backend="triton")
    return found[0]


def test_a_launcher_takes_what_tuning_gives_and_nothing_else_changes(device):
    x, weight = torch.randn(3, 256).bfloat16().to(device), torch.randn(64, 256).bfloat16().to(device)
    own, expected = launched_depth(x, weight), fused.linear(x, weight, backend="triton")
    with tuning("linear", depth=32), tuning("decode", tile=16):
        assert launched_depth(x, weight) == 32 != own
        torch.testing.assert_close(fused.linear(x, weight, backend="triton"), expected, atol=0.2, rtol=1e-2)
        with tuning("linear", depth=64):
            assert launched_depth(x, weight) == 64
        assert launched_depth(x, weight) == 32
    assert launched_depth(x, weight) == own


def test_a_knob_that_a_launcher_does_not_have_is_named():
    assert tuned("linear", depth=32, num_warps=4) == (32, 4)
    with pytest.raises(ValueError, match="linear has no 'num_wraps' to tune; there are depth"):
        with tuning("linear", num_wraps=8):
            tuned("linear", depth=32)
    with pytest.raises(RuntimeError, match="stop"), tuning("linear", depth=64):
        raise RuntimeError("stop")
    assert tuned("linear", depth=32) == (32,)


def test_the_sweep_finds_a_configuration_per_shape(device, tmp_path, capsys):
    options = ["--device", device.type, "--tiny", "--backend", "triton", "--sweep", "--out", str(tmp_path)]
    assert kernels.main(options) == 0
    printed = capsys.readouterr().out
    for kernel in ("linear", "decode", "prefill"):
        assert f"sweep {kernel} tiny-llama" in printed
