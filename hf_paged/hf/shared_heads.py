"""Key/value heads of which there are fewer than ranks, in transformers' tensor-parallel plans.

A plan cuts the projections of keys and values into as many parts as there are ranks, which tears such heads apart; the
forward of that model fails. Here neighbouring ranks have the same head instead, the one that their query heads look at:

    4 ranks, 8 query heads, 2 key/value heads      rank 0: q 0, 1; k 0     rank 1: q 2, 3; k 0     rank 2: q 4, 5; k 1  ...

The parameters are distributed over a mesh [heads, copies], split along the first dimension and replicated along the second,
so transformers loads, gathers and saves them as any others.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..quant.cuts import Cut
from ..quant.linear import QuantLinear
from .quantized_plan import cut_dimension, install_cut, put_placeholder

DIMENSIONS = ("kv_heads", "copies")
PROJECTIONS = ("k_proj", "v_proj")


def num_copies(num_kv_heads: int, size: int) -> int | None:
    """How many of `size` ranks have the same key/value heads; None if they cannot be dealt out in equal parts."""
    if num_kv_heads % size == 0:
        return 1
    return size // num_kv_heads if size % num_kv_heads == 0 else None


def has_shared_heads(parameter: Tensor) -> bool:
    """Whether a distributed parameter is of projections that the style of this file has cut."""
    return parameter.device_mesh.mesh_dim_names == DIMENSIONS


class SharedHeads:
    """A style of plans, for linear layers, quantized or not, whose outputs are whole heads.

    Args:
        num_kv_heads: of the model; a divisor of the number of ranks.
    """

    def __init__(self, num_kv_heads: int):
        self._num_kv_heads, self._mesh = num_kv_heads, None

    def validate_param(self, module, param, mesh, parameter_name=None):
        pass

    def shard_param(self, module, param, mesh):
        """A placeholder of which the loader fills this rank's heads."""
        from torch.distributed.tensor import Replicate, Shard

        if module._parameters[param] is None:
            return
        dim = cut_dimension(module, param, self._cut(mesh)) if isinstance(module, QuantLinear) else 0
        if dim is not None:
            put_placeholder(module, param, self._split(mesh), [Shard(dim), Replicate()])

    def install_forward(self, module, mesh):
        everyone, copies = mesh.get_group(), self._split(mesh).get_group(DIMENSIONS[1])
        if isinstance(module, QuantLinear):
            return install_cut(module, self._cut(mesh), "colwise", everyone)

        def forward(input: Tensor) -> Tensor:
            weight = _SummedGradient.apply(module.weight.to_local(), copies)
            bias = None if module.bias is None else _SummedGradient.apply(module.bias.to_local(), copies)
            return nn.functional.linear(_SummedGradient.apply(input, everyone), weight, bias)

        module.forward = forward
        return module

    def _cut(self, mesh) -> Cut:
        return Cut(False, self._split(mesh).get_local_rank(DIMENSIONS[0]), self._num_kv_heads)

    def _split(self, mesh):
        """The mesh of the ranks, as [heads, copies]. All ranks make it at the same time."""
        if self._mesh is None:
            from torch.distributed.device_mesh import DeviceMesh

            ranks = mesh.mesh.reshape(self._num_kv_heads, -1)
            self._mesh = DeviceMesh(mesh.device_type, ranks, mesh_dim_names=DIMENSIONS)
        return self._mesh


class _SummedGradient(torch.autograd.Function):
    """The same tensor, whose gradient is the sum of those of all ranks of a group."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


def plan_shared_heads(model: nn.Module, plan: dict[str, str], size: int, style: str) -> int:
    """Give the projections of keys and values `style` in `plan` if their heads are fewer than the `size` ranks.

    Returns how many heads there are then; 0 if `plan` stays as it is.
    """
    config = model.config.get_text_config(decoder=True)
    num_heads, num_kv_heads = (getattr(config, field, None) for field in ("num_attention_heads", "num_key_value_heads"))
    keys = [key for key, own in plan.items() if own == "colwise" and key.rpartition(".")[2] in PROJECTIONS]
    copies = num_copies(num_kv_heads, size) if keys and num_kv_heads and num_heads % size == 0 else None
    if copies in (None, 1):
        return 0
    plan.update(dict.fromkeys(keys, style))
    for module in model.modules():
        if all(hasattr(module, name) for name in (*PROJECTIONS, "num_key_value_groups")):
            module.num_key_value_groups = num_heads // num_kv_heads // copies  # query heads a head, of one rank
    return num_kv_heads
