"""transformers' tensor-parallel plans, with what they lack: quantized layers, and fewer key/value heads than ranks.

Both would fail with the plan that the model's class has. It is changed while the model is dealt out to the ranks, before
its weights are read, and is the model's own again afterwards.

What a rank reads of a file it has in memory of its own. transformers leaves parts of outputs where the file is mapped, and the
pages of all ranks' parts of inputs stay with a process, too: together with what patching merges, that is several times its share.
"""

from __future__ import annotations

from functools import wraps

import torch
from torch import nn
from transformers.distributed import mixin, sharding_utils, tensor_parallel

from .checkpoint import forget_pages
from .quantized_plan import INPUTS, OUTPUTS, PREFIX, QuantizedStyle, plan_quantized
from .shared_heads import SharedHeads, plan_shared_heads

SHARED_HEADS = PREFIX + "shared_heads"


def install() -> None:
    """Have `from_pretrained` deal out such models, too. Importing hf_paged does it."""
    original = mixin.DistributedMixin.__dict__["maybe_distribute_model"].__func__
    if hasattr(original, "hf_paged_original"):
        return
    styles = tensor_parallel.ALL_PARALLEL_STYLES
    for name in (*OUTPUTS, *INPUTS):
        styles.register(PREFIX + name, QuantizedStyle(name))

    @wraps(original)
    def maybe_distribute_model(cls, model, distributed_config, mesh):
        size = getattr(distributed_config, "tp_size", None) or 1
        if mesh is None or size == 1:
            return original(cls, model, distributed_config, mesh)
        by_experts = distributed_config.enable_expert_parallel and not hasattr(distributed_config, "ep_size")
        attribute = "_ep_plan" if by_experts else "_tp_plan"  # 5.17 has one plan or the other
        own = dict(getattr(model, attribute) or {})
        setattr(model, attribute, _completed(model, own, size))
        try:
            return original(cls, model, distributed_config, mesh)
        finally:
            plan = {key: own[key] if style.startswith(PREFIX) else style for key, style in getattr(model, attribute).items()}
            setattr(model, attribute, plan)

    maybe_distribute_model.hf_paged_original = original
    mixin.DistributedMixin.maybe_distribute_model = classmethod(maybe_distribute_model)
    sharding_utils.DtensorShardOperation.shard_tensor = _reading_lightly(sharding_utils.DtensorShardOperation.shard_tensor)


def _reading_lightly(original):
    """transformers' `shard_tensor`, whose result is in memory of its own, and which leaves no pages of the file behind."""

    @wraps(original)
    def shard_tensor(self, source, tensor_idx=None, device=None, dtype=None):
        if isinstance(source, torch.Tensor):
            return original(self, source, tensor_idx=tensor_idx, device=device, dtype=dtype)
        part = original(self, source, tensor_idx=tensor_idx)
        if part is None or part.untyped_storage().nbytes() == part.nbytes:  # not this rank's; not a view of the file
            return None if part is None else part.to(device=device, dtype=dtype)
        own = torch.empty(part.shape, dtype=dtype or part.dtype, device=device or part.device).copy_(part)
        forget_pages(source[...])  # of all of it: the system maps more than was read
        return own

    return shard_tensor


def _completed(model: nn.Module, own: dict[str, str], size: int) -> dict[str, str]:
    """The plan `own` of `model` with styles of ours where it needs them. Raises UnsupportedOption as `plan_quantized`."""
    plan = dict(own)
    num_kv_heads = plan_shared_heads(model, plan, size, SHARED_HEADS)
    tensor_parallel.ALL_PARALLEL_STYLES.register(SHARED_HEADS, SharedHeads(num_kv_heads))
    plan_quantized(model, plan, size, {SHARED_HEADS: num_kv_heads})
    return plan


install()
