"""Quantized layers in transformers' tensor-parallel plans: what each rank loads of them, and their forward outside of steps.

A plan's styles know plain linear layers only. Those of this file do for quantized layers what the styles of the same name
do for plain ones; any other module gets the original. They stand in for the plan's own while a model is loaded.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.distributed import tensor_parallel

from ..base.errors import UnsupportedOption
from ..quant.cuts import Cut, dimensions, rounded_jointly
from ..quant.linear import QuantLinear

PREFIX = "hf_paged_"
OUTPUTS = ("colwise", "colwise_gather_output", "colwise_rep")
GATHERED = OUTPUTS[1:]
INPUTS = ("rowwise",)


class QuantizedStyle:
    """The style `name` for modules of which some are quantized."""

    def __init__(self, name: str):
        self._name, self._plain = name, tensor_parallel.ALL_PARALLEL_STYLES[name]

    def __getattr__(self, name: str):
        return getattr(self._plain, name)

    def validate_param(self, module, param, mesh, parameter_name=None):
        if not isinstance(module, QuantLinear):
            self._plain.validate_param(module, param, mesh, parameter_name=parameter_name)

    def shard_param(self, module, param, mesh):
        """A placeholder of which the loader fills this rank's part."""
        if not isinstance(module, QuantLinear):
            return self._plain.shard_param(module, param, mesh)
        from torch.distributed.tensor import Shard

        dim = cut_dimension(module, param, self._cut(mesh))
        if dim is not None:
            put_placeholder(module, param, mesh, [Shard(dim)])

    def install_forward(self, module, mesh):
        if not isinstance(module, QuantLinear):
            return self._plain.install_forward(module, mesh)
        return install_cut(module, self._cut(mesh), self._name, mesh.get_group())

    def _cut(self, mesh) -> Cut:
        return Cut(self._name in INPUTS, mesh.get_local_rank(), mesh.size())


def cut_dimension(layer: QuantLinear, param: str, cut: Cut) -> int | None:
    """Along which dimension a stored tensor is cut; None if every rank has all of it."""
    return dimensions(layer.format, layer.out_features, layer.in_features, cut).get(param)


def put_placeholder(module: nn.Module, param: str, mesh, placements: list) -> None:
    """Have a loader fill a rank's part of a parameter that is nothing yet."""
    from torch.distributed.tensor import distribute_tensor

    whole = module._parameters[param]
    placeholder = distribute_tensor(whole.data, mesh, placements, src_data_rank=None)
    module._parameters[param] = nn.Parameter(placeholder, requires_grad=whole.requires_grad)


def install_cut(layer: QuantLinear, cut: Cut, style: str, group) -> QuantLinear:
    """Make a layer, before it is packed, the part that `cut` says, with a forward as the plan's `style` has it."""
    layer.cut, own = cut, layer.forward

    def forward(input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and input.requires_grad:
            raise UnsupportedOption("model: quantized layers that are sharded have no gradients; use torch.no_grad()")
        if style in INPUTS:
            return _summed(layer, input, group)
        output = own(input)
        return _gathered(output, group) if style in GATHERED else output

    layer.forward = forward
    return layer


def _summed(layer: QuantLinear, input: Tensor, group) -> Tensor:
    def largest(peaks: Tensor) -> Tensor:
        dist.all_reduce(peaks, dist.ReduceOp.MAX, group=group)
        return peaks

    output = rounded_jointly(layer, input, layer.backend, largest)
    dist.all_reduce(output, group=group)
    return output if layer.bias is None else output + layer.bias


def _gathered(output: Tensor, group) -> Tensor:
    parts = [torch.empty_like(output, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, output.contiguous(), group=group)
    return torch.cat(parts, -1)


def plan_quantized(model: nn.Module, plan: dict[str, str], size: int, others: dict[str, int]) -> None:
    """Have `plan` deal out the quantized layers of `model` to `size` ranks.

    Args:
        others: styles that take quantized layers as they are, with the number of parts into which they cut outputs.

    Raises UnsupportedOption, naming the layer, for one that cannot be cut as its plan says.
    """
    before = dict(plan)
    for name, module in model.named_modules():
        key = tensor_parallel.replace_layer_number_by_wildcard(name)
        style = before.get(key)
        if not isinstance(module, QuantLinear) or not style:
            continue
        if style not in (*OUTPUTS, *INPUTS, *others):
            raise UnsupportedOption(f"{name}: distributed_config: quantized layers are not sharded as {style!r}")
        cut = Cut(style in INPUTS, 0, others.get(style, size))
        try:
            dimensions(module.format, module.out_features, module.in_features, cut)
        except UnsupportedOption as error:
            raise UnsupportedOption(f"{name}: {error}") from error
        if style not in others:
            plan[key] = PREFIX + style
