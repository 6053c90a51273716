"""Rotary embedding: one kernel instead of a dozen operations, where attention modules apply it by themselves.

It is a function of the modeling file, not a module: it is replaced there by a wrapper that outside a step is the
function itself. Several patched models may share a file, so wrappers are counted.
"""

from __future__ import annotations

import sys
from collections import Counter
from functools import partial

import torch
from torch import nn

from hf_paged_kernels import fused

from ...runtime.batch import active_context
from .base import Fusions
from .proof import agree, random_rows

_users: Counter = Counter()


def fuse_rotary(model: nn.Module, fusions: Fusions) -> None:
    names = {type(module).__module__ for module in model.modules()}
    device = next(model.parameters()).device
    for name in sorted(names):
        file = sys.modules.get(name)
        function = getattr(file, "apply_rotary_pos_emb", None)
        if function is None or not name.startswith("transformers.models."):
            continue
        if hasattr(function, "_hf_paged_original") or _agrees(function, device, fusions.backend):
            _wrap(file)
            fusions.unwrap.append(partial(_unwrap, file))
            fusions.counts["rotary"] += 1
        else:
            fusions.notes[note_of(name)] = "not the rotate-half form"


def note_of(file: str) -> str:
    """The key in `Fusions.notes` for the rotary function of a modeling file."""
    return f"{file}.apply_rotary_pos_emb"


def _agrees(function, device: torch.device, backend: str) -> bool:
    generator = torch.Generator().manual_seed(0)
    like = torch.empty(0, device=device)
    q, k = (random_rows(heads * 16, like).unflatten(1, (heads, 16))[None].transpose(1, 2) for heads in (4, 2))
    angles = torch.randn(1, q.shape[2], 8, generator=generator).to(device)
    cos, sin = (f(torch.cat((angles, angles), -1)) for f in (torch.cos, torch.sin))
    try:
        expected = function(q, k, cos, sin)
    except Exception:  # another signature: not the function we know
        return False
    return all(agree(a, e) for a, e in zip(_rotary(q, k, cos, sin, backend), expected))


def _rotary(q, k, cos, sin, backend: str):
    """q [1, Hq, T, D], k [1, Hkv, T, D], cos and sin [1, T, R] as the attention modules pass them."""
    q_out, k_out = fused.rotary(q[0].transpose(0, 1), k[0].transpose(0, 1), cos[0], sin[0], backend=backend)
    return q_out.transpose(0, 1)[None], k_out.transpose(0, 1)[None]


def _wrap(file) -> None:
    _users[file.__name__] += 1
    original = file.apply_rotary_pos_emb
    if hasattr(original, "_hf_paged_original"):
        return

    def apply_rotary_pos_emb(q, k, cos, sin, *args, **kwargs):
        context = active_context()
        if context is None or args or kwargs or not fused.supports_rotary(q, k, cos, sin):
            return original(q, k, cos, sin, *args, **kwargs)
        return _rotary(q, k, cos, sin, context.backend)

    apply_rotary_pos_emb._hf_paged_original = original
    file.apply_rotary_pos_emb = apply_rotary_pos_emb


def _unwrap(file) -> None:
    _users[file.__name__] -= 1
    if _users[file.__name__] == 0:
        file.apply_rotary_pos_emb = file.apply_rotary_pos_emb._hf_paged_original
