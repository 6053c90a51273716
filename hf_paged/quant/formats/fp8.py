"""FP8 checkpoints: transformers' own (DeepSeek's blocks and others), Mistral's, and those of AutoFP8.

They differ in the scales' names, which are all multipliers ("weight_scale_inv" too), and in their shapes.
"""

from __future__ import annotations

from torch import Tensor

from ...base.errors import InvalidArgument
from .eight_bit import POWER_OF_TWO, EightBit

SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
INPUT_SCALES = ("activation_scale", "input_scale", "qscale_act")
SCHEMES = ("dynamic", "static")


def fp8_format(config: dict, tensors: dict[str, Tensor]) -> EightBit:
    """The format of a layer, by the checkpoint's config and the layer's tensors (their types and shapes).

    Raises InvalidArgument, beginning with the setting or the tensor that is wrong.
    """
    scheme = str(config.get("activation_scheme") or "dynamic").lower()
    if scheme not in SCHEMES:
        raise InvalidArgument(f"activation_scheme must be one of {SCHEMES}, not {scheme!r}")
    name = _one_of(SCALES, tensors)
    inputs = {}
    if scheme == "static":
        found = _one_of(INPUT_SCALES, tensors)
        inputs = dict(input_scale=found, input_dims=tensors[found].dim(), input_dtype=tensors[found].dtype)
    scale = tensors[name]
    return EightBit(
        "fp8",
        block=_block(config.get("weight_block_size"), scale),
        scale=name,
        scale_dims=scale.dim(),
        scale_dtype=POWER_OF_TWO if scale.dtype == POWER_OF_TWO else None,
        activations="fp8",
        **inputs,
    )


def _block(size: list[int] | None, scale: Tensor) -> tuple[int | None, int | None]:
    if size is None:
        return (None, None) if scale.numel() == 1 else (1, None)
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise InvalidArgument(f"weight_block_size must be two positive numbers, not {size!r}")
    return tuple(size)


def _one_of(names: tuple[str, ...], tensors: dict[str, Tensor]) -> str:
    found = next((name for name in names if name in tensors), None)
    if found is None:
        raise InvalidArgument(f"{names[0]} is missing")
    return found
