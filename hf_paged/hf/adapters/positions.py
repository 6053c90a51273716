"""Modules that stock lets count the rows they are given; in a packed batch the step knows the positions."""

from __future__ import annotations

import torch
from torch import nn

from ...base.errors import UnsupportedModel
from ...runtime.batch import active_context
from ..names import CACHE_NAME
from ..swap import Swapped
from .base import PaddingFlaw


class _Positions(Swapped):
    @classmethod
    def describe(cls, module, index) -> None:
        """Nothing needs to be known of these modules. Raises UnsupportedModel."""


class CountedPositions(_Positions):
    """RoFormer's, BART's and its relatives': tables that number the rows from the length of the cache on."""

    def forward(self, input_ids, *args, **kwargs):
        context = active_context()
        if context is None:
            return super().forward(input_ids, *args, **kwargs)
        return nn.Embedding.forward(self, context.position_ids[0] + getattr(self, "offset", 0))


class Llama4TextAttention(_Positions):
    """Its temperature grows with positions, which it numbers from the length of the cache on, padding too."""

    @classmethod
    def describe(cls, module, index) -> PaddingFlaw | None:
        if module.use_rope or not module.attn_temperature_tuning:
            return None
        return PaddingFlaw(
            f"with padding, transformers raises its temperature too soon (config.floor_scale is {module.floor_scale})",
            columns=int(module.floor_scale),
        )

    def forward(self, *args, **kwargs):
        context = active_context()
        if context is not None:
            kwargs[CACHE_NAME] = _Past(context.position_ids[0])
        return super().forward(*args, **kwargs)


class _Past:
    """Stands in for a cache that keeps nothing, but has for each row the length that numbers it rightly."""

    def __init__(self, positions):
        self.lengths = positions - torch.arange(len(positions), device=positions.device)

    def get_seq_length(self, layer_idx: int = 0):
        return self.lengths

    def update(self, key, value, *args, **kwargs):
        return key, value


class TrOCRSinusoidalPositions(_Positions):
    @classmethod
    def describe(cls, module, index):
        raise UnsupportedModel(
            "model: TrOCR with use_learned_position_embeddings=False does not number its padding tokens, wherever they "
            "stand; hf_paged numbers every token"
        )


class XGLMPositions(_Positions):
    """Takes positions, but replaces its table by a longer one when the packed batch has more rows than it."""

    def forward(self, position_ids=None, *args, **kwargs):
        if active_context() is None:
            return super().forward(position_ids, *args, **kwargs)
        return self.weights[position_ids + self.offset]
