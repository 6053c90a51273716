"""Low-rank terms of many adapters on Triton: the kernels, and an engine that runs on them, against plain torch."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
from peft_adapters import WARNINGS, shake
from tiny_models import tiny_model

from hf_paged import Engine, EngineConfig, SamplingParams
from hf_paged_kernels import lora

pytestmark = pytest.mark.filterwarnings(*WARNINGS)


def site_of(K: int, sizes: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype, device) -> lora.Site:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)  # noqa: E731
    site = lora.Site(sizes, device, dtype)
    for slot, rank in enumerate(ranks):
        terms = []
        for place, size in enumerate(sizes):
            A, B = draw(rank, K) / K**0.5, draw(rank, size) / rank**0.5
            scale, shift = (draw(size) if (slot + place) % step == 0 else None for step in (2, 3))
            terms.append(None if (slot + place) % 5 == 4 else lora.Terms(A, B, scale, shift))
        site.put(slot, tuple(terms))
    site.put(len(ranks), tuple(lora.Terms(shift=draw(size)) for size in sizes))
    return site


def wide(terms: lora.Terms | None) -> lora.Terms | None:
    if terms is None:
        return None
    parts = (terms.A, terms.B, terms.scale, terms.shift)
    return lora.Terms(*(None if part is None else part.double() for part in parts))


CASES = {"qkv": (23, 96, (48, 24, 24), (1, 4, 16)), "odd": (5, 33, (70,), (3, 33)), "split": (40, 2100, (40,), (8, 20, 2))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_against_plain_torch(case, dtype, device):
    rows, K, sizes, ranks = CASES[case]
    site = site_of(K, sizes, ranks, dtype, device)
    slots = np.random.default_rng(0).integers(-1, len(ranks) + 1, rows)
    x, y = torch.randn(rows, K).to(device, dtype), torch.randn(rows, sum(sizes)).to(device, dtype)
    tiles = lora.tile_rows(slots, device)
    actual = lora.add_terms_(y.clone(), x, tiles, site, backend="triton")
    exact = lora.Site(sizes, device, torch.float64)
    for slot, terms in site.terms.items():
        exact.put(slot, tuple(map(wide, terms)))
    expected = lora.add_terms_(y.double(), x.double(), tiles, exact, backend="reference")
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error < (1e-6 if dtype == torch.float32 else 1e-2)
    assert torch.equal(actual[slots < 0], y[slots < 0])


def test_padding_changes_nothing(device):
    site, x, y = site_of(48, (20,), (4, 8), torch.float32, device), torch.randn(3, 48), torch.randn(3, 20)
    x, y = x.to(device), y.to(device)
    tiles = lora.tile_rows(np.array([0, 1, 0]), device)
    padded = lora.RowTiles(3, tiles.order, torch.cat([tiles.tiles, torch.zeros_like(tiles.tiles)]), tiles.rows)
    results = [lora.add_terms_(y.clone(), x, some, site, backend="triton") for some in (tiles, padded)]
    assert torch.equal(*results)


def test_an_engine_on_triton_gives_peft_s_tokens(tmp_path, device):
    sizes = dict(num_hidden_layers=1, layer_types=None)
    options = dict(r=3, target_modules="all-linear", use_dora=True)
    model = peft.get_peft_model(tiny_model("llama", **sizes), peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    shake(model)
    model.save_pretrained(tmp_path)
    prompts = [[5, 9, 11, 40], [7, 8, 9]]
    with Engine(tiny_model("llama", **sizes).to(device), config=EngineConfig(attention_backend="triton")) as engine:
        assert engine.load_adapter("one", tmp_path).apart is None
        greedy = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        outputs = engine.generate(prompts, greedy, adapter=["one", None])
    for prompt, stock, output in zip(prompts, (model, tiny_model("llama", **sizes)), outputs):
        expected = stock.generate(input_ids=torch.tensor([prompt]), max_new_tokens=2, do_sample=False)[0, len(prompt) :]
        assert output.outputs[0].token_ids == expected.tolist()
