"""What a model is: whether its own tokens can be promised, its length, and its layers as a probe sees them."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..base.errors import UnsupportedModel
from ..runtime.batch import activate
from ..runtime.layout import LayerSpec
from ..runtime.states import StateSpec
from . import supported
from .adapters import LATENT, Adaptations, StateProbe
from .attention import attention_configs, paged_attention
from .peft import obstacles
from .swap import evaluating
from .tables import PositionTables
from .visibility import Rule, Visibility, check_cache


def check_supported(model: torch.nn.Module) -> None:
    """Raises UnsupportedModel, with the reason, unless hf_paged can promise this model's own tokens."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(f"model: {name} is not a transformers model")
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"model: {name} is an encoder-decoder; only decoder-only models have a paged KV cache")
    model_type = getattr(config, "model_type", "")
    if model_type in supported.AROUND_A_LANGUAGE_MODEL:
        model_type = text_config(model).model_type
    if model_type not in supported.SUPPORTED:
        reason = supported.REASONS.get(model_type, "this architecture has not been proven equal to stock transformers")
        raise UnsupportedModel(
            f"model: {name} (model type {model_type!r}) is not supported: {reason}. "
            f"hf_paged.hf.supported.SUPPORTED names the {len(supported.SUPPORTED)} model types that are"
        )
    for setting, (value, reason) in supported.REFUSED_SETTINGS.get(model_type, {}).items():
        if getattr(config, setting, None) == value:
            raise UnsupportedModel(f"model: config.{setting}={value!r} is not supported: {reason}")
    if getattr(model, "hf_device_map", None) and len(set(model.hf_device_map.values())) > 1:
        raise UnsupportedModel(f"model: {name} is spread over several devices (device_map); load it on one device")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedModel(f"model: {name} has weights on the meta device; load them first")
    for what, reason in obstacles(model):
        raise UnsupportedModel(f"model: {name} has {what} on it: {reason}")


class _Probe:
    """Stands in for a step: records each layer's shapes and attends plainly within the one sequence."""

    adapters = None

    def __init__(self, positions: torch.Tensor, states: StateProbe, backend: str):
        self.positions, self.position_ids = positions, positions[None]
        self.backend = backend
        self.seen: dict[tuple[int, int], tuple[int, int, int, int]] = {}  # by layer and call
        self.states = states
        self.shared: dict = {}

    def attend(self, layer_idx, query, key, value, *, scale, softcap=None, sinks=None, alibi_slopes=None):
        self.seen[layer_idx, self.calls[layer_idx]] = (query.shape[1], key.shape[1], query.shape[2], value.shape[2])
        self.calls[layer_idx] += 1
        groups = query.shape[1] // key.shape[1]
        output = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(0, 1),
            key.transpose(0, 1).repeat_interleave(groups, 0).to(query.dtype),
            value.transpose(0, 1).repeat_interleave(groups, 0).to(query.dtype),
            is_causal=True,
            scale=scale,
        )
        return output.transpose(0, 1).contiguous()


def text_config(model: torch.nn.Module):
    return model.config.get_text_config(decoder=True)


def encoders_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that see images, sounds and the like, by the configurations they have."""
    configs = {
        id(value)
        for name, value in vars(model.config).items()
        if name.endswith("_config") and isinstance(value, PreTrainedConfig) and value is not text_config(model)
    }
    return [module for module in model.modules() if id(getattr(module, "config", None)) in configs]


def language_modules(model: torch.nn.Module) -> set[torch.nn.Module]:
    """The modules that run on the tokens of a step: the decoder's, and the embeddings. Those of a model that sees images."""
    return set(model.get_decoder().modules()) | {model.get_input_embeddings(), model.get_output_embeddings()}


def has_mrope(model: torch.nn.Module) -> bool:
    """Whether the model's rotary embedding takes three positions a token, which are the same where there is only text."""
    return "mrope_section" in (getattr(text_config(model), "rope_parameters", None) or {})


def vocab_size(model: torch.nn.Module) -> int:
    """Rows of the input embeddings. Quantized ones, that are no nn.Embedding, tell their number and may have no table."""
    embeddings = model.get_input_embeddings()
    if isinstance(embeddings, torch.nn.Embedding) or not hasattr(embeddings, "num_embeddings"):
        return embeddings.weight.shape[0]
    return embeddings.num_embeddings


def decoder_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Name -> module of the decoder layers: the first list of as many modules as the language model has layers."""
    count = text_config(model).num_hidden_layers
    encoders = {id(part) for module in encoders_of(model) for part in module.modules()}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count and id(module) not in encoders:
            return {f"{name}.{index}": layer for index, layer in enumerate(module)}
    return {}


def probe_layers(
    model: torch.nn.Module, adaptations: Adaptations, visibility: Visibility, backend: str
) -> tuple[list[LayerSpec], list[StateSpec], int | None]:
    """Runs three tokens through the model.

    Returns its attention layers and those with a state, with sizes from the tensors seen, and how many positions its
    tables of positions have (None: it has no such table).

    Windows and chunks are those that stock's own forward showed (`visibility`), or an adapter's where only the module's
    code has them.
    """
    config = text_config(model)
    device = next(model.parameters()).device
    states = StateProbe(model)
    probe = _Probe(torch.arange(3, device=device), states, backend)
    ids = torch.zeros(1, 3, dtype=torch.int64, device=device)
    tables = PositionTables(model, probe.positions)
    with evaluating(model), paged_attention(attention_configs(model)), activate(probe), tables:
        model(input_ids=ids, position_ids=probe.position_ids, use_cache=False)
    attended, expected = {layer for layer, _ in probe.seen}, config.num_hidden_layers
    found = sorted(attended | {spec.layer_idx for spec in states.seen})
    keep_nothing = {i for i, kind in enumerate(getattr(config, "layer_types", None) or ()) if kind in ("mlp", "moe")}
    keep_nothing |= set(getattr(config, "cross_attention_layers", None) or ())  # they rest where there is only text
    # a looped model counts every pass as a layer
    if keep_nothing.union(found) != set(range(expected)) and len(probe.seen) != expected:
        raise UnsupportedModel(
            f"model: {type(model).__name__} has {expected} layers but attended, or kept a state, in layers {found}"
        )
    check_cache(config, visibility.layers)
    if config.model_type == "minimax" and getattr(config, "sliding_window", None):
        raise UnsupportedModel(
            "model: config.sliding_window is set, which this family's own cache knows nothing of, so prefill and decode "
            "disagree; set it to None"
        )
    layers = [
        LayerSpec(
            layer,
            *sizes,
            *(_rule(visibility, layer, call) or (adaptations.window(layer), None)),
            call=call,
            value_in_key=adaptations.kinds.get(layer) == LATENT,
        )
        for (layer, call), sizes in sorted(probe.seen.items())
    ]
    if any(layer.window or layer.chunk for layer in layers) and not all(spec.takes_chunks for spec in states.seen):
        raise UnsupportedModel(
            f"model: {type(model).__name__} has layers with a sliding window beside layers that need whole prompts"
        )
    return layers, states.seen, tables.max_positions


def _rule(visibility: Visibility, layer_idx: int, call: int) -> Rule | None:
    """(window, chunk) of one of a layer's attentions; None for a layer off the attention interface."""
    rules = visibility.layers.get(layer_idx, ())
    return rules[call] if call < len(rules) else None


NO_LIMIT = 2**31 - 1


def model_lengths(model: torch.nn.Module, table: int | None) -> tuple[int, int, str | None]:
    """(positions the model was made for, most positions it may be given, a note on the latter).

    A table of positions ends where it ends. Rotary embeddings of type "dynamic" and "longrope" change with the longest
    sequence of a batch once it passes the original length. One long request would then change its neighbours' tokens,
    so the original length is the limit.
    """
    if table is not None:
        return table, table, f"its table of positions ends at {table}"
    config = text_config(model)
    length = getattr(config, "max_position_embeddings", None) or NO_LIMIT
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [entry for entry in rope.values() if isinstance(entry, dict)]
    rope = next((entry for entry in by_layer_type or [rope] if entry.get("rope_type") in ("dynamic", "longrope")), None)
    if rope is None:
        return length, NO_LIMIT, None
    original = rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", length
    )
    limit = min(length, original)
    return limit, limit, f"rope type {rope['rope_type']!r} depends on the batch beyond {limit} positions"
