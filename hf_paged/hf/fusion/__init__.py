"""Faster forwards for modules of a patched model, active only inside a step of the engine.

Only plain nn.Linear layers, and quantized ones, are merged or given another kernel unseen. Everything else is not chosen
by a class's name alone: it runs once beside the module's own forward on random inputs and is kept only if the results
agree (proof.py).
Outside a step, or when someone hooked a part that the fused form would bypass, the module's own forward runs.

- linear.py: y = x W^T by our kernel, on the live weight.
- merged.py: q/k/v, gate/up: one weight holds all of them, the model's own parameters are views of it. The first
  projection called on an input computes all; its siblings, called on the same tensor, take their share.
- norm.py, mlp.py, rotary.py: one kernel instead of five to twelve operations.
- experts.py: the experts of small batches, through transformers' own interface.
- sharded.py: the local parts of tensor-parallel layers, on which all of this works.
- attention.py, layer.py: whole attention modules and decoder layers, in which those kernels take in each other's work:
  on Triton seven kernels are left of a layer that decodes.
"""

from __future__ import annotations

import torch
from torch import nn

from hf_paged_kernels import fused, ops

from ...parallel.team import Team
from ..weights import float_parameter
from .base import Fusions
from .experts import fuse_experts
from .layer import fuse_layers
from .linear import fuse_linear
from .merged import merge_projections
from .mlp import fuse_mlp
from .norm import fuse_norm
from .proof import voting
from .rotary import fuse_rotary
from .sharded import shard_modules

__all__ = ["Fusions", "fuse", "fuse_layers", "shard", "voting"]


def shard(model: nn.Module, team: Team) -> Fusions:
    """Only the local forms of a sharded model, without which it does not run on pages."""
    fusions = Fusions()
    fusions.unwrap.append(shard_modules(model, team, fusions.backend))
    return fusions


def fuse(model: nn.Module, backend: str = "auto", team: Team | None = None, *, exact: bool = False) -> Fusions:
    """Fuse what is proven equal in `model`; what cannot be fused is left alone and noted.

    Args:
        backend: whose kernels to use: a name of `ops.BACKENDS` that can run on the model's device.
        team: the ranks of a sharded model, all of which do this at the same time.
        exact: linear layers run on our kernels, whatever torch's are good for.
    """
    parameter = float_parameter(model)
    like = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    fusions = Fusions(ops.resolve_backend(backend, like.device), like, exact=exact)
    try:
        with torch.no_grad(), voting(team and team.unanimous):
            if team is not None:
                fusions.unwrap.append(shard_modules(model, team, fusions.backend))
            _fuse_all(model, fusions, fused.why_unavailable(like, backend=backend))
    except BaseException:
        fusions.undo()
        raise
    return fusions


def _fuse_all(model: nn.Module, fusions: Fusions, unavailable: str | None) -> None:
    merge_projections(model, fusions)
    if unavailable is not None:
        fusions.notes["kernels"] = unavailable
        return
    modules = list(model.modules())
    for module in modules:
        fuse_mlp(module, fusions)
    for module in modules:
        fuse_linear(module, fusions)
        fuse_norm(module, fusions)
    fuse_rotary(model, fusions)
    fuse_experts(model, fusions)
