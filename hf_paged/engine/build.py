"""From a model and a configuration to a KV cache and the scheduler that manages its blocks."""

from __future__ import annotations

from hf_paged_kernels import ops

from ..base.config import EngineConfig
from ..base.errors import KernelUnavailable, UnsupportedOption
from ..core.scheduler import GroupSpec, Scheduler
from ..runtime.inputs import make_inputs
from ..runtime.kv_cache import KVCache
from ..runtime.layout import QUANTIZED, blocks_for_budget, group_layers, kv_dtype_of, slots_for_budget
from ..runtime.memory import default_fraction, free_memory
from ..runtime.runner import ModelRunner, PagedModel
from .draft_model import DraftModel
from .speculation import MAX_STEP_TOKENS, MAX_STEP_TOKENS_ELSEWHERE, NgramProposer, Speculator

INITIAL_CPU_BLOCKS = 64  # a thousand tokens to begin with; the pool grows by itself


def check_config(model: PagedModel, config: EngineConfig) -> None:
    """Raise unless an engine of `config` can run `model`.

    Raises:
        KernelUnavailable: the attention backend asked for cannot run on the model's device, or not with the type asked
            for of the cache.
        UnsupportedOption: speculation, for a model whose sequences cannot take tokens back; a quantized cache of latents.
    """
    try:
        kernels = ops.resolve_backend(config.attention_backend, model.device)
    except ValueError as error:
        raise KernelUnavailable(f"attention_backend: {error}") from error
    if reason := ops.why_unsupported(kernels, model.device, kv_dtype=kv_dtype_of(config.kv_dtype, model.dtype)):
        raise KernelUnavailable(f"kv_dtype={config.kv_dtype!r} with attention_backend {kernels!r}: {reason}")
    if config.kv_dtype in QUANTIZED and kernels == "triton" and any(layer.value_in_key for layer in model.layers):
        raise UnsupportedOption(
            f"kv_dtype={config.kv_dtype!r}: this model's layers keep latents, which the Triton kernels do not quantize; "
            "use kv_dtype=None"
        )
    if config.speculation is not None and model.states:
        raise UnsupportedOption(
            f"speculation={config.speculation!r}: this model's layers keep a state that cannot be taken back when a "
            "guess was wrong; use speculation=None"
        )


def build(model: PagedModel, config: EngineConfig, max_model_len: int) -> tuple[KVCache, Scheduler]:
    """A cache within the configured memory, or a share of what is free, and its scheduler.

    States of sequences may take up to half of it, the blocks get the rest. Models with states have no prefix cache:
    blocks of their attention layers would be of use only together with the state at the blocks' end.

    Raises what `check_config` does.
    """
    check_config(model, config)
    cuda = model.device.type == "cuda"
    block_size = config.block_size or (64 if cuda else 16)
    max_batch_tokens = config.max_batch_tokens or (8192 if cuda else 512)
    dtype = kv_dtype_of(config.kv_dtype, model.dtype)
    kernels = ops.resolve_backend(config.attention_backend, model.device)
    groups = group_layers(model.layers, values_in_keys=kernels == "triton")
    fraction = config.memory_fraction or default_fraction(model.device)
    budget = config.kv_cache_memory or int(free_memory(model.device) * fraction)
    slot_bytes = sum(spec.num_bytes for spec in model.states)
    slots = slots_for_budget(slot_bytes, budget // 2 if groups else budget, config.max_num_seqs)
    most = blocks_for_budget(
        groups,
        budget=budget - slots * slot_bytes,
        block_size=block_size,
        dtype=dtype,
        max_batch_tokens=max_batch_tokens,
        max_num_seqs=config.max_num_seqs,
    )
    cache = KVCache(
        groups,
        states=model.states,
        block_size=block_size,
        dtype=dtype,
        device=model.device,
        backend=config.attention_backend,
    )
    initial = [min(count, INITIAL_CPU_BLOCKS) for count in most]
    if cuda:
        # Beyond this there is nothing to keep but old prefixes. Taken at once, so that a lack of memory shows here and
        # not in somebody's request.
        most = initial = [min(count, config.max_num_seqs * -(-max_model_len // block_size)) for count in most]
        cache.ensure(most)
        cache.states.ensure(min(slots, config.max_num_seqs))
    scheduler = Scheduler(
        groups=[GroupSpec(window=group.window, chunk=group.chunk) for group in groups],
        block_size=block_size,
        num_blocks=initial,
        max_blocks=most,
        max_batch_tokens=max_batch_tokens,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        max_slots=slots,
        whole_prompts=not all(spec.takes_chunks for spec in model.states),
        prefix_cache=config.prefix_cache and not slots,
        policy=config.policy,
        max_queue=config.max_queue,
    )
    return cache, scheduler


def build_runner(model: PagedModel, config: EngineConfig, cache: KVCache, scheduler: Scheduler) -> ModelRunner:
    """What runs the scheduler's plans on the cache."""
    inputs = make_inputs(
        len(cache.groups),
        block_size=cache.block_size,
        device=cache.device,
        backend=config.attention_backend,
        max_batch_tokens=scheduler.max_batch_tokens,
        max_num_seqs=scheduler.max_num_seqs,
        max_model_len=scheduler.max_model_len,
    )
    return ModelRunner(model, cache, inputs, backend=config.attention_backend)


def build_speculator(model: PagedModel, config: EngineConfig, draft_engine) -> Speculator | None:
    """What guesses tokens ahead in an engine of `config`, if anything does.

    Args:
        draft_engine: the BatchEngine of the draft model, for "draft".

    Raises UnsupportedOption for a draft model that keeps a state.
    """
    if config.speculation is None:
        return None
    if config.speculation == "ngram":
        proposer = NgramProposer(*config.ngram_range)
    else:
        proposer = DraftModel(draft_engine, config.max_num_seqs)
    return Speculator(
        proposer,
        num_tokens=config.num_speculative_tokens,
        max_step_tokens=MAX_STEP_TOKENS.get(model.device.type, MAX_STEP_TOKENS_ELSEWHERE),
    )
