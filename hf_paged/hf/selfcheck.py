"""One packed forward against stock's own, when a model is patched: an unknown difference is refused, not wrong."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..base.config import EngineConfig
from ..base.errors import UnsupportedModel
from ..core.request import Request
from ..engine.build import build
from ..runtime.runner import ModelRunner
from .adapters import Adaptations
from .attention import attention_configs, observing, paged_attention
from .swap import evaluating
from .visibility import Visibility

TOKENS = 24
MOST_TOKENS = 80  # to reach beyond a window or chunk of up to 64

# Largest difference of a row's logits, relative to its largest logit. Rounding stays far below, a wrong mask, position
# or state far above. In narrow types single rows may differ by more, where an expert's choice was close.
LIMIT = 1e-2
LIMIT_NARROW = 0.1


@dataclass
class Observed:
    """Stock's own forward of a few tokens.

    Attributes:
        ids: [1, L] its tokens, all different where the vocabulary allows.
        logits: [L, V].
        visibility: what its attention layers saw.
    """

    ids: torch.Tensor
    logits: torch.Tensor
    visibility: Visibility


def observe(model: torch.nn.Module, adaptations: Adaptations) -> Observed:
    """Runs the model's own forward, as stock runs it. Raises UnsupportedModel for attention hf_paged does not do."""
    device = next(model.parameters()).device
    ids = _tokens(model, device)
    visibility = Visibility()
    # Modules with a softmax of their own, whose adapters know what they see, may ask for the implementation's name.
    configs = [] if adaptations.layers else attention_configs(model)
    with evaluating(model), paged_attention(configs), observing(visibility):
        output = model(input_ids=ids, position_ids=torch.arange(ids.shape[1], device=device)[None], use_cache=False)
    return Observed(ids, output.logits[0], visibility)


def _tokens(model: torch.nn.Module, device: torch.device) -> torch.Tensor:
    config = model.config.get_text_config(decoder=True)
    local = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None) or MOST_TOKENS
    length = local + TOKENS if local + TOKENS <= MOST_TOKENS else TOKENS
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    special = {value for settings in (model.config, config) for name, value in vars(settings).items()
               if name.endswith(("token_id", "token_index")) and isinstance(value, int)}  # fmt: skip
    plain = (token for token in range(vocabulary) if token not in special)
    ids = [token for token, _ in zip(plain, range(length))] or [0]
    return torch.tensor([ids], dtype=torch.int64, device=device)


def check_forward(adapter, observed: Observed, config: EngineConfig) -> None:
    """Raise UnsupportedModel unless two sequences in one batch of an engine get the logits that stock gives each.

    Their tokens begin alike, so that stock's one forward says what both must be.
    """
    tokens = observed.ids[0].tolist()
    lengths = [len(tokens), max(1, len(tokens) * 2 // 3)]
    bytes_per_token = sum(layer.bytes_per_token(adapter.dtype.itemsize) for layer in adapter.layers)
    state_bytes = sum(spec.num_bytes for spec in adapter.states)
    small = config.replace(
        block_size=None, kv_cache_memory=512 * max(1, bytes_per_token) + 8 * state_bytes, memory_fraction=None, kv_dtype=None,
        max_batch_tokens=sum(lengths), max_num_seqs=2, prefix_cache=False, speculation=None,
    )  # fmt: skip
    cache, scheduler = build(adapter, small, max_model_len=len(tokens) + 1)
    runner = ModelRunner(adapter, cache, backend=config.attention_backend)
    try:
        for index, length in enumerate(lengths):
            scheduler.add(Request(request_id=str(index), prompt_token_ids=tokens[:length], max_tokens=1))
        plan = scheduler.schedule()
        logits = runner.forward(runner.prepare(plan), list(range(plan.num_tokens)))
    finally:
        runner.close()
    narrow = adapter.dtype != torch.float32
    for length, mine in zip(plan.num_new, logits.split(plan.num_new)):
        errors = _errors(mine, observed.logits[:length])
        error = float(errors.median() if narrow else errors.max()) if len(errors) else 0.0
        if not error <= (LIMIT_NARROW if narrow else LIMIT):
            raise UnsupportedModel(
                f"model: {type(adapter.module).__name__} computes other logits in a packed batch than by itself (off by "
                f"{error:.1g} of the largest), which hf_paged cannot explain"
            )


def _errors(mine: torch.Tensor, stock: torch.Tensor) -> torch.Tensor:
    """The relative error of every row of which stock's logits are numbers."""
    sound = stock.isfinite().all(-1)
    mine, stock = mine[sound].float(), stock[sound].float()
    return ((mine - stock).abs().amax(-1) / stock.abs().amax(-1).clamp_min(1.0)).nan_to_num(nan=float("inf"))
