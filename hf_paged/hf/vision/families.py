"""How families of models take images: what their encoders see one by one, and how many tokens each of these stands for.

Encoder and projector are called as the model's own forward calls them, through `get_image_features`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...base.errors import InvalidArgument

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Family:
    """
    Attributes:
        names: what the encoder takes of a processor's outputs, the pixels first.
        split: those of one prompt -> those of each image, or of each part that is encoded by itself, in order.
        dim: along which several of these are put together.
        lengths: (model, the parts) -> tokens that each stands for; None, or one that gives None: all of them for as many.
        bidirectional: an image's tokens see each other.
    """

    names: tuple[str, ...]
    split: Callable[[torch.nn.Module, Inputs], list[Inputs]]
    dim: int = 0
    lengths: Callable[[torch.nn.Module, list[Inputs]], list[int] | None] | None = None
    bidirectional: bool = False

    def join(self, parts: list[Inputs]) -> dict[str, Tensor]:
        """What the encoder is given of several parts of the same shapes."""
        return {name: torch.cat([part[name] for part in parts], self.dim) for name in parts[0]}


def features(model: torch.nn.Module, inputs: Inputs) -> Tensor:
    """[N, H]: the embeddings of all images of `inputs`, as the model's own forward lays them over its placeholders.

    With deepstack.py's further features, [N, (1 + K) H].
    """
    return flat(model.base_model.get_image_features(**inputs, return_dict=True))


def flat(output) -> Tensor:
    """[N, H] of what `get_image_features` returned: a tensor, or a list with one for each image or row."""
    layers = [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]
    rows = []
    for layer in layers:
        parts = [layer] if isinstance(layer, Tensor) else layer
        rows.append(torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]))
    return torch.cat(rows, -1) if len(rows) > 1 else rows[0]


def _each(model: torch.nn.Module, inputs: Inputs) -> list[Inputs]:
    count = {len(value) for value in inputs.values()}
    if len(count) != 1:
        raise InvalidArgument(f"images: {' and '.join(inputs)} are of different numbers of images")
    return [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(count.pop())]


def _pictures(model: torch.nn.Module, inputs: Inputs) -> list[Inputs]:
    """LLaVA: pixels [N, C, H, W]; with sizes [N, 2] they are padded to the largest image (Pixtral's encoder)."""
    parts = _each(model, inputs)
    if "image_sizes" not in inputs:
        return parts
    sizes = inputs["image_sizes"].tolist()
    return [
        dict(part, pixel_values=part["pixel_values"][..., :height, :width])
        for part, (height, width) in zip(parts, sizes)
    ]


def _patch_lengths(model: torch.nn.Module, parts: list[Inputs]) -> list[int] | None:
    if "image_sizes" not in parts[0]:
        return None
    side = model.base_model.vision_tower.patch_size
    return [int((part["image_sizes"] // side).prod()) for part in parts]


def _tiles(model: torch.nn.Module, inputs: Inputs) -> list[Inputs]:
    """Tiles [1, T, C, H, W] of a prompt; those of zeros are padding."""
    pixels = inputs["pixel_values"]
    if pixels.dim() != 5 or len(pixels) != 1:
        raise InvalidArgument(f"images: pixel_values must be [1, tiles, C, H, W], got {list(pixels.shape)}")
    real = (pixels[0] != 0).flatten(1).any(-1)
    return [{name: value[:, i : i + 1] for name, value in inputs.items()} for i in real.nonzero()[:, 0].tolist()]


def _grids(model: torch.nn.Module, inputs: Inputs) -> list[Inputs]:
    """LLaVA-NeXT: patches [N, P, C, H, W], padded to the most that an image has, and sizes [N, 2]."""
    parts = _each(model, inputs)
    counts = _num_patches(model, inputs["image_sizes"])
    return [dict(part, pixel_values=part["pixel_values"][:, :count]) for part, count in zip(parts, counts)]


def _num_patches(model: torch.nn.Module, sizes: Tensor) -> list[int]:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    pinpoints, side = model.config.image_grid_pinpoints, model.config.vision_config.image_size
    return [image_size_to_num_patches(image_size=size, grid_pinpoints=pinpoints, patch_size=side) for size in sizes]


def _grid_lengths(model: torch.nn.Module, parts: list[Inputs]) -> list[int]:
    """As the model packs them, tried on features without a width."""
    vision = model.config.vision_config
    per_patch = (vision.image_size // vision.patch_size) ** 2
    strategy = model.config.vision_feature_select_strategy
    empty = torch.zeros(1)
    blank = [torch.zeros(part["pixel_values"].shape[1], per_patch, 1) for part in parts]
    sizes = torch.cat([part["image_sizes"] for part in parts])
    packed, _ = model.base_model.pack_image_features(blank, sizes, strategy, image_newline=empty)
    return [len(one) for one in packed]


def _by_grid(model: torch.nn.Module, inputs: Inputs) -> list[Inputs]:
    """Patches [P, D] of all images in a row, and the grids [N, 3] of patches (time, height, width) that each has."""
    counts = inputs["image_grid_thw"].prod(-1).tolist()
    if sum(counts) != len(inputs["pixel_values"]):
        raise InvalidArgument(f"images: image_grid_thw tells of {sum(counts)} patches, pixel_values has {len(inputs['pixel_values'])}")
    grids = inputs["image_grid_thw"].split(1)
    return [
        dict(pixel_values=pixels, image_grid_thw=grid)
        for pixels, grid in zip(inputs["pixel_values"].split(counts), grids, strict=True)
    ]


def _merged_lengths(model: torch.nn.Module, parts: list[Inputs]) -> list[int]:
    side = model.config.vision_config.spatial_merge_size
    return [int(part["image_grid_thw"].prod()) // side**2 for part in parts]


_TILED = Family(("pixel_values", "pixel_attention_mask"), _tiles, dim=1)
_MERGED = Family(("pixel_values", "image_grid_thw"), _by_grid, lengths=_merged_lengths)

FAMILIES: dict[str, Family] = {
    "gemma3": Family(("pixel_values",), _each, bidirectional=True),
    "idefics3": _TILED,
    "llava": Family(("pixel_values", "image_sizes"), _pictures, lengths=_patch_lengths),
    "llava_next": Family(("pixel_values", "image_sizes"), _grids, lengths=_grid_lengths),
    "qwen2_5_vl": _MERGED,
    "qwen2_vl": _MERGED,
    "qwen3_vl": _MERGED,
    "smolvlm": _TILED,
}
