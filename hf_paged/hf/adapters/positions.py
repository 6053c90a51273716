"""Position embeddings that stock counts off the rows it is given; in a packed batch the step knows the positions."""

from __future__ import annotations

from ...base.errors import UnsupportedModel
from ...runtime.batch import active_context
from ..swap import Swapped
from .base import Positions


class CountedPositions(Swapped):
    """RoFormer's, BART's and its relatives': they number the rows from the length of the cache on."""

    @classmethod
    def describe(cls, module, index):
        return Positions(module.num_embeddings - getattr(module, "offset", 0))

    def forward(self, input_ids, *args, **kwargs):
        context = active_context()
        if context is None:
            return super().forward(input_ids, *args, **kwargs)
        return super().forward(input_ids, position_ids=context.position_ids[0])


class TrOCRSinusoidalPositions(Swapped):
    @classmethod
    def describe(cls, module, index):
        raise UnsupportedModel(
            "model: TrOCR with use_learned_position_embeddings=False does not number its padding tokens, wherever they "
            "stand; hf_paged numbers every token"
        )


class XGLMPositions(Swapped):
    """Takes positions, but replaces its table by a longer one when the packed batch has more rows than it."""

    @classmethod
    def describe(cls, module, index):
        return Positions(len(module.weights) - module.offset)

    def forward(self, position_ids=None, *args, **kwargs):
        if active_context() is None:
            return super().forward(position_ids, *args, **kwargs)
        return self.weights[position_ids + self.offset]
