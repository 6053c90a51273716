"""Low-rank terms of many adapters in one batch: the kernel against plain torch and float64, bit by bit the same alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_paged_kernels import lora
from hf_paged_kernels.cpu import build

pytestmark = pytest.mark.skipif(not build.available(), reason=str(build.why_unavailable()))

CPU = torch.device("cpu")
RANKS = (1, 3, 8, 16, 33)
CASES = {"one": (7, 33, (20,)), "qkv": (40, 576, (576, 192, 192)), "wide": (130, 1537, (70, 3000))}  # rows, K, sizes


def random_site(K: int, sizes: tuple[int, ...], *, looks_up: bool = False) -> lora.Site:
    """Eleven adapters: some without a product, some with a scale or a shift, some that leave a layer alone."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    site = lora.Site(sizes, CPU, looks_up=looks_up)
    for slot in range(11):
        terms = []
        for place, size in enumerate(sizes):
            rank = RANKS[(slot + place) % len(RANKS)]
            A, B = draw(K, rank) if looks_up else draw(rank, K) / K**0.5, draw(rank, size)
            scale, shift = (draw(size) if slot % step == 0 else None for step in (2, 3))
            if (slot + place) % 4 == 3:
                terms.append(None if slot % 2 else lora.Terms(shift=draw(size)))
            else:
                terms.append(lora.Terms(A, B, scale, shift))
        site.put(slot, tuple(terms))
    return site


def random_slots(rows: int) -> np.ndarray:
    """Slot 11 has no adapter here, -1 is no adapter at all."""
    return np.random.default_rng(rows).integers(-1, 12, rows)


def run(y, x, slots, site, backend: str) -> torch.Tensor:
    return lora.add_terms_(y.clone(), x, lora.tile_rows(slots, CPU), site, backend=backend)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("looks_up", [False, True], ids=["linear", "embedding"])
def test_against_plain_torch_and_every_row_alone(case, looks_up):
    rows, K, sizes = CASES[case]
    site = random_site(K, sizes, looks_up=looks_up)
    slots = random_slots(rows)
    x = torch.randint(K, (rows,)) if looks_up else torch.randn(rows, K)
    y = torch.randn(rows, sum(sizes))
    actual, expected = (run(y, x, slots, site, backend) for backend in ("cpu", "reference"))
    assert (actual - expected).abs().max() < 1e-6 * expected.abs().max() + 1e-6
    assert torch.equal(actual[slots < 0], y[slots < 0]) and not torch.equal(actual, y)
    alone = [run(y[i : i + 1], x[i : i + 1], slots[i : i + 1], site, "cpu") for i in range(rows)]
    assert torch.equal(torch.cat(alone), actual)
    order = torch.randperm(rows)
    assert torch.equal(run(y[order], x[order], slots[order.numpy()], site, "cpu"), actual[order])


def test_against_float64():
    site, slots = random_site(576, (96,)), np.zeros(30, dtype=np.int64)
    x, y = torch.randn(30, 576), torch.randn(30, 96)
    (terms,) = site.terms[0]
    exact = y.double() * terms.scale + terms.shift + x.double() @ terms.A.T.double() @ terms.B.double()
    error = (run(y, x, slots, site, "cpu") - exact).abs().max()
    assert error < 1e-5


def test_slots_come_and_go():
    site, x, y = random_site(33, (20,)), torch.randn(4, 33), torch.randn(4, 20)
    slots = np.array([2, 40, 2, -1])
    site.put(40, (lora.Terms(torch.ones(70, 33), torch.ones(70, 20)),))  # beyond the table, of a higher rank
    changed = run(y, x, slots, site, "cpu")
    assert (changed[1] - (y[1] + 70 * x[1].sum())).abs().max() < 1e-3
    site.remove(40)
    assert torch.equal(run(y, x, slots, site, "cpu")[1], y[1])
    assert torch.equal(run(y, x, slots, site, "cpu")[0], changed[0])


def test_rows_that_nobody_planned_are_refused():
    site, tiles = random_site(33, (20,)), lora.tile_rows(np.array([0, 1]), CPU)
    with pytest.raises(ValueError, match="adapters know of 2 rows of 20 outputs; the layer was given 3"):
        lora.add_terms_(torch.zeros(3, 20), torch.zeros(3, 33), tiles, site)
