"""The attention function transformers calls, by name, from inside every attention layer.

Inside a step (or a probe) of this thread it hands queries, keys and values to that step. Anywhere else, for example
when gradient checkpointing runs a layer again while another thread is stepping, it is the implementation the model
had before.
"""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..base.errors import UnsupportedModel
from ..runtime.batch import active_context
from .adapters import LatentAttention
from .switch import Switch

NAME = "hf_paged"
# `with paged_attention(configs):` they name our function as their attention implementation.
paged_attention = Switch("_attn_implementation_internal", NAME)


def _packed_sequences(position_ids: torch.Tensor) -> torch.Tensor | None:
    """Stock's search for several sequences in one row, before it makes a mask. In a step there is no mask to make.

    It asks the device whether it found any, and so waits for all that the device was given before.
    """
    compiling = torch.compiler.is_compiling()  # somebody's model, never inside a step
    if not compiling and active_context() is not None:
        return None
    return _mask_switch.original(masking_utils)(position_ids)


_mask_switch = Switch("find_packed_sequence_indices", _packed_sequences)


@contextmanager
def paged_masks():
    """While inside, making no mask takes no look at the positions of a step."""
    with _mask_switch([masking_utils] if hasattr(masking_utils, _mask_switch.attribute) else []):
        yield


def paged_attention_forward(
    module, query, key, value, attention_mask=None, scaling=None, softcap=None, s_aux=None, **kwargs
):
    """query [1, Hq, T, D], key and value [1, Hkv, T, D] of the packed batch -> ([1, T, Hq, Dv], None)."""
    context = active_context()
    if context is None:
        observer = _active_observer()
        if observer is not None:
            _check_layer(module)
            observer.attended(module, attention_mask, kwargs)
        function = _fallback(module)
        extra = {"softcap": softcap} if softcap is not None else {}
        if s_aux is not None:
            extra["s_aux"] = s_aux
        return function(module, query, key, value, attention_mask, scaling=scaling, **extra, **kwargs)
    if attention_mask is not None:
        raise UnsupportedModel(
            f"{type(module).__name__} builds its own attention mask; hf_paged cannot tell what it hides"
        )
    _check_layer(module)
    if softcap is not None and drops_softcap(implementation(module.config)):
        softcap = None  # the same tokens as this model gives unpatched
    options = dict(scale=query.shape[-1] ** -0.5 if scaling is None else scaling, softcap=softcap, sinks=s_aux)
    if isinstance(module, LatentAttention):
        return module.attend_latent(context, query, key, value, **options)[None], None
    heads = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return context.attend(module.layer_idx, *heads, **options)[None], None


def _check_layer(module) -> None:
    if getattr(module, "layer_idx", None) is None:
        raise UnsupportedModel(f"{type(module).__name__} has no layer_idx, so its KV cache cannot be found")


def implementation(config) -> str | None:
    """The attention implementation that stock would use with `config`, inside a step or outside."""
    return paged_attention.original(config)


def drops_softcap(implementation: str | None) -> bool:
    """Whether transformers' own attention of that name ignores a softcap: "sdpa" does in the releases that let it."""
    return implementation == "sdpa"


def _paged_mask(*args, config=None, **kwargs):
    if active_context() is not None:
        # The step's own lengths say who sees whom. MPT converts its mask before it hands it on, so it is given one.
        return torch.zeros((), dtype=torch.bool) if getattr(config, "model_type", None) == "mpt" else None
    function = ALL_MASK_ATTENTION_FUNCTIONS[_stock_implementation(implementation(config) or "sdpa")]
    observer = _active_observer()
    if observer is None:
        return function(*args, config=config, **kwargs)
    mask = function(*args, config=config, **{**kwargs, "allow_is_causal_skip": False})
    observer.mask_made(mask, kwargs["mask_function"], kwargs.get("local_size"))
    return mask


def _fallback(module):
    name = _stock_implementation(implementation(module.config))
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    return sys.modules[type(module).__module__].eager_attention_forward


def _stock_implementation(name: str | None) -> str | None:
    """Under an observer, one whose masks are tensors over all positions."""
    return name if _active_observer() is None or name == "sdpa" else "eager"


AttentionInterface.register(NAME, paged_attention_forward)
AttentionMaskInterface.register(NAME, _paged_mask)


_observer = threading.local()


def _active_observer():
    return getattr(_observer, "active", None)


@contextmanager
def observing(observer):
    """While inside `paged_attention`, and outside any step, this thread's forwards are stock's own, and noted.

    `observer` is told of every mask that transformers makes (`mask_made`) and every attention (`attended`).
    """
    _observer.active = observer
    try:
        yield observer
    finally:
        _observer.active = None


def attention_configs(model: torch.nn.Module) -> list:
    """The distinct config objects that the model's modules consult."""
    found = {
        id(module.config): module.config
        for module in model.modules()
        if hasattr(getattr(module, "config", None), "_attn_implementation_internal")
    }
    return list(found.values())
