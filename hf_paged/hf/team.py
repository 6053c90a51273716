"""A model that transformers has sharded over several processes: its ranks, what is refused, and calls that all ranks make."""

from __future__ import annotations

import atexit
import contextlib
import pickle
from collections.abc import Callable

import torch
from transformers.utils import ModelOutput

from ..base.errors import InvalidArgument, ParallelError, UnsupportedModel, UnsupportedOption
from ..engine.follower import Follower
from ..parallel.team import Order, Team, digest
from ..quant.linear import QuantLinear
from .fusion.sharded import WHOLE_EXPERTS, parallel_plan
from .heads import head_of
from .shared_heads import has_shared_heads, num_copies
from .weights import local

OTHER_SIZES = {"fsdp_size": "FSDP", "dp_replicate_size": "FSDP", "pp_size": "pipeline parallelism"}
MODELS = frozenset("llama qwen2 qwen3 qwen3_moe mistral mixtral gemma3_text".split())


def find_team(model: torch.nn.Module, timeout: float) -> Team | None:
    """The ranks that hold the shards of `model`, if it is sharded. All of them call this at the same time.

    Raises UnsupportedModel for a model that is sharded in another way than by plans for tensors and experts.
    """
    parameters = [parameter for parameter in model.parameters() if local(parameter) is not parameter]
    if not parameters:
        if any(isinstance(module, QuantLinear) and module.cut is not None for module in model.modules()):
            raise UnsupportedModel("model: everything that is sharded of it is quantized, the output embedding too")
        return None
    _check_kind(model)
    meshes = [parameter.device_mesh for parameter in parameters if not has_shared_heads(parameter)]
    mesh = meshes[0] if meshes else None
    if mesh is None or mesh.ndim != 1 or any(not torch.equal(other.mesh, mesh.mesh) for other in meshes):
        raise UnsupportedModel("model: it is sharded over more than one device mesh, or one of several dimensions")
    if mesh.size() == 1:
        return None
    _check_heads(model, mesh.size())
    team = Team(mesh.get_group(), local(parameters[0]).device, timeout)
    team.check_alike("the model's configuration", model.config.to_json_string(use_diff=False))
    return team


def _check_kind(model: torch.nn.Module) -> None:
    config = getattr(model.config, "distributed_config", None)
    for field, name in OTHER_SIZES.items():
        if (getattr(config, field, None) or 1) > 1:
            raise UnsupportedModel(f"model: it is sharded by {name} ({field}); only tensor parallelism runs on pages")
    if getattr(model.config, "_experts_implementation", None) == "deepgemm_megamoe":
        raise UnsupportedModel("model: experts_implementation='deepgemm_megamoe' exchanges tokens itself; load it with another")
    if model.config.model_type not in MODELS:
        raise UnsupportedModel(
            f"model: sharded models of type {model.config.model_type!r} have not been proven equal to stock transformers; "
            f"those of {', '.join(sorted(MODELS))} have"
        )
    if not head_of(model).generates:
        raise UnsupportedModel(f"model: {type(model).__name__} is sharded and does not generate; load it on one device")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise UnsupportedModel("model: it is sharded and has PEFT adapters on it")


def _check_heads(model: torch.nn.Module, size: int) -> None:
    if set(parallel_plan(model).values()) <= WHOLE_EXPERTS:  # attention is whole on every rank
        return
    config = model.config.get_text_config(decoder=True)
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or size
    copies = num_copies(kv_heads, size)
    if heads % size or copies is None:
        raise UnsupportedModel(
            f"model: its {heads} heads (config.num_attention_heads) and {kv_heads} key/value heads "
            f"(config.num_key_value_heads) cannot be dealt out to {size} ranks evenly"
        )
    groups = {module.num_key_value_groups for module in model.modules() if hasattr(module, "num_key_value_groups")}
    if copies > 1 and groups != {heads // size}:
        raise UnsupportedModel(
            f"model: its {kv_heads} key/value heads were torn apart, because it was loaded on {size} ranks before hf_paged "
            "was imported; import it first"
        )


class SharedCalls:
    """Calls of `generate` on a sharded model. All ranks may make them, or rank 0 alone while the others `follow`.

    Rank 0 decodes; a rank that made the call, too, does what rank 0 tells it and returns rank 0's result.
    """

    def __init__(self, model, team: Team):
        self._model, self._team = model, team
        self._follower = None if team.leads else Follower(model, team)
        self._depth = 0
        if team.leads:
            atexit.register(self._say_goodbye)

    def check_leads(self) -> None:
        """Raise InvalidArgument on other ranks than 0."""
        if not self._team.leads:
            raise InvalidArgument(
                "model: it is sharded, and its engine is on rank 0; call hf_paged.follow(model) on the other ranks, or "
                "model.generate on all of them"
            )

    def check_free(self) -> None:
        """Raise UnsupportedOption inside `generate`, where other ranks would not make a call of the model that this one makes."""
        if self._depth:
            raise UnsupportedOption(
                "model: it is sharded, and was called by a function that generate calls on rank 0 alone (a processor, a "
                "criterion, a streamer)"
            )

    def follow(self) -> None:
        """Do what rank 0 says until it says no more."""
        if self._follower is None:
            raise InvalidArgument("model: rank 0 does not follow, it leads")
        joined = False  # whether some other rank makes the call that rank 0 makes
        while not self._follower.stopped:
            order, _ = self._follower.until(Order.CALL, Order.RETURN)
            if order is Order.CALL:
                joined = any(made for made, _ in self._team.gather_numbers([0, 0])[1:])
            elif order is Order.RETURN and joined:
                self._team.broadcast_object()  # which goes to all
        self._team.close()

    def stop(self) -> None:
        """The model is unpatched, on all ranks: the others take part in what rank 0 still does before."""
        atexit.unregister(self._say_goodbye)
        if self._team.leads:
            if not self._team.failed:
                self._team.send(Order.STOP)
        elif not self._team.failed:
            self.follow()
        self._team.close()

    def _say_goodbye(self) -> None:
        """Rank 0's program ends: those that follow need not."""
        with contextlib.suppress(Exception):  # nobody follows, and some have ended before
            self._team.send(Order.STOP)

    def run(self, call: Callable[[], object], args: tuple, options: dict):
        """`call()`, a `generate` with these arguments, on rank 0; its result or error on all ranks that make the call."""
        if self._depth:  # made by a call of generate
            return call()
        self._depth += 1
        try:
            return self._lead(call, args, options) if self._team.leads else self._join(args, options)
        finally:
            self._depth -= 1

    def _lead(self, call, args: tuple, options: dict):
        with self._team.talking:
            self._team.send(Order.CALL)
            joined = self._meet(args, options)
        try:
            result = call()
        except ParallelError:
            raise
        except Exception as error:
            self._return(None, error, joined)
            raise
        self._return(result, None, joined)
        return result

    def _return(self, result, error: Exception | None, joined: bool) -> None:
        with self._team.talking:
            self._team.send(Order.RETURN)
            if joined:
                self._team.broadcast_object((_moved(result, torch.device("cpu")), _portable(error)))

    def _join(self, args: tuple, options: dict):
        if options.get("streamer") is not None:
            raise UnsupportedOption("streamer: of a sharded model only rank 0 streams; leave it out on the others")
        order, _ = self._follower.until(Order.CALL)
        if order is Order.STOP:
            raise ParallelError("rank 0 unpatched the model instead of calling generate")
        self._meet(args, options)
        order, _ = self._follower.until(Order.RETURN)
        if order is Order.STOP:
            raise ParallelError("rank 0 unpatched the model before its generate ended")
        result, error = self._team.broadcast_object()
        if error is not None:
            raise error
        return _moved(result, self._model.device)

    def _meet(self, args: tuple, options: dict) -> bool:
        """Whether another rank than 0 made the call, too. Raises InvalidArgument on all ranks if with other arguments."""
        ranks = self._team.gather_numbers([1, _digest(args, options)])
        others = [rank for rank, (joined, found) in enumerate(ranks) if joined and found != ranks[0][1]]
        if others:
            raise InvalidArgument(f"generate: rank {others[0]} called it with other inputs than rank 0")
        return any(joined for joined, _ in ranks[1:])


def _digest(args: tuple, options: dict) -> int:
    """Of the tensors and plain values among a call's arguments."""
    named = [*((str(place), value) for place, value in enumerate(args)), *sorted(options.items())]
    parts = []
    for name, value in named:
        if isinstance(value, torch.Tensor):
            parts.append(f"{name}={tuple(value.shape)}{digest(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())}")
        elif isinstance(value, (int, float, str, bool)):
            parts.append(f"{name}={value!r}")
    return digest(";".join(parts).encode())


def _moved(value, device: torch.device):
    """A result of `generate` with its tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, ModelOutput):
        return type(value)(**{name: _moved(part, device) for name, part in value.items()})
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(part, device) for part in value)
    return value


def _portable(error: Exception | None) -> Exception | None:
    """The error itself if it survives the way to another process, else one that says the same."""
    if error is None:
        return None
    try:
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    except Exception:  # its class cannot be made from its message
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")
