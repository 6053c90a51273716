"""What a rank has of a sharded model, in words and numbers."""

from __future__ import annotations

from torch import nn

from hf_paged_kernels import fused

from ..parallel.team import Team
from ..quant.linear import QuantLinear
from .fusion.sharded import ColumnLinear, HeadLinear, RowLinear, SplitExperts, VocabEmbedding, WholeExperts
from .shared_heads import num_copies
from .spec import text_config

KINDS = {
    WholeExperts: "whole experts, then summed",
    SplitExperts: "every expert, then summed",
    VocabEmbedding: "by vocabulary, then summed",
    HeadLinear: "by vocabulary",
    ColumnLinear: "by outputs",
    RowLinear: "by inputs, then summed",
}


def describe_shards(model: nn.Module, team: Team, backend: str) -> list[str]:
    """How a sharded, patched model is dealt out, a line for each kind of layers."""
    names: dict[str, dict[str, None]] = {}
    for name, module in model.named_modules():
        kind = next((text for form, text in KINDS.items() if isinstance(module, form)), None)
        if kind is None:
            continue
        if isinstance(module, QuantLinear):
            kind = f"{kind}: {module.format}"
        names.setdefault(kind, {})[name.rpartition(".")[2]] = None
    lines = [f"rank {team.rank} of {team.size}", *(f"{kind}: {', '.join(found)}" for kind, found in names.items())]
    kv_heads = getattr(text_config(model), "num_key_value_heads", None) or team.size
    copies = num_copies(kv_heads, team.size)
    if any(isinstance(module, ColumnLinear) for module in model.modules()) and copies and copies > 1:
        lines.append(f"key/value heads: {kv_heads}, each on {copies} ranks, with its cache")
    filled = [module for module in model.modules() if isinstance(module, QuantLinear) and module.takes is not None]
    if filled:
        most = max(module.takes.numel() / module.in_features for module in filled)
        lines.append(f"act-order: {len(filled)} layers cut by inputs are filled up with zeros, to {most:.2f} times their inputs")
    if count := num_rounded_jointly(model, backend):
        lines.append(f"inputs of {count} layers are rounded by scales that the ranks find together")
    return lines


def num_rounded_jointly(model: nn.Module, backend: str) -> int:
    """How many layers exchange the largest input of every token before they round their inputs, 4 bytes each."""
    layers = [module for module in model.modules() if isinstance(module, RowLinear) and isinstance(module, QuantLinear)]
    weights = [layer.quantized for layer in layers if layer.quantized.input_scale is None]
    return sum(fused.rounds_to(weight, backend=backend) is not None for weight in weights)
