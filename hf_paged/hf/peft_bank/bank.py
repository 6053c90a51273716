"""The adapters of one model: loaded and unloaded while it serves, each request with its own or none.

Most run in one forward with everything else, as terms that kernels add to the layers' outputs (sites.py). What there are
no terms of (other kinds than LoRA, a few options, layers that do not run on the batch's rows) runs in a forward of its
own on PEFT's modules, and says so. Where PEFT's modules are in the model itself, requests without an adapter run as the
model is, in a forward of their own beside those that name one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from collections.abc import Sequence as AbstractSequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hf_paged_kernels import ops
from hf_paged_kernels.lora import Terms, terms_dtype

from ...base.config import EngineConfig
from ...base.errors import InvalidArgument, UnsupportedOption
from ...base.types import AdapterInfo
from ...core.plan import StepPlan
from ..fusion.adapted import AdaptedLayer
from ..fusion.linear import FusedConv1D, FusedLinear
from ..fusion.merged import MergedLinear
from ..peft import BY_TOKEN, is_wrapped, tuner_of
from ..spec import language_modules
from ..swap import can_swap, restore, swap
from .loading import check_config, load_folder, require_peft, structure_of
from .overlay import MERGED, Overlay, merged_in, set_in, tuners_of
from .sites import ForwardRows, RecordedRows, Sites
from .targets import Target, concerns, state_of, targets_of

AS_IT_IS, BASE = 0, "__base__"  # a request without an adapter; PEFT's name for the model without any
_numbers = itertools.count(1)


@dataclass(eq=False)
class Loaded:
    """One adapter.

    Attributes:
        number: what requests know it by; nothing else ever has it.
        slot: where kernels find it; -1 if it has no terms.
        targets: the layers it changes, as far as kernels can.
        reason: why it runs on PEFT's modules; None if it does not.
        overlay: those modules; None where they are in the model itself, under `inside`.
        copied: makes the overlay anew, where it shares the weights of a model of the caller's.
        unrecordable: why a step with it is not recorded as a CUDA graph, though it runs on its terms; None if it is.
        watched: PEFT's modules whose weights for `watched_as` are the caller's, and may change.
    """

    name: str
    kind: str
    source: str
    rank: int | None
    targets: list[Target]
    reason: str | None
    overlay: Overlay | None = None
    inside: str | None = None
    copied: Callable[[], Overlay] | None = None
    watched: list[nn.Module] = field(default_factory=list)
    watched_as: str = ""
    slot: int = -1
    unrecordable: str | None = None
    number: int = field(default_factory=lambda: next(_numbers))
    terms: list[Terms] = field(default_factory=list)
    seen: list[tuple] = field(default_factory=list)

    def look(self) -> list[tuple]:
        """What it does now, as far as that can change."""
        return [state_of(module, self.watched_as) for module in self.watched]

    @cached_property
    def info(self) -> AdapterInfo:
        """Asked for once it is in the bank for good."""
        saved = (tensor for target in self.targets if target.saved is not None for tensor in target.saved.parameters())
        num_bytes = sum(terms.num_bytes for terms in self.terms) + sum(tensor.nbytes for tensor in saved)
        num_bytes += 0 if self.overlay is None or self.watched else self.overlay.num_bytes
        return AdapterInfo(self.name, self.kind, self.source, self.rank, num_bytes, self.reason)


class AdapterBank:
    """Implements `runtime.adapters.Adapters` for a patched model.

    Args:
        backend: whose kernels run the fused parts of the model.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device, backend: str):
        self._model, self._device = model, device
        self._backend = backend if backend == "triton" else ops.resolve_backend("auto", device)
        self._dtype = terms_dtype(dtype, device, self._backend)
        self._sites = Sites(model, self._dtype, device)
        self._loaded: dict[str, Loaded] = {}
        self._by_number: dict[int, Loaded] = {}
        self._swapped: list[nn.Module] = []
        self._tuners: list[nn.Module] = []
        self._recorded: dict[tuple[int, int], RecordedRows] = {}  # by the generation of the sites, and a step's size
        self._base = Loaded(BASE, "", "", None, [], None)
        self._by_number[self._base.number] = self._base

    # -- what there is

    @property
    def infos(self) -> dict[str, AdapterInfo]:
        return {loaded.name: loaded.info for loaded in list(self._loaded.values())}

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.infos.values())

    def number(self, name: str | None) -> int:
        """What a request that names this adapter is told it by. Raises InvalidArgument for one that is not loaded."""
        if name is None:
            return AS_IT_IS
        if not isinstance(name, str):
            raise InvalidArgument(f"adapter must be the name of a loaded adapter, got {type(name).__name__}")
        if merged := merged_in(self._tuners):
            raise UnsupportedOption(MERGED.format(", ".join(merged)))
        if name == BASE:
            return self._base.number if self._tuners else AS_IT_IS
        if name not in self._loaded:
            there = ", ".join(map(repr, self._loaded)) or "none"
            raise InvalidArgument(f"adapter {name!r} is not loaded; there is {there}")
        return self._loaded[name].number

    def is_loaded(self, number: int) -> bool:
        return number == AS_IT_IS or number in self._by_number

    def changes_images(self, number: int) -> bool:
        """See `runtime.adapters.Adapters`."""
        if number == AS_IT_IS:
            return False
        loaded = self._by_number[number]
        if self._tuners or loaded.reason is not None:
            return True  # encoders run on the model's own modules, with whatever is on them
        inside = language_modules(self._model)
        return any(target.layer not in inside for target in loaded.targets)

    def look(self, modules: list[nn.Module]) -> None:
        """The model's modules are these now."""
        self._tuners = tuners_of(modules)

    def inside(self, name: str, config: EngineConfig, take) -> str:
        """The name in the bank of what PEFT calls `name` in the model itself, loaded if it was not: for `adapter_names`.

        Args:
            take: `PagedModel.take_adapter`.
        """
        if name == BASE:
            return BASE
        known = f"{name} of the model"
        loaded = self._loaded.get(known)
        if loaded is None or not set(map(id, loaded.watched)) <= set(map(id, self._tuners)) or not loaded.watched:
            if loaded is not None:
                self.remove(known)
            take(self._from_model(known, InModel(self._model), name, None), config)
        return known

    # -- loading

    def read(self, name: str, source, adapter_name: str | None, max_rank: int | None) -> Loaded:
        """An adapter, not yet in the bank. Takes a while, and may run beside steps."""
        if not isinstance(name, str) or not name or name == BASE:
            raise InvalidArgument(f"name must be a name for the adapter, other than {BASE!r}; got {name!r}")
        if is_wrapped(source):
            return self._from_model(name, source, adapter_name or _only_adapter(source), max_rank)
        if adapter_name is not None:
            raise InvalidArgument("adapter_name is for adapters of a PeftModel")
        if not isinstance(source, (str, Path)):
            raise InvalidArgument(f"source must be a folder or a PeftModel, got {type(source).__name__}")
        wrapped, before = load_folder(self._model, Path(source), name, max_rank)
        loaded = self._describe(name, wrapped, name, str(source), before)
        loaded.overlay = Overlay(wrapped.get_base_model(), name, self._model, _with_biases(loaded))
        return loaded

    def _from_model(self, name: str, wrapped, adapter: str, max_rank: int | None) -> Loaded:
        require_peft()
        if adapter not in wrapped.peft_config:
            there = ", ".join(map(repr, wrapped.peft_config))
            raise InvalidArgument(f"adapter_name {adapter!r} is not in that PeftModel; there is {there}")
        check_config(wrapped.peft_config[adapter], name, max_rank)
        base = wrapped.get_base_model()
        loaded = self._describe(name, wrapped, adapter, f"{adapter!r} of a PeftModel", None)
        loaded.watched = [module for module in base.modules() if concerns(module, adapter)]
        loaded.watched_as = adapter
        if base is self._model:
            loaded.inside = adapter
        else:
            loaded.copied = partial(self._copied, loaded, base, adapter)
            loaded.overlay = loaded.copied()
        return loaded

    def _copied(self, loaded: Loaded, base: nn.Module, adapter: str) -> Overlay:
        """PEFT's modules of an adapter in a model of the caller's, which is left alone: copies that share its weights."""
        copied = structure_of(base, plain=False).eval()
        for module in tuners_of(list(copied.modules())):
            module._active_adapter, module._disable_adapters = [adapter], False
        return Overlay(copied, adapter, self._model, _with_biases(loaded))

    def _describe(self, name: str, wrapped, adapter: str, source: str, before: dict | None) -> Loaded:
        config = wrapped.peft_config[adapter]
        kind = getattr(config.peft_type, "value", config.peft_type)
        targets, reason = targets_of(wrapped, adapter, self._model, before)
        for module in wrapped.get_base_model().modules():
            tuner = tuner_of(module)
            if tuner is not None and tuner not in BY_TOKEN:
                raise UnsupportedOption(
                    f"adapter {name!r}: PEFT's {tuner} has not been proven to treat every token by itself"
                )
        if reason is not None and any(target.bias is not None for target in targets):
            raise UnsupportedOption(f"adapter {name!r}: its own biases cannot be had, because {reason}")
        for target in targets:
            reason = reason or _why_not_reached(target)
        rank = max([config.r, *config.rank_pattern.values()]) if kind == "LORA" else None
        return Loaded(name, kind, source, rank, targets, reason)

    def put(self, loaded: Loaded) -> None:
        """Take an adapter in. Between steps only."""
        if loaded.name in self._loaded:
            raise InvalidArgument(f"adapter {loaded.name!r} is loaded already; unload it first")
        self._loaded[loaded.name] = self._by_number[loaded.number] = loaded
        if loaded.reason is None:
            taken = {other.slot for other in self._loaded.values()}
            loaded.slot = next(slot for slot in itertools.count() if slot not in taken)
            for target in loaded.targets:
                self._reach(target.layer)
            loaded.terms = self._sites.put(loaded.slot, loaded.targets)
        loaded.seen = loaded.look()

    def move_aside(self, loaded: Loaded, reason: str) -> None:
        """Let an adapter in the bank run on PEFT's modules from now on."""
        self._drop_terms(loaded)
        loaded.reason = reason

    def settle(self, loaded: Loaded) -> None:
        """It is in the bank for good: what it was checked with is not needed any more."""
        if loaded.reason is None:
            loaded.overlay = None
            if not loaded.watched:  # what nobody changes is in the terms, once
                for target in loaded.targets:
                    target.module = target.module if target.follows else None

    def remove(self, name: str) -> None:
        loaded = self._loaded.pop(name)
        del self._by_number[loaded.number]
        self._drop_terms(loaded)

    def _drop_terms(self, loaded: Loaded) -> None:
        if loaded.slot >= 0:
            self._sites.remove(loaded.slot)
        loaded.slot, loaded.terms = -1, []
        for layer in [layer for layer in self._swapped if self._sites.of(layer) is None]:
            restore(layer)
            self._swapped.remove(layer)

    def close(self) -> None:
        for name in list(self._loaded):
            self.remove(name)
        self._recorded.clear()

    def _reach(self, layer: nn.Module) -> None:
        """Let a layer that runs its own code ask for what adapters make of it."""
        if not isinstance(layer, (AdaptedLayer, FusedLinear, FusedConv1D, MergedLinear)):
            swap(layer, AdaptedLayer, None)
            self._swapped.append(layer)

    @contextmanager
    def noting(self):
        """While inside, it is noted which layers ask for what adapters make of them; see `uncalled`."""
        self._sites.called, self._sites.by_host = set(), set()
        try:
            yield
        finally:
            self._sites.called = None

    def uncalled(self, loaded: Loaded) -> list[str]:
        """Layers of an adapter's terms that did not ask."""
        if loaded.reason is not None:
            return []
        return [target.name for target in loaded.targets if not self._sites.was_called(target.layer)]

    def note_unrecordable(self, loaded: Loaded) -> None:
        """Look at how the layers of an adapter's terms asked."""
        names = [target.name for target in loaded.targets if self._sites.needs_host(target.layer)]
        if names:
            loaded.unrecordable = f"what it makes of {names[0]} is not computed by a kernel that finds the rows itself"

    # -- changes

    def changed(self) -> bool:
        """Whether weights of the caller's changed since the last look; they are taken over."""
        changed = False
        for loaded in self._loaded.values():
            if loaded.watched and (now := loaded.look()) != loaded.seen:
                moved = list(map(_places, now)) != list(map(_places, loaded.seen))
                loaded.seen, changed = now, True
                self._renew(loaded)
                if moved and loaded.slot < 0 and loaded.copied is not None:
                    loaded.overlay = loaded.copied()
        return changed

    def weights_changed(self) -> None:
        """The model's own weights changed: what depends on them is computed again."""
        for loaded in self._loaded.values():
            if any(target.follows for target in loaded.targets):
                self._renew(loaded)

    def _renew(self, loaded: Loaded) -> None:
        if loaded.slot < 0:
            return
        try:
            fresh = [target.terms(self._dtype, self._device) for target in loaded.targets if target.saved is None]
        except KeyError:  # its owner has deleted it: what it was stays, until it is unloaded
            loaded.watched = []
            return
        pairs = [pair for terms in zip(loaded.terms, fresh) for pair in zip(*(part.tensors() for part in terms))]
        if all(old.shape == new.shape for old, new in pairs):
            for old, new in pairs:  # where kernels, and recordings of them, look for it
                old.copy_(new)
        else:
            loaded.terms = self._sites.put(loaded.slot, loaded.targets)

    # -- forwards

    def group(self, adapter: int) -> object:
        if adapter == AS_IT_IS:
            return AS_IT_IS if self._tuners else None
        loaded = self._by_number[adapter]
        return None if loaded.reason is None else loaded.number

    def for_forward(self, plan: StepPlan) -> ForwardRows | None:
        if not plan.adapters or self.group(plan.adapters[0]) is not None:
            return None
        slots = [-1 if adapter == AS_IT_IS else self._by_number[adapter].slot for adapter in plan.adapters]
        return ForwardRows(self._sites, np.repeat(slots, plan.num_new), self._device, self._backend)

    @property
    def generation(self) -> int:
        return self._sites.generation

    @property
    def unrecordable(self) -> dict[str, str]:
        """By name, those that run beside others and yet in no CUDA graph, and why."""
        reasons = {name: loaded.unrecordable for name, loaded in self._loaded.items() if loaded.reason is None}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def why_unrecordable(self, plan: StepPlan) -> str | None:
        if self._tuners:
            return "PEFT's modules are in the model"
        numbers = {adapter for adapter in plan.adapters if adapter != AS_IT_IS}
        reasons = (self._by_number[number].reason or self._by_number[number].unrecordable for number in numbers)
        return next(filter(None, reasons), None)

    def for_recorded(self, plan: StepPlan, rows: AbstractSequence[int], size: int) -> RecordedRows:
        key = self.generation, size
        if key not in self._recorded:
            self._recorded = {old: made for old, made in self._recorded.items() if old[0] == self.generation}
            count = sum(loaded.slot >= 0 for loaded in self._loaded.values())
            self._recorded[key] = RecordedRows(self._sites, size, count, self._device, self._backend)
        slots = [-1 if adapter == AS_IT_IS else self._by_number[adapter].slot for adapter in plan.adapters]
        self._recorded[key].fill(np.asarray(slots), rows)
        return self._recorded[key]

    @contextmanager
    def running(self, plan: StepPlan):
        """The model as a forward of `plan` needs it."""
        group = self.group(plan.adapters[0]) if plan.adapters else AS_IT_IS
        if group == AS_IT_IS:
            yield
            return
        loaded = None if group is None else self._by_number[group]
        inside = None if loaded is None else loaded.inside
        over = nullcontext() if loaded is None or loaded.overlay is None else loaded.overlay.over(self._model)
        with set_in(self._tuners, inside), over:
            yield


def _places(state: tuple) -> tuple:
    """What of a `state_of` is not values in place, which copies share."""
    return state[0], *((parameter, address) for parameter, address, _ in state[1:])


def _with_biases(loaded: Loaded) -> set[str]:
    return {target.name for target in loaded.targets if target.bias is not None}


def _why_not_reached(target: Target) -> str | None:
    """Why no kernel can add to what a layer returns."""
    known = isinstance(target.layer, (AdaptedLayer, FusedLinear, FusedConv1D, MergedLinear)) or can_swap(target.layer)
    return None if known else f"{target.name} runs code of its own"


class InModel:
    """A model with PEFT's modules in it, as far as a PeftModel is asked about its adapters."""

    def __init__(self, model: nn.Module):
        self._model = model
        self.peft_config = model.peft_config

    def get_base_model(self) -> nn.Module:
        return self._model


def _only_adapter(wrapped) -> str:
    names = list(wrapped.peft_config)
    if len(names) > 1:
        listed = ", ".join(map(repr, names))
        raise InvalidArgument(f"adapter_name must say which adapter of the PeftModel it is: {listed}")
    return names[0]
