"""Position embeddings that stock counts off the rows it is given; in a packed batch the step knows the positions."""

from __future__ import annotations

from torch import nn

from ...base.errors import UnsupportedModel
from ...runtime.batch import active_context
from ..swap import Swapped


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
