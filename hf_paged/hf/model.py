"""A transformers model as the engine's PagedModel: probe, forward of a packed batch, watch on the weights."""

from __future__ import annotations

import inspect

import torch

from ..base.errors import UnsupportedModel
from ..runtime.batch import StepContext, activate
from .attention import attention_configs, paged_attention
from .fusion import Fusions
from .spec import model_lengths, probe_layers
from .swap import evaluating

FINGERPRINT_SAMPLES = 16  # values looked at in each parameter


class TransformersModel:
    """Implements `runtime.runner.PagedModel` for a decoder-only transformers model. Reads the live weights."""

    def __init__(self, model: torch.nn.Module, fusions: Fusions):
        self.module = model
        self.fusions = fusions
        self.layers = probe_layers(model)
        self.max_model_len, self.length_limit, self.length_note = model_lengths(model)
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._configs = attention_configs(model)
        self._snapshot()

    @property
    def vocab_size(self) -> int:
        return self.module.get_input_embeddings().weight.shape[0]

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """What ends a request by default: the model's generation config, as in stock `generate`."""
        eos = self.module.generation_config.eos_token_id
        return frozenset(() if eos is None else [eos] if isinstance(eos, int) else eos)

    def forward(self, context: StepContext, rows: torch.Tensor) -> torch.Tensor:
        with evaluating(self.module), paged_attention(self._configs), activate(context):
            output = self.module(
                input_ids=context.input_ids,
                position_ids=context.position_ids,
                use_cache=False,
                **({"logits_to_keep": rows} if self._keeps_logits else {}),
            )
        logits = output.logits[0]
        return logits if self._keeps_logits else logits[rows]

    def weights_changed(self) -> bool:
        """In-place writes, swapped parameters, moved storage, hooks that came or went. About 50 us for 300 tensors."""
        for parameters, name, parameter, version, pointer in self._watched:  # buffers too
            current = parameters.get(name)
            if current is not parameter or _version(parameter) != version or parameter.data_ptr() != pointer:
                self._snapshot()
                return True
        if self._hooks != self._hook_ids():
            self._snapshot()
            return True
        return False

    def weights_replaced(self) -> bool:
        """Also writes through `.data` and modules that were swapped in: compares a few values of every parameter."""
        changed = self.weights_changed()
        before, adapters = self._fingerprint, self._adapters
        self._snapshot()
        return changed or adapters != self._adapters or not torch.equal(before, self._fingerprint)

    def _hook_ids(self) -> tuple[int, ...]:
        return tuple(hook for hooks in self._hook_dicts if hooks for hook in hooks)

    def _snapshot(self) -> None:
        self.fusions.rejoin()
        modules = list(self.module.modules())
        self._watched = [
            (tensors, name, tensor, _version(tensor), tensor.data_ptr())
            for module in modules
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]
        self._hook_dicts = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._hooks = self._hook_ids()
        self._adapters = [_adapter_state(module) for module in modules if hasattr(module, "active_adapters")]
        self._fingerprint = torch.stack([_sample(entry[2]) for entry in self._watched])
        device = self._watched[0][2].device
        if getattr(self, "device", device) != device:
            raise UnsupportedModel(
                f"model moved from {self.device} to {device} while patched; unpatch it, move it, patch it again"
            )


def _adapter_state(module) -> tuple:
    """What a PEFT layer currently adds to its base layer."""
    return tuple(map(str, (module.active_adapters, getattr(module, "disable_adapters", None))))


def _version(parameter: torch.Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version  # inference tensors count no versions


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    """The sum of a few values spread over the parameter, as float64 on its device."""
    flat = parameter.detach().flatten() if parameter.is_contiguous() else parameter.detach().reshape(-1)
    stride = max(1, flat.numel() // FINGERPRINT_SAMPLES)
    return flat[::stride].double().sum() if flat.numel() else torch.zeros((), dtype=torch.float64, device=flat.device)
