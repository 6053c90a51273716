"""From a model and a configuration to a KV cache and the scheduler that manages its blocks."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch

from hf_paged_kernels import ops

from ..base.config import EngineConfig
from ..base.errors import KernelUnavailable, UnsupportedOption
from ..core.media import EncoderBudget
from ..core.scheduler import GroupSpec, Scheduler
from ..parallel.team import ranks_on_this_machine
from ..runtime.graphs import DecodeGraphs, cuda_capture
from ..runtime.inputs import Inputs, make_inputs
from ..runtime.kv_cache import KVCache
from ..runtime.layout import QUANTIZED, blocks_for_budget, group_layers, kv_dtype_of, slots_for_budget
from ..runtime.media import EncoderOutputs
from ..runtime.memory import CPU_FRACTION, CUDA_FRACTION, CudaMeter, free_memory
from ..runtime.runner import ModelRunner, PagedModel, as_in_a_step
from .draft_model import DraftModel
from .measure import kv_budget
from .offload import HostOffload
from .speculation import MAX_STEP_TOKENS, MAX_STEP_TOKENS_ELSEWHERE, NgramProposer, Speculator

R = TypeVar("R", bound=ModelRunner)
C = TypeVar("C", bound=KVCache)
INITIAL_CPU_BLOCKS = 64  # a thousand tokens to begin with; the pool grows by itself


class Limits(NamedTuple):
    """What the steps of an engine stay within; see `Scheduler`."""

    max_batch_tokens: int
    max_num_seqs: int
    max_model_len: int


def limits_of(scheduler: Scheduler) -> Limits:
    return Limits(scheduler.max_batch_tokens, scheduler.max_num_seqs, scheduler.max_model_len)


def check_config(model: PagedModel, config: EngineConfig) -> None:
    """Raise unless an engine of `config` can run `model`.

    Raises:
        KernelUnavailable: the attention backend cannot run on the model's device, or not with its heads, or not with the
            type asked for of the cache.
        UnsupportedOption: speculation, for a model whose sequences cannot take tokens back; a quantized cache of latents;
            host memory behind the cache of a sharded model; CUDA graphs elsewhere.
    """
    if config.cuda_graphs:
        cuda_capture(model.device)
    try:
        kernels = ops.resolve_backend(config.attention_backend, model.device)
    except ValueError as error:
        raise KernelUnavailable(f"attention_backend: {error}") from error
    sizes = [max(layer.head_dim, layer.value_dim) for layer in model.layers if not layer.value_in_key]
    if reason := ops.why_unsupported(kernels, model.device, head_dim=max(sizes, default=None)):
        raise KernelUnavailable(f"attention_backend {kernels!r}: {reason}; use 'reference'")
    if reason := ops.why_unsupported(kernels, model.device, kv_dtype=kv_dtype_of(config.kv_dtype, model.dtype)):
        raise KernelUnavailable(f"kv_dtype={config.kv_dtype!r} with attention_backend {kernels!r}: {reason}")
    if config.kv_dtype in QUANTIZED and kernels == "triton" and any(layer.value_in_key for layer in model.layers):
        raise UnsupportedOption(
            f"kv_dtype={config.kv_dtype!r}: this model's layers keep latents, which the Triton kernels do not quantize; "
            "use kv_dtype=None"
        )
    if config.offload is not None and model.team is not None:
        raise UnsupportedOption("offload: a sharded model has no host memory behind its cache; use offload=None")
    if config.speculation is not None and model.states:
        raise UnsupportedOption(
            f"speculation={config.speculation.method!r}: this model's layers keep a state that cannot be taken back when a "
            "guess was wrong; use speculation=None"
        )


def build_encoder(model: PagedModel, config: EngineConfig) -> EncoderOutputs | None:
    """What gives an engine the embeddings of images; None for a model that takes none."""
    return None if model.media is None else EncoderOutputs(model.media.encode, config.images.cache_memory)


def build(
    model: PagedModel,
    config: EngineConfig,
    max_model_len: int,
    encoder: EncoderOutputs | None = None,
    offload: HostOffload | None = None,
) -> tuple[KVCache, Scheduler]:
    """A cache within the configured memory, or a share of what there is, and its scheduler.

    States of sequences may take up to half of it, the blocks get the rest. Models with states have no prefix cache:
    blocks of their attention layers would be of use only together with the state at the blocks' end.

    Raises what `check_config` does, and InvalidArgument if there is no memory for a cache.
    """
    check_config(model, config)
    cuda = model.device.type == "cuda"
    cache = build_cache(model, config)
    limits = Limits(max_batch_tokens(model, config), config.max_num_seqs, max_model_len)
    budget = config.kv_cache_memory
    if budget is None or config.kv_cache_share:
        budget = _free_budget(model, config, cache, limits)
    slots = slots_for_budget(cache.states.bytes_per_slot, budget // 2 if cache.groups else budget, config.max_num_seqs)
    most = blocks_within(cache, budget, slots, limits)
    if model.team is not None:  # blocks are numbered alike on all ranks
        *most, slots = model.team.least([*most, slots])
    initial = first_blocks(cache.device, most)
    if cuda:  # so that a lack of memory shows here, and not in somebody's request
        with as_in_a_step(cache.device):
            cache.ensure(initial)
            cache.states.ensure(min(slots, config.max_num_seqs))
    prefix_cache = config.prefix_cache and not slots
    host = None
    if offload is not None:
        host = offload.tier(
            cache,
            max_batch_tokens=limits.max_batch_tokens,
            max_num_seqs=limits.max_num_seqs,
            keeps_prefixes=prefix_cache,
            exact=config.exact,
            begin_fingerprint=model.begin_fingerprint,
        )
    scheduler = Scheduler(
        groups=[GroupSpec(window=group.window, chunk=group.chunk) for group in cache.groups],
        block_size=cache.block_size,
        num_blocks=initial,
        max_blocks=most,
        **limits._asdict(),
        max_slots=slots,
        whole_prompts=not all(spec.takes_chunks for spec in model.states),
        prefix_cache=prefix_cache,
        policy=config.policy,
        max_queue=config.max_queue,
        host=host,
        encoder=None if encoder is None else EncoderBudget(config.images.tokens_per_step, encoder.__contains__),
    )
    return cache, scheduler


def build_cache(model: PagedModel, config: EngineConfig, kind: type[C] = KVCache) -> C:
    """An empty cache for `model`."""
    kernels = ops.resolve_backend(config.attention_backend, model.device)
    return kind(
        group_layers(model.layers, values_in_keys=kernels == "triton"),
        states=model.states,
        block_size=config.block_size or (64 if model.device.type == "cuda" else 16),
        dtype=kv_dtype_of(config.kv_dtype, model.dtype),
        device=model.device,
        backend=config.attention_backend,
    )


def max_batch_tokens(model: PagedModel, config: EngineConfig) -> int:
    """The most tokens of a step."""
    return config.max_batch_tokens or (8192 if model.device.type == "cuda" else 512)


def _free_budget(model: PagedModel, config: EngineConfig, cache: KVCache, limits: Limits) -> int:
    """Bytes that the configuration leaves to the cache when it says a share or nothing."""
    if model.device.type != "cuda":
        sharing = 1 if model.team is None else ranks_on_this_machine(model.team.size)
        return int(free_memory() * (config.kv_cache_share or CPU_FRACTION)) // sharing
    kept = 0 if model.media is None else config.images.cache_memory
    return -kept + kv_budget(
        ModelRunner(model, cache, _inputs(model, config, cache, limits), backend=config.attention_backend),
        CudaMeter(model.device),
        config.kv_cache_share or CUDA_FRACTION,
        graphs=wants_graphs(config, model),
        **limits._asdict(),
    )


def blocks_within(cache: KVCache, budget: int, slots: int, limits: Limits) -> list[int]:
    """Most blocks of each group so that a cache with `slots` states stays within `budget` bytes."""
    most = blocks_for_budget(
        cache.groups,
        budget=budget - slots * cache.states.bytes_per_slot,
        block_size=cache.block_size,
        dtype=cache.dtype,
        max_batch_tokens=limits.max_batch_tokens,
        max_num_seqs=limits.max_num_seqs,
    )
    if cache.device.type == "cuda":  # all of them are taken at once, and beyond this are nothing but old prefixes
        whole = limits.max_num_seqs * -(-limits.max_model_len // cache.block_size)
        most = [min(count, whole) for count in most]
    return most


def first_blocks(device: torch.device, most: list[int]) -> list[int]:
    """Blocks of each group to begin with: on CPU the cache grows by itself."""
    return most if device.type == "cuda" else [min(count, INITIAL_CPU_BLOCKS) for count in most]


def _inputs(model: PagedModel, config: EngineConfig, cache: KVCache, limits: Limits) -> Inputs:
    return make_inputs(
        len(cache.groups),
        block_size=cache.block_size,
        device=cache.device,
        backend=config.attention_backend,
        shifts_positions=model.media is not None and model.media.shifts_positions,
        **limits._asdict(),
    )


def build_runner(
    model: PagedModel, config: EngineConfig, cache: KVCache, scheduler: Scheduler, kind: type[R] = ModelRunner
) -> R:
    """What runs the scheduler's plans on the cache.

    Args:
        kind: of a sharded model, whether it tells the other ranks to do the same, or is told.
    """
    inputs = _inputs(model, config, cache, limits_of(scheduler))
    options: dict = dict(backend=config.attention_backend)
    if wants_graphs(config, model):
        for name in ("graphs", "adapted_graphs"):
            options[name] = DecodeGraphs(cuda_capture(cache.device), scheduler.max_num_seqs, model.team)
    runner = kind(model, cache, inputs, **options)
    if config.exact and cache.device.type != "cpu":  # where reading them apart sums in the same order
        runner.prefixes = None
    return runner


def wants_graphs(config: EngineConfig, model: PagedModel) -> bool:
    """Whether decode steps are to be recorded: of a sharded model where it is asked for, as no GPU has shown yet that it is well."""
    if config.cuda_graphs is not None:
        return config.cuda_graphs
    return model.device.type == "cuda" and model.team is None


def build_speculator(model: PagedModel, config: EngineConfig, draft_engine) -> Speculator | None:
    """What guesses tokens ahead in an engine of `config`, if anything does.

    Args:
        draft_engine: the BatchEngine of the draft model, for "draft".

    Raises UnsupportedOption for a draft model that keeps a state.
    """
    speculation = config.speculation
    if speculation is None:
        return None
    if speculation.method == "ngram":
        proposer = NgramProposer(*speculation.ngram_range)
    else:
        proposer = DraftModel(draft_engine, config.max_num_seqs)
    return Speculator(
        proposer,
        num_tokens=speculation.num_tokens,
        max_step_tokens=MAX_STEP_TOKENS.get(model.device.type, MAX_STEP_TOKENS_ELSEWHERE),
    )
