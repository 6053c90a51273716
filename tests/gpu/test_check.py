"""The CUDA check runs, on what there is, and finds what is wrong."""

from __future__ import annotations

import pytest
import torch

from hf_paged.benchmarks.gpu import check, check_layers
from hf_paged.benchmarks.gpu.checking import BOUNDS, Case, Setting, compare, deviation, equal, run_area


@pytest.fixture
def setting(device) -> Setting:
    return Setting(device=device, small=True, backend="triton")


@pytest.mark.parametrize("area", ["norms", "activations", "cache", "attention-options", "quantized-experts"])
def test_kernels_pass(area, setting, capsys):
    assert check.check({area: check.AREAS[area]}, setting) == 0, capsys.readouterr().out


@pytest.mark.slow
def test_quantized_layers_pass(setting, capsys):
    assert check.check({"quantized-linear": check.AREAS["quantized-linear"]}, setting) == 0, capsys.readouterr().out


@pytest.mark.parametrize("area", ["engine-sampling", "engine-logits", "quantized-linear"])
def test_the_engine_passes(area, device, capsys):
    """On the kernels where there is a GPU; the interpreter would take minutes."""
    setting = Setting(device=device, small=True, backend="auto" if device.type == "cuda" else "reference")
    assert check.check({area: check.AREAS[area]}, setting) == 0, capsys.readouterr().out


def test_the_engine_passes_on_quantized_models(device, capsys):
    """Without a GPU on the C++ kernels: like the model's own forward, and unlike the reference, they do not round to fp8."""
    setting = Setting(device=device, small=True, backend="auto")
    assert check.check({"quantized-engine": check.AREAS["quantized-engine"]}, setting) == 0, capsys.readouterr().out


def test_a_wrong_kernel_fails_by_name(setting, monkeypatch, capsys):
    exact = check_layers.fused.act_and_mul
    monkeypatch.setattr(
        check_layers.fused, "act_and_mul",
        lambda x, name, backend: exact(x, name, backend=backend) * (1.05 if backend == "triton" else 1),
    )  # fmt: skip
    assert check.check({"activations": check.AREAS["activations"]}, setting) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("FAIL activations") and "silu and mul, 48" in printed


def test_a_case_that_raises_fails_and_the_others_still_run(setting, monkeypatch, capsys):
    exact = check_layers.fused.act_and_mul

    def broken(x, name, backend):
        if name == "gelu" and backend == "triton":
            raise RuntimeError("out of registers")
        return exact(x, name, backend=backend)

    monkeypatch.setattr(check_layers.fused, "act_and_mul", broken)
    assert check.check({"activations": check.AREAS["activations"]}, setting) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("FAIL activations                6 cases")
    assert printed.count("RuntimeError in broken") == 2 + 1  # both dtypes, one of them as the worst case, too


def test_an_area_that_raises_or_is_empty_fails(capsys):
    def area():
        yield Case("first", 0.0, 1.0)
        raise RuntimeError("out of registers")

    assert not run_area("raising", area())
    assert "after first: RuntimeError" in capsys.readouterr().out
    assert not run_area("empty", [])


def test_errors_are_shares_of_a_value_s_row():
    expected = torch.randn(4, 64)
    expected[1] *= 1e-3  # a wrong row is found however small it is beside the others
    got = expected.clone()
    got[1] += 1e-4
    assert 0.03 < deviation(got, expected) <= 0.1
    assert compare("exact", expected, expected, torch.float32).used == 0
    assert compare("TF32", expected * (1 + 2**-11), expected, torch.float32).used > 1
    rounded = expected.bfloat16()
    assert compare("rounded", rounded, expected, torch.bfloat16).used < 0.3 < BOUNDS[torch.bfloat16] * 100
    got[2, 3] = float("nan")
    assert compare("NaN", got, expected, torch.float32).used > 1


def test_equality_is_of_bits():
    a = torch.tensor([1.0, float("nan")])
    assert equal("same", a, a.clone()).used == 0
    assert equal("other", a, torch.tensor([1.0, 2.0])).used > 1
