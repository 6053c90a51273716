"""Quantized layers in transformers' tensor-parallel plans: what each rank loads of them, and their forward outside of steps.

A plan's styles know plain linear layers only. Those of this file do for quantized layers what the styles of the same name
do for plain ones; any other module gets the original.
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
        from torch.distributed.tensor import Shard, distribute_tensor

        cut = Cut(self._name in INPUTS, mesh.get_local_rank(), mesh.size())
        dim = dimensions(module.format, module.out_features, module.in_features, cut).get(param)
        if dim is not None:
            placeholder = distribute_tensor(module._parameters[param].data, mesh, [Shard(dim)], src_data_rank=None)
            module._parameters[param] = nn.Parameter(placeholder, requires_grad=False)

    def install_forward(self, module, mesh):
        if not isinstance(module, QuantLinear):
            return self._plain.install_forward(module, mesh)
        module.cut = Cut(self._name in INPUTS, mesh.get_local_rank(), mesh.size())
        own, group = module.forward, mesh.get_group()

        def forward(input: Tensor) -> Tensor:
            if torch.is_grad_enabled() and input.requires_grad:
                raise UnsupportedOption(
                    "model: quantized layers that are sharded have no gradients; use torch.no_grad()"
                )
            if self._name in INPUTS:
                return _summed(module, input, group)
            output = own(input)
            return _gathered(output, group) if self._name in GATHERED else output

        module.forward = forward
        return module


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


def plan_quantized(model: nn.Module, size: int) -> None:
    """Let a model's plan deal out the quantized layers that it has, to `size` ranks.

    Raises UnsupportedOption, naming the layer, for one that cannot be cut as its plan says.
    """
    plan = dict(model.tp_plan or {})
    for name, module in model.named_modules():
        key = tensor_parallel.replace_layer_number_by_wildcard(name)
        style = plan.get(key, "").removeprefix(PREFIX)
        if not isinstance(module, QuantLinear) or not style:
            continue
        if style not in (*OUTPUTS, *INPUTS):
            raise UnsupportedOption(f"{name}: distributed_config: quantized layers are not sharded as {style!r}")
        try:
            dimensions(module.format, module.out_features, module.in_features, Cut(style in INPUTS, 0, size))
        except UnsupportedOption as error:
            raise UnsupportedOption(f"{name}: {error}") from error
        plan[key] = PREFIX + style
        if PREFIX + style not in tensor_parallel.ALL_PARALLEL_STYLES:
            tensor_parallel.ALL_PARALLEL_STYLES.register(PREFIX + style, QuantizedStyle(style))
    model.tp_plan = plan
