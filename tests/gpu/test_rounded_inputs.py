"""How far inputs rounded to 8 bits may move what comes of them.

A row x is rounded with the scale s = max |x| / limit. Then for every value

    int8 (limit 127)    |dx| <= s / 2
    fp8 (limit 448)     |dx| <= max(2^-4 |x|, 2^-10 s)      3 bits behind the first; the smallest number is 2^-9

and a product y = W x moves by no more than sum_k |W_nk| |dx_k|, which is what `most` computes. In the mean the dx are
independent of W, so y moves by eps = |dx| / |x| of its size: 3 % in fp8 whatever the row, in int8 the more the larger
its largest value is beside the others.

A decoder layer rounds four inputs (of the projections to heads and back, of the gate and back). Each moves what it
leads to by eps; if all of it added up, that would be 4 eps, and single tokens, whose softmax or gate is sensitive, are
granted twice that. So for the logits of one layer: relative root mean square of the change at most 4 eps in the mean
over tokens, 8 eps for any. The golden checkpoints (one layer of SmolLM2-135M) move by 8 % in fp8 and 5 % in int8 in
the mean.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch
from quantized_models import dequantized
from quantized_weights import quantized_weight
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_paged  # noqa: F401  (puts its quantizers in transformers' mapping)
from hf_paged.quant.linear import QuantLinear
from hf_paged_kernels import fused
from hf_paged_kernels.ref.quantize import LIMITS
from hf_paged_kernels.ref.quantized import rounded_rows

ARCHIVE = Path(__file__).parents[1] / "golden" / "checkpoints.tar.xz"
NAMES = ["ct-fp8-dynamic", "ct-w8a8-int8", "fp8-block64"]


def most(x, weight):
    """The bound on |y - W x| for each y."""
    scale = x.abs().amax(-1, keepdim=True) / LIMITS[weight.data.dtype]
    moved = scale / 2 if weight.kind == "int8" else torch.maximum(x.abs() * 2**-4, scale * 2**-10).expand_as(x)
    return moved.expand_as(x) @ weight.dequantize().double().abs().T


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_product_moves_no_further_than_its_bound(device, backend, kind):
    generator = torch.Generator().manual_seed(0)
    for rows in (3, 40):
        weight = quantized_weight(kind, 64, 256, group=256, activations=kind, device=device, dtype=torch.float32)
        x = torch.randn(rows, 256, generator=generator).to(device) * torch.logspace(-3, 2, rows, device=device)[:, None]
        x[1, 7] *= 1000  # beside which int8 has few steps left for the others
        exact = x.double() @ weight.dequantize().double().T
        moved = (fused.linear(x, weight, backend=backend).double() - exact).abs()
        assert (moved <= most(x.double(), weight) + 1e-5 * exact.abs().amax(-1, keepdim=True)).all()
        eps = ((rounded_rows(x, weight) - x).norm(dim=-1) / x.norm(dim=-1)).double()
        assert (moved.pow(2).mean(-1).sqrt() <= 2 * eps * exact.pow(2).mean(-1).sqrt()).all()
        assert (moved.amax(-1) > 0.1 * eps * exact.abs().mean(-1)).all()  # they are rounded


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


class Golden:
    """A golden model, its logits [T, V] on a backend, and the largest eps of any input of its layers."""

    def __init__(self, folder: Path, device):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        self.layers = [module for module in self.model.modules() if isinstance(module, QuantLinear)]
        self.ids = load_file(folder / "reference.safetensors")["input_ids"].to(device)
        self.eps = 0.0
        for layer in self.layers:
            layer.register_forward_pre_hook(self._look)

    def _look(self, layer, arguments):
        x = arguments[0]
        moved = (rounded_rows(x, layer.quantized) - x).norm(dim=-1) / x.norm(dim=-1)
        self.eps = max(self.eps, moved.max().item())

    @torch.no_grad()
    def logits(self, backend):
        for layer in self.layers:
            layer.backend = backend
        return self.model(self.ids).logits.flatten(0, 1)

    @torch.no_grad()
    def unrounded(self):
        return dequantized(self.model)(self.ids).logits.flatten(0, 1)


def change(actual, expected):
    """Relative root mean square, [T]."""
    return (actual - expected).pow(2).mean(-1).sqrt() / expected.pow(2).mean(-1).sqrt()


def assert_within_bound(model, moved):
    assert moved.mean() <= 4 * model.eps and moved.max() <= 8 * model.eps
    assert moved.mean() > 0.5 * model.eps  # they are rounded


@pytest.mark.parametrize("name", NAMES)
def test_logits_move_no_further_than_their_bound(golden, name, device):
    model = Golden(golden / name, device)
    unrounded = model.unrounded()
    assert_within_bound(model, change(model.logits("reference"), unrounded))
    assert model.eps < 0.031 or name == "ct-w8a8-int8"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_logits_are_the_references(golden, name, device):
    """But for values that fp32 sums in another order put on the other side of a half of 8 bits."""
    model = Golden(golden / name, device)
    unrounded, expected, actual = model.unrounded(), model.logits("reference"), model.logits("triton")
    assert_within_bound(model, change(actual, unrounded))
    assert change(actual, expected).max() <= model.eps
    assert change(actual, expected).mean() <= 0.1 * change(expected, unrounded).mean()
