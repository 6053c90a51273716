"""A transformers model as the engine's PagedModel: probe, forward of a packed batch, watch on the weights."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from contextlib import contextmanager, nullcontext

import torch

from hf_paged_kernels.exactness import exact

from ..base.config import EngineConfig
from ..base.errors import InvalidArgument, KernelUnavailable, UnsupportedModel, UnsupportedOption
from ..base.types import AdapterInfo
from ..parallel.team import Team
from ..runtime.batch import StepContext, activate
from .adapters import Adaptations
from .attention import attention_configs, paged_attention, paged_masks
from .checkpointing import checkpointed_modules, recomputed_on_pages
from .fingerprint import begin_fingerprint
from .fusion import Fusions
from .fusion.experts import eager_experts, paged_experts
from .fusion.sharded import SplitHead
from .fusion.linear import linear_layers, newcomers
from .fusion.torch_ops import TorchOps
from .heads import head_of, keeping_hidden
from .peft import obstacles
from .peft_bank.bank import AdapterBank, Loaded
from .peft_bank.check import check_apart, why_not_together
from .selfcheck import Observed
from .sentences import sentence_notes
from .sequence_hooks import sequence_hooks
from .spec import language_modules, model_lengths, probe_layers, text_config, vocab_size
from .swap import evaluating
from .vision.deepstack import deepened
from .vision.model import images_of
from .watch import Snapshot, without_hooks
from .weights import float_parameter


class TransformersModel:
    """Implements `runtime.runner.PagedModel` for a decoder-only transformers model. Reads the live weights."""

    def __init__(
        self,
        model: torch.nn.Module,
        fusions: Fusions,
        adaptations: Adaptations,
        observed: Observed,
        team: Team | None = None,
    ):
        self.module = model
        self.team = team
        self.split_head: SplitHead | None = None  # of a sharded model, once `winners` is known to be right
        self._body, self.hidden_size = observed.body, observed.hidden_size
        self.sentences = sentence_notes(model.config)
        self.pooling = self.sentences.pooling
        self.name = type(model).__name__
        self._head = head_of(model)
        self.generates, self.labels, self.activation = self._head.generates, self._head.labels, self._head.activation
        self.fusions = fusions
        self.adaptations = adaptations
        self.num_layers = text_config(model).num_hidden_layers
        self.layers, self.states, table = probe_layers(model, adaptations, observed.visibility, fusions.backend)
        self.max_model_len, self.length_limit, self.length_note = model_lengths(
            model, table or adaptations.max_positions
        )
        parameter = float_parameter(model)
        self.device, self.dtype = parameter.device, parameter.dtype
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._configs = attention_configs(model)
        self.generation = 0
        self.media = images_of(model) if team is None else None
        self.adapters = AdapterBank(model, self.dtype, self.device, fusions.backend)
        self._linear = linear_layers(model)
        self.torch_ops = TorchOps(fusions.backend)
        self.runs_under_torch_ops = fusions.exact  # until it is known which modules must
        self._seen: Snapshot | None = None
        self._look()

    @property
    def vocab_size(self) -> int:
        return vocab_size(self.module)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """What ends a request by default: the model's generation config, as in stock `generate`."""
        eos = self.module.generation_config.eos_token_id if self.generates else None
        return frozenset(() if eos is None else [eos] if isinstance(eos, int) else eos)

    def forward(self, context: StepContext, rows: torch.Tensor) -> torch.Tensor:
        if self.generates:
            return self.outputs(context, rows).logits[0]
        context.needs_hidden = True
        if context.adapters is not None:
            context.adapters.take_logit_rows(rows)
        with self._running(context):
            self._body(position_ids=_told(context), use_cache=False, **self._inputs(context))
            states = context.hidden[rows]
            return states if self._head.classifier is None else self.module.score(states)

    def classified(self, token_ids: list[int]) -> list[int]:
        """Stock passes over padding, and takes what the tokenizer puts at the end for it where both are the same token."""
        end = len(token_ids)
        while end > 1 and token_ids[end - 1] == self._head.ignored:
            end -= 1
        return token_ids[:end]

    def outputs(self, context: StepContext, rows: torch.Tensor, **options):
        """The model's own output for a packed batch, its logits [1, R, V] those of the packed rows `rows` [R].

        `options` go to the model's forward; `inputs_embeds` [1, T, H] takes the place of the token ids.
        """
        if context.announce is not None:
            self._check_obstacle()  # from here on nothing may fail on this rank alone
            context.announce(context, rows, options.get("inputs_embeds"))
        context.logit_rows = rows if self._keeps_logits else None
        if context.adapters is not None:
            context.adapters.take_logit_rows(context.logit_rows)
        if self._keeps_logits:
            options["logits_to_keep"] = rows
        with self._running(context):
            if "inputs_embeds" not in options:
                options |= self._inputs(context)
            output = self.module(position_ids=_told(context), use_cache=False, **options)
        if not self._keeps_logits:
            output.logits = output.logits[:, rows]
        return output

    def _inputs(self, context: StepContext) -> dict[str, torch.Tensor]:
        """The tokens of a batch; with the images in it, their embeddings, as the model's own forward puts them together."""
        if not context.embeddings:
            return {"input_ids": context.input_ids}
        embeds = self.module.get_input_embeddings()(context.input_ids)
        for first, rows in context.embeddings:
            embeds[0, first : first + len(rows)] = rows[:, : embeds.shape[-1]]
        return {"inputs_embeds": embeds}

    @contextmanager
    def _running(self, context: StepContext):
        """Scope in which calls of the model's modules are one forward of the packed batch of `context`."""
        self._check_obstacle()
        layers = checkpointed_modules(self._seen.modules) if torch.is_grad_enabled() else []
        with (
            self.adapters.running(context.plan),
            self._on_pages(context, self.module, self._seen.modules),
            paged_masks(),
            sequence_hooks(self.module, context),
            keeping_hidden(self._body, context),
            deepened(self.module, context),
            recomputed_on_pages(layers, context, self._on_pages),
        ):
            yield

    @contextmanager
    def _on_pages(self, context: StepContext, module: torch.nn.Module, modules: list[torch.nn.Module] | None = None):
        """Scope in which calls of `module` and its `modules` run our kernels, on the pages of `context`."""
        with (
            exact(self.fusions.exact),
            self.torch_ops if self._under_torch_ops else nullcontext(),
            evaluating(module, modules),
            paged_attention(self._configs),
            paged_experts(self.fusions.expert_configs),
            eager_experts(self.fusions.eager_configs),
            activate(context),
        ):
            yield

    def _check_obstacle(self) -> None:
        if self._obstacle is not None:
            name, reason = self._obstacle
            raise UnsupportedOption(f"{name} cannot be used while the model runs on pages: {reason}")

    def take_adapter(self, loaded: Loaded, config: EngineConfig) -> AdapterInfo:
        """See `PagedModel`."""
        bank = self.adapters
        bank.put(loaded)
        try:
            with self.unobserved():
                if loaded.reason is None and (reason := why_not_together(self, loaded, config)):
                    bank.move_aside(loaded, reason)
                if loaded.reason is not None:
                    check_apart(self, loaded, config)
        except Exception as error:
            bank.remove(loaded.name)
            raise InvalidArgument(f"adapter {loaded.name!r} does not run on this model: {error}") from error
        if loaded.reason is not None and config.strict:
            bank.remove(loaded.name)
            raise KernelUnavailable(f"strict: adapter {loaded.name!r} takes a slower path: {loaded.reason}")
        bank.settle(loaded)
        return loaded.info

    @property
    def finds_winners(self) -> bool:
        return self.split_head is not None

    def winners(self, context: StepContext, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.winners_of(self.part(context, rows))

    def part(self, context: StepContext, rows: torch.Tensor) -> torch.Tensor:
        context.local_logits = self.split_head is not None
        return self.forward(context, rows)

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        return part if self.split_head is None else self.split_head.gather(part)

    def winners_of(self, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.split_head.winners(part)

    def weights_changed(self) -> bool:
        """In-place writes, swapped parameters and modules, moved storage, adapters switched, hooks that came or went.

        About 0.1 ms for 300 tensors in 400 modules.
        """
        if self._seen.holds():
            return self.adapters.changed()
        self._look()
        self.adapters.weights_changed()
        self.adapters.changed()
        return True

    def weights_replaced(self) -> bool:
        """Also writes through `.data`: compares a few values of every parameter."""
        before = self._seen
        held = before.holds()
        self._look()
        replaced = not held or not before.equals(self._seen)
        if replaced:
            self.adapters.weights_changed()
        return self.adapters.changed() or replaced

    def fingerprint(self) -> str:
        return self.begin_fingerprint()()

    def begin_fingerprint(self) -> Callable[[], str]:
        return begin_fingerprint(self.module)

    @property
    def hooked(self) -> list[int]:
        return self._seen.hooked

    def unobserved(self):
        return without_hooks(self.module)

    def check_module(self, name: str) -> None:
        """Raise InvalidArgument, with the likely names, unless `name` is a module that has a forward of its own."""
        modules = dict(self.module.named_modules())
        del modules[""]
        if name not in modules:
            near = difflib.get_close_matches(str(name), modules, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise InvalidArgument(f"forward_hooks: the model has no module {name!r}{hint}")
        if type(modules[name]).forward is torch.nn.Module.forward:
            raise InvalidArgument(
                f"forward_hooks: {name!r} is a {type(modules[name]).__name__}, which is never called; name its parts"
            )
        module = modules[name]
        around = self.media is None or self.module.get_decoder() in set(module.modules())
        if not around and module not in language_modules(self.module):
            raise InvalidArgument(
                f"forward_hooks: {name!r} sees images, which are encoded apart from the requests; hook the module itself"
            )

    def _why_unrecordable(self) -> str | None:
        if self._obstacle is not None:  # a forward says so before any rank has begun
            return self._obstacle[1]
        if self._seen.hooked:
            return "forward hooks on the model are to be called in every step"
        if replaced := self._seen.replaced_forwards():
            return f"the forward of a {replaced[0]} was replaced, and is to be called in every step"
        if not self.generates:
            return "it generates no tokens"
        return "its layers keep a state" if self.states else None

    def _look(self) -> None:
        self.fusions.rejoin()
        before, self._seen = self._seen, Snapshot(self.module)
        self.generation += before is None or not before.same_places(self._seen)
        self.adapters.look(self._seen.modules)
        self._obstacle = next(obstacles(self.module), None)
        own_code = self._seen.hooked or self._seen.replaced_forwards() or self.fusions.stepping_aside()
        self._under_torch_ops = self.runs_under_torch_ops or self.fusions.exact and bool(own_code)
        if self.fusions.exact and any(newcomers(self._seen.modules, self._linear)):
            self._obstacle = "exact", "linear layers came after it was patched; patch it again"
        if self.team is not None and any(hasattr(module, "base_layer") for module in self._seen.modules):
            self._obstacle = "a PEFT adapter", "the model is sharded"
        self.why_unrecordable = self._why_unrecordable()
        device = self._seen.device
        if getattr(self, "device", device) != device:
            raise UnsupportedModel(
                f"model moved from {self.device} to {device} while patched; unpatch it, move it, patch it again"
            )


def _told(context: StepContext) -> torch.Tensor:
    """The positions that the model is given."""
    return context.position_ids if context.rope_positions is None else context.rope_positions
