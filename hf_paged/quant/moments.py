"""What calibration keeps of a layer's inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.errors import InvalidArgument


class Moments:
    """Of the inputs x [T, K] of a linear layer: their second moments and mean magnitudes, in fp32.

    They are all that the error of a rounded weight depends on: |x (W' - W)^T|^2, summed over the inputs, is the trace of
    (W' - W) X^T X (W' - W)^T. So the inputs themselves, which are much larger, need not be kept.
    """

    def __init__(self, K: int, device: torch.device | str = "cpu"):
        self.count = 0
        self._products = torch.zeros(K, K, device=device)
        self._magnitudes = torch.zeros(K, device=device)

    def add(self, x: Tensor) -> None:
        """Count the rows of x [..., K]."""
        x = x.detach().reshape(-1, x.shape[-1]).to(self._products)
        self.count += len(x)
        self._products.addmm_(x.T, x)
        self._magnitudes += x.abs().sum(0)

    @property
    def second(self) -> Tensor:
        """[K, K]: the mean of x_i x_j. Raises InvalidArgument if it is not finite."""
        second = self._products / max(1, self.count)
        if not second.isfinite().all():
            raise InvalidArgument("calibration: the inputs of this layer are not finite")
        return second

    @property
    def magnitude(self) -> Tensor:
        """[K]: the mean of |x_k|."""
        return self._magnitudes / max(1, self.count)

    def divide_(self, scales: Tensor) -> None:
        """From now on those of x / scales [K]."""
        self._products.div_(scales[:, None]).div_(scales)
        self._magnitudes.div_(scales)


def error(difference: Tensor, second: Tensor) -> Tensor:
    """[..., N]: the mean squared error of each output of a layer whose weight is off by `difference` [..., N, K]."""
    return (difference @ second).mul_(difference).sum(-1)
