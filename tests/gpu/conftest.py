"""Tests of Triton kernels: on the GPU if there is one, else on CPU tensors in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    import triton_interpreter  # noqa: F401  (applies the interpreter's repairs)

    return torch.device("cpu")
