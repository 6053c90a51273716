"""DeepStack (Qwen3-VL): an image's tokens get more of its features after each of the first layers.

An encoder's output for a token is then [(1 + K) H]: its embedding, and what is added to it after each of K layers. The
model's own decoder adds it, given the arguments that the model's own forward gives it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...runtime.batch import StepContext, active_context
from ..spec import text_config


@contextmanager
def deepened(model: nn.Module, context: StepContext) -> Iterator[None]:
    """Scope in which the model's decoder adds the further features of the images in the batch of `context`."""
    width = text_config(model).hidden_size
    if not context.embeddings or context.embeddings[0][1].shape[1] == width:
        yield
        return
    decoder = model.base_model.language_model
    more = _arguments(context, width)
    forward, before = decoder.forward, decoder.__dict__.get("forward")

    def with_features(*args, **kwargs):
        if active_context() is context:  # another thread may call the model, too
            kwargs |= more
        return forward(*args, **kwargs)

    decoder.forward = with_features
    try:
        yield
    finally:
        if before is None:
            del decoder.forward
        else:
            decoder.forward = before


def _arguments(context: StepContext, width: int) -> dict[str, Tensor | list[Tensor]]:
    spans = sorted(context.embeddings, key=lambda span: span[0])
    seen = torch.zeros(1, context.plan.num_tokens, dtype=torch.bool)
    for first, rows in spans:
        seen[0, first : first + len(rows)] = True
    features = torch.cat([rows[:, width:] for _, rows in spans])
    return {
        "visual_pos_masks": seen.to(features.device),
        "deepstack_visual_embeds": list(features.split(width, dim=1)),
    }
