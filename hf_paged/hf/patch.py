"""patch, unpatch and explain: a transformers model in and out of hf_paged's hands."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch

from ..base.config import EngineConfig
from ..base.errors import (
    InvalidArgument,
    KernelUnavailable,
    UnsupportedModel,
    UnsupportedOption,
    VerificationFailed,
)
from ..engine.build import check_config
from ..parallel.team import Team
from ..runtime.runner import as_in_a_step
from .adapters import adapt
from .draft import check_draft, draft_config
from .exact_check import check_exact
from .explain import Explanation, explain_patch
from .fusion import Fusions, fuse, fuse_layers, shard, voting
from .generation import PagedMixin
from .heads import head_of
from .model import TransformersModel
from .peft import base_model
from .quantize.spot import quantize_on_the_spot
from .selfcheck import check_forward, observe
from .spec import check_supported
from .swap import ATTRIBUTE, Swapped, evaluating, restore, swap
from .team import SharedCalls, find_team
from .verify import Verification
from .watch import without_hooks
from .weights import is_spread

if TYPE_CHECKING:
    from .engine import Engine

T = TypeVar("T")


class Patch:
    """Everything hf_paged did to one model. Lives on the model as `model._hf_paged`."""

    def __init__(
        self,
        model: torch.nn.Module,
        config: EngineConfig,
        tokenizer,
        draft_model: torch.nn.Module | None,
        team: Team | None,
    ):
        self.config = config
        self.team = team
        self.tokenizer = tokenizer
        self.draft_model = draft_model
        self.fusions = Fusions()
        self.adaptations = adapt(model)
        try:
            if config.fuse:
                with evaluating(model), without_hooks(model):
                    self.fusions = fuse(model, config.attention_backend, team, exact=config.exact)
            else:
                self.fusions = Fusions() if team is None else shard(model, team)
                self.fusions.notes["kernels"] = "EngineConfig(fuse=False)"
        except BaseException:
            self.adaptations.undo()
            raise
        self.adapter: TransformersModel | None = None
        self.calls_of_all: SharedCalls | None = None  # `generate` of a sharded model
        self.largest_difference: float | None = None  # that `verify` found
        self.launches: list[str] | None = None  # kernels of a layer that decodes, where they are Triton's
        self.exact = False  # once the model's own forwards were looked at
        self.second_forward: str | None = None  # why an exact forward needs one for its gradient
        self.scatter: float | None = None  # of the model's own logits, where its layers round activations to 8 bits
        self.calls: dict[str, str] = {}  # options of calls so far that took a slower path, and why
        self._engine = None
        self._lock = threading.Lock()

    def bind(self, model: torch.nn.Module, *, check: bool) -> None:
        """Look at the model; with `check`, compare packed forwards with the model's own."""
        with without_hooks(model):
            observed = observe(model, self.adaptations)
            self.adapter = TransformersModel(model, self.fusions, self.adaptations, observed, self.team)
            check_config(self.adapter, self.config)
            if self.config.fuse:
                with voting(self.team and self.team.unanimous):
                    fuse_layers(model, self.fusions, self.adapter.length_limit)
            if check:
                self.launches, self.scatter = check_forward(self.adapter, observed, self.config)
        if self.config.exact:
            with without_hooks(model):
                self.second_forward = check_exact(self.adapter, observed, self.config)
            self.exact = True
        self.adapter.weights_replaced()  # with its hooks
        if self.team is not None:
            self.calls_of_all = SharedCalls(self.adapter, self.team)

    @property
    def live_engine(self):
        return None if self._engine is None or getattr(self._engine, "closed", False) else self._engine

    @property
    def config_in_use(self) -> EngineConfig:
        return self.config if self.live_engine is None else self.live_engine.config

    def engine(self):
        """The model's one engine, made on first use."""
        from .engine import Engine  # Engine patches models, so it stands above this module

        self.check_leads()
        with self._lock:
            if self.live_engine is None:
                self._engine = Engine._for_patch(self)
            return self._engine

    def check_leads(self) -> None:
        """Raise InvalidArgument where an engine of a sharded model cannot be: on other ranks than 0."""
        if self.calls_of_all is not None:
            self.calls_of_all.check_leads()

    def note_fallback(self, option: str, reason: str) -> None:
        """A call takes a slower path: `explain` tells from now on, a warning once. Raises KernelUnavailable if strict."""
        if self.team is not None:
            raise UnsupportedOption(f"{option} is not supported on a sharded model: {reason}")
        if self.config_in_use.strict:
            raise KernelUnavailable(f"strict: {option} takes a slower path: {reason}")
        if option not in self.calls:
            self.calls[option] = reason
            warnings.warn(f"{option}: runs on transformers' own path, not on pages: {reason}", stacklevel=5)

    def renew(self, model: torch.nn.Module) -> None:
        """Patch the model again as it is now; its engine is closed."""
        patch(model, self.config, tokenizer=self.tokenizer, draft_model=self.draft_model)

    def adopt(self, engine) -> None:
        self.check_leads()
        with self._lock:
            if self.live_engine is not None:
                raise InvalidArgument(
                    "model already has an engine; use hf_paged.engine_of(model), or close that one first"
                )
            self._engine = engine

    def forget(self, engine) -> None:
        with self._lock:
            if self._engine is engine:
                self._engine = None


def patch(
    model: torch.nn.Module,
    config: EngineConfig | None = None,
    *,
    tokenizer=None,
    draft_model: torch.nn.Module | None = None,
    verify: bool = False,
    quantization: str | None = None,
    **overrides,
):
    """Make `model.generate` run through a paged, continuously batching engine. Returns the same object.

    The weights stay the model's own and live; forward, training, hooks, copies and saved files are as before.
    `unpatch` takes everything back. Patching a patched model again replaces its configuration and closes its engine.

    Args:
        model: a loaded decoder-only transformers model on one device, or a PeftModel around one, whose base model is
            then patched. (Adapters may also come later: `get_peft_model` and `load_adapter` take a patched model.) One
            without a language model's head, with one for sequence classification or none, embeds and classifies only.
        config: an EngineConfig; `overrides` are its fields by name.
        tokenizer: used for stop strings and text by the model's engine (for images, the processor); `generate` itself needs none.
        draft_model: a smaller model with the same vocabulary, to guess tokens ahead (`EngineConfig.speculation`). It is
            patched while the engine lives and gets a KV cache of its own, within the same limits.
        verify: run the model before and after patching, on two short sequences in chunks and four decode steps, and
            compare the outputs of its layers and its logits. Sliding windows beyond 512 tokens are not reached.
        quantization: "int4" (groups of up to 128 input features share a scale), "int8" or "fp8" (rows do; inputs of fp8
            layers are rounded, too, on GPUs): round the weights of the linear layers, but not the head's or routers', to
            nearest, and let go of them. This is for good: `unpatch` leaves the layers quantized, and `save_pretrained`
            writes a GPTQ checkpoint, of fp8 one of compressed-tensors. `verify` compares with the quantized model.

    Raises:
        UnsupportedModel: this model's own tokens cannot be promised, or `draft_model` cannot run; the message says why.
        InvalidArgument: an option is unknown or wrong; or the model cannot be quantized because it is so already, has
            adapters or is in training mode.
        VerificationFailed: what `verify` compared differs. The model is left unpatched.
    """
    if config is not None and not isinstance(config, EngineConfig):
        raise InvalidArgument(f"config must be an EngineConfig, got {type(config).__name__}")
    config = draft_config((config or EngineConfig()).replace(**overrides), draft_model)
    _patch(base_model(model), config, tokenizer, base_model(draft_model), verify, quantization)
    return model


def _patch(
    model: torch.nn.Module, config: EngineConfig, tokenizer, draft_model, verify: bool, quantization: str | None
) -> None:
    if is_patched(model):
        tokenizer = tokenizer or patch_of(model).tokenizer
        unpatch(model)
    check_supported(model)
    if not head_of(model).generates:
        for option, given in (("draft_model", draft_model), ("verify", verify or None)):
            if given is not None:
                raise UnsupportedOption(f"{option}: {type(model).__name__} does not generate")
    if draft_model is not None:
        check_draft(model, draft_model)
    team = find_team(model, config.parallel_timeout)
    if team is not None:
        _check_options(config, draft_model, quantization)
    if quantization is not None:
        quantize_on_the_spot(model, quantization)
    with as_in_a_step(next(model.parameters()).device), _together(team):
        if team is not None:
            told = config.fuse, config.attention_backend, config.strict, bool(verify)
            team.check_alike("what hf_paged.patch was told (fuse, attention_backend, strict, verify)", repr(told))
        verification = Verification(model) if verify else None
        undo = Patch(model, config, tokenizer, draft_model, team)
        swap(model, PagedMixin if hasattr(model, "generate") else Swapped, undo)
        try:
            undo.bind(model, check=not verify)
            if verification is not None:
                undo.largest_difference = verification.check(undo.adapter, config)
            if config.strict:
                explain(model).raise_on_fallback()
        except BaseException:
            _restore(model, undo)
            raise


def _check_options(config: EngineConfig, draft_model, quantization: str | None) -> None:
    """Raise UnsupportedOption for what a sharded model cannot have."""
    if quantization is not None:
        raise UnsupportedOption(f"quantization={quantization!r}: the weights of a sharded model are not rounded on the spot")
    if draft_model is not None and is_spread(draft_model):
        raise UnsupportedOption("draft_model: beside a sharded model it must not be sharded itself")


@contextmanager
def _together(team: Team | None):
    """While a sharded model is patched, on all its ranks. What all of them refuse leaves none waiting."""
    if team is None:
        yield
        return
    try:
        with team.engaged():
            yield
    except (InvalidArgument, KernelUnavailable, UnsupportedModel, VerificationFailed):
        team.close()
        raise
    except BaseException as error:
        raise team.broken("patch", error) from error


def unpatch(model: torch.nn.Module):
    """Close the model's engine, free its memory and restore the model as it was. Returns the model."""
    undo = patch_of(model)
    engine = undo.live_engine
    if engine is not None:
        engine.close()
    if undo.calls_of_all is not None:
        undo.calls_of_all.stop()
    _restore(base_model(model), undo)
    return model


def follow(model) -> None:
    """On every rank but 0 of a sharded, patched model: take part in what rank 0 does, until it unpatches the model.

        hf_paged.patch(model)                  # on all ranks
        if torch.distributed.get_rank():
            hf_paged.follow(model)
        else:
            ...                                # an Engine, a pipeline, a server, model.generate

    Not needed where all ranks call `model.generate` alike.

    Raises:
        InvalidArgument: the model is not sharded, or this is rank 0.
        ParallelError: a rank died, hung or failed.
    """
    undo = patch_of(model)
    if undo.calls_of_all is None:
        raise InvalidArgument("model: it is not sharded, so there is no rank to follow")
    undo.calls_of_all.follow()


def led(model, work: Callable[[Engine], T]) -> T:
    """`work(engine)` with the engine of a patched model. Of a sharded one all ranks call this at the same time.

    Rank 0 does the work while the others take part in what its engine runs. All get its result, or its exception; what is
    inside is pickled.
    """
    undo = patch_of(model)
    if undo.calls_of_all is None:
        return work(undo.engine())
    return undo.calls_of_all.run(lambda: work(undo.engine()), (), {})


def _restore(model: torch.nn.Module, undo: Patch) -> None:
    undo.fusions.undo()
    undo.adaptations.undo()
    restore(model)


def is_patched(model) -> bool:
    model = base_model(model)
    return isinstance(model, Swapped) and isinstance(model.__dict__.get(ATTRIBUTE), Patch)


def patch_of(model) -> Patch:
    if not is_patched(model):
        raise InvalidArgument(f"model: this {type(model).__name__} is not patched; call hf_paged.patch(model) first")
    return base_model(model).__dict__[ATTRIBUTE]


def engine_of(model):
    """The engine of a patched model, made if there is none yet."""
    return patch_of(model).engine()


def explain(model) -> Explanation:
    """Per layer, which kernels run and why any slower path is taken. `str()` of the result is a table."""
    undo = patch_of(model)
    return explain_patch(undo.adapter.module, undo, undo.config_in_use)

