"""Embeddings that a call of `generate` gives in place of its prompt's tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..base.errors import InvalidArgument


def check_embeds(model: nn.Module, embeds: torch.Tensor, input_ids: torch.Tensor, others: Mapping) -> None:
    """Raise InvalidArgument unless `embeds` is [B, T, width of the model's embeddings], of floats.

    Args:
        input_ids: [B, ...] or without tokens.
        others: the call's other inputs. transformers leaves out a mask of ones, having made positions of it.
    """
    if embeds.dim() != 3 or not embeds.is_floating_point():
        raise InvalidArgument(f"inputs_embeds must be floats [B, T, H], got {embeds.dtype} {list(embeds.shape)}")
    rows, tokens, width = embeds.shape
    wanted = getattr(model.get_input_embeddings(), "embedding_dim", width)
    if width != wanted:
        raise InvalidArgument(f"inputs_embeds must be [B, T, {wanted}] for this model, got {list(embeds.shape)}")
    if not rows:
        raise InvalidArgument("inputs_embeds has no rows")
    if input_ids.numel() and len(input_ids) != rows:
        raise InvalidArgument(f"inputs_embeds has {rows} rows, input_ids {len(input_ids)}")
    for name in ("attention_mask", "position_ids"):
        given = others.get(name)
        if given is not None and (given.shape[-2] not in (1, rows) or given.shape[-1] < tokens):
            raise InvalidArgument(f"{name} {list(given.shape)} does not fit inputs_embeds {list(embeds.shape)}")
