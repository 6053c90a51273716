"""What may be a draft model, and of what."""

from __future__ import annotations

import torch

from ..base.config import EngineConfig
from ..base.errors import InvalidArgument, UnsupportedModel
from .heads import head_of
from .spec import check_supported, vocab_size


def draft_config(config: EngineConfig, draft_model: torch.nn.Module | None) -> EngineConfig:
    """`config` with the speculation that giving or not giving a draft model means.

    Raises InvalidArgument if the two do not fit together.
    """
    method = config.speculation and config.speculation.method
    if draft_model is None:
        if method == "draft":
            raise InvalidArgument("speculation='draft' needs a draft_model: hf_paged.patch(model, draft_model=smaller)")
        return config
    if method == "ngram":
        raise InvalidArgument("speculation='ngram' uses no draft_model; leave out one of the two")
    return config if method else config.replace(speculation="draft")


def check_draft(model: torch.nn.Module, draft_model: torch.nn.Module) -> None:
    """Raise unless `draft_model` can guess what `model` will say."""
    if draft_model is model:
        raise InvalidArgument("draft_model is the model itself; it would guess at the price of the answer")
    try:
        check_supported(draft_model)
        if not head_of(draft_model).generates:
            raise UnsupportedModel(f"model: {type(draft_model).__name__} does not generate")
    except UnsupportedModel as error:
        raise UnsupportedModel(f"draft_{error}") from error
    sizes = [vocab_size(each) for each in (draft_model, model)]
    if sizes[0] != sizes[1]:
        raise InvalidArgument(
            f"draft_model: {type(draft_model).__name__} has a vocabulary of {sizes[0]} tokens, the model one of "
            f"{sizes[1]}; take a draft model with the same tokenizer and the same vocabulary size"
        )
