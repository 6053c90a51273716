"""M-RoPE: three positions a token (time, height, width) where there are images; what follows an image counts on from it.

All of it is the model's own (`get_rope_index`). A prompt keeps by how much they differ from the tokens' places.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...base.errors import InvalidArgument
from ...core.request import MediaSpan
from ..spec import has_mrope

# What says in a forward that has its positions no more than they do.
OF_THE_POSITIONS = frozenset(["mm_token_type_ids", "image_grid_thw"])


def counts_images(model: torch.nn.Module) -> bool:
    """Whether images move the positions of what follows them."""
    return has_mrope(model) and hasattr(model.base_model, "get_rope_index")


def prompt_positions(model: torch.nn.Module, token_ids: Sequence[int], token_id: int, grids: Tensor) -> Tensor:
    """[3, N] of a prompt whose placeholders have `token_id`. `grids`: [images, 3], as processors give them.

    Raises InvalidArgument if the images are not those of the placeholders.
    """
    ids = torch.tensor([token_ids])
    types = (ids == token_id).int()
    try:
        positions, _ = model.base_model.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=grids)
    except (RuntimeError, StopIteration, TypeError, ValueError):  # whatever it meets
        message = "images: image_grid_thw does not fit the prompt's placeholders; images need a token between them"
        raise InvalidArgument(message) from None
    return positions[:, 0]


def planes_of(position_ids: Tensor) -> Tensor:
    """[1 or 3, B, T] of position ids [B, T], or [P, B, T] with those of the text in front if there are four."""
    if position_ids.dim() == 2:
        return position_ids[None]
    return position_ids[1:] if len(position_ids) == 4 else position_ids


def shifts_of(planes: Tensor) -> np.ndarray:
    """int64 [3, N]: what is to be added to the places of a row's tokens. `planes`: [1 or 3, N]."""
    return (planes.cpu().expand(3, -1) - torch.arange(planes.shape[1])).numpy()


def go_on(planes: Tensor, is_image: Tensor) -> bool:
    """Whether every token of a row [P, N] that follows text, or nothing, goes on by one: only images jump, and after them.

    Then `seen_from` tells of every span all that is to be known.
    """
    planes = planes.cpu()
    expected = torch.cat([planes.new_zeros(len(planes), 1), planes[:, :-1] + 1], 1)
    free = is_image.cpu().clone()
    free[1:] |= is_image.cpu()[:-1]
    return bool(((planes == expected) | free).all())


def seen_from(planes: Tensor, span: MediaSpan) -> Tensor:
    """[P, n]: the positions of a span of a row and of the token after it, counted from what came before."""
    before = planes[:, span.start - 1] + 1 if span.start else planes.new_zeros(len(planes))
    return planes[:, span.start : span.end + 1] - before[:, None]
