"""A rank's part of a model, loaded and patched."""

from __future__ import annotations

import torch

from ... import patch
from ...hf.build import load_model, load_processor
from .options import Options


def load(options: Options, rank: int):
    """The patched model; all ranks of a replica call this at the same time."""
    config = options.engine_config()
    dtype = options.dtype and getattr(torch, options.dtype)
    ranks = options.tensor_parallel_size
    model, tokenizer = load_model(options.model, dtype=dtype, progress=False, num_ranks=ranks)
    draft = None
    if rank:
        config = config.replace(speculation=None)  # rank 0 guesses
    elif options.draft_model is not None:
        draft, _ = load_model(options.draft_model, dtype=dtype, progress=False)
    processor = load_processor(options.model, model, tokenizer) if options.model else None
    if options.chat_template is not None:
        tokenizer.chat_template = options.chat_template
    return patch(model, config, tokenizer=processor or tokenizer, draft_model=draft, quantization=options.quantization)
