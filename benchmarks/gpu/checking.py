"""What the areas of the check are made of: cases, each an error and the bound it must keep."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps

import torch
from torch import Tensor

# Largest error of one value, as a share of that value and the root mean square of its row together. A rounding to
# bf16 is off by up to 2^-9 of a value, and there are a few on the way (probabilities or products, result). In fp32 it
# is sums in another order; products in TF32, which keeps 2^-11, are beyond the bound.
BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 2.5e-3, torch.float32: 1e-4}


@dataclass(frozen=True)
class Setting:
    """Where and how thoroughly to check. `small`: sizes that Triton's interpreter gets through."""

    device: torch.device
    small: bool
    backend: str


@dataclass(frozen=True)
class Case:
    """One comparison: its largest error, and the bound, in the same unit. An error of NaN is beyond every bound."""

    name: str
    error: float
    bound: float

    @property
    def used(self) -> float:
        """Share of the bound; infinite for NaN, and for any error where the bound is zero."""
        if self.error != self.error:
            return math.inf
        return self.error / self.bound if self.bound else math.inf * self.error if self.error else 0.0


def deviation(got: Tensor, expected: Tensor) -> float:
    """Largest |got - expected| / (|expected| + root mean square of its row); NaN if `got` has one. Rows are the last
    dimension."""
    if got.shape != expected.shape:
        raise AssertionError(f"shape {list(got.shape)} instead of {list(expected.shape)}")
    expected = expected.float()
    sizes = expected.pow(2).mean(-1, keepdim=True).sqrt()
    sizes = sizes.clamp(min=max(1e-3 * float(sizes.mean()), 1e-30))  # a row of hardly anything has no digits to lose
    return float(((got.float() - expected).abs() / (sizes + expected.abs())).max())


def compare(name: str, got: Tensor, expected: Tensor, dtype: torch.dtype, bound: float | None = None) -> Case:
    """`got` in `dtype` arithmetic against `expected` in float32."""
    return Case(name, deviation(got, expected), BOUNDS[dtype] if bound is None else bound)


def equal(name: str, got: Tensor, expected: Tensor) -> Case:
    """Both must have the same bits (NaN equals NaN)."""
    same = (got == expected) | (got.isnan() & expected.isnan()) if got.is_floating_point() else got == expected
    return Case(name, float((~same).sum()), 0.0)


def guarded(check: Callable[..., Case]) -> Callable[..., Case]:
    """`check(name, ...)` as a case that fails where it raises, so that the cases after it still run."""

    @wraps(check)
    def guarded_check(name: str, *arguments, **options) -> Case:
        try:
            return check(name, *arguments, **options)
        except Exception as error:
            return Case(f"{name}: {summary(error)}", math.nan, 0.0)

    return guarded_check


def summary(error: Exception) -> str:
    """An exception in a line: its type, where it was raised, what it says first."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{type(error).__name__} in {where.name} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})"
    return ": ".join([text, *str(error).strip().splitlines()[:1]])


def run_area(name: str, cases: Iterable[Case]) -> bool:
    """Run the cases of an area, print its line, and the cases that failed. True if none did."""
    start, done, error = time.perf_counter(), [], ""
    try:
        for case in cases:
            done.append(case)
    except Exception as raised:
        error = summary(raised)
    seconds = time.perf_counter() - start
    failed = [case for case in done if case.used > 1]
    passed = bool(done) and not failed and not error
    worst = max(done, key=lambda case: case.used, default=None)
    closest = f"worst {worst.error:.2g} of {worst.bound:.2g} ({worst.name})" if worst else "no case ran"
    print(f"{'PASS' if passed else 'FAIL'} {name:<24} {len(done):>3} cases {seconds:6.1f} s  {closest}", flush=True)
    for case in failed:
        print(f"     {case.name}: {case.error:.3g}, bound {case.bound:.3g}")
    if error:
        print(f"     after {done[-1].name if done else 'nothing'}: {error}", flush=True)
    return passed
