"""Packed forwards against stock's own, when a model is patched: an unknown difference is refused, not wrong."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch

from hf_paged_kernels import ops

from ..base.config import EngineConfig
from ..base.errors import UnsupportedModel
from ..core.plan import StepPlan
from ..core.request import Request
from ..engine.build import build, build_runner
from ..runtime.runner import ModelRunner
from ..runtime.warpers import row_argmax
from .adapters import Adaptations
from .attention import attention_configs, observing, paged_attention
from .fusion.launches import counting
from .fusion.sharded import split_head_of
from .heads import stock_rows
from .spec import decoder_layers, vocab_size
from .swap import evaluating
from .visibility import Visibility

TOKENS = 12
MOST_TOKENS = 80  # to reach beyond a window or chunk of up to 64
SINGLES = 2  # of them computed one by one

# Largest difference of a row's logits, relative to its largest logit. Rounding stays far below, a wrong mask, position
# or state is far above. In narrow types most rows must stay below the first limit and all below the second: single rows
# differ by more where an expert's choice was close, and by still more if the model itself answers a change in the last bit
# of an embedding with as much.
LIMIT = 1e-3
LIMIT_NARROW = 0.1
LIMIT_NARROW_ROW = 0.5
# Layers that round what they are given to 8 bits answer a change in the last bit of an input with one of a whole step, and
# some look across all rows for outliers (bitsandbytes). They are narrow, too. Known by what their model itself makes of
# embeddings that are off by so much, or of a token with others beside it: more than this share of the largest logit.
PERTURBATION = 1e-6
SCATTER = 1e-4


@dataclass
class Observed:
    """Stock's own forward of a few tokens.

    Attributes:
        ids: [1, L] its tokens, all different where the vocabulary allows.
        logits: [L, V], or what else the model's head gives; see `heads.stock_rows`.
        body, hidden_size: see `heads.StockRows`.
        visibility: what its attention layers saw.
    """

    ids: torch.Tensor
    logits: torch.Tensor
    body: torch.nn.Module | None
    hidden_size: int | None
    visibility: Visibility


def observe(model: torch.nn.Module, adaptations: Adaptations) -> Observed:
    """Runs the model's own forward, as stock runs it. Raises UnsupportedModel for attention hf_paged does not do."""
    device = next(model.parameters()).device
    ids = some_tokens(model, device)
    visibility = Visibility()
    # Modules with a softmax of their own, whose adapters know what they see, may ask for the implementation's name.
    configs = [] if adaptations.layers else attention_configs(model)
    with evaluating(model), paged_attention(configs), observing(visibility):
        stock = stock_rows(model, ids)
    return Observed(ids, stock.rows, stock.body, stock.hidden_size, visibility)


def some_tokens(model: torch.nn.Module, device: torch.device, wanted: int | None = None) -> torch.Tensor:
    """[1, L] tokens, all different where the vocabulary allows; default as many as show what its attention sees."""
    config = model.config.get_text_config(decoder=True)
    local = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None) or MOST_TOKENS
    length = local + TOKENS if local + TOKENS <= MOST_TOKENS else TOKENS
    length = wanted or min(length, getattr(config, "max_position_embeddings", None) or length)
    vocabulary = vocab_size(model)
    special = {value for settings in (model.config, config) for name, value in vars(settings).items()
               if name.endswith(("token_id", "token_index")) and isinstance(value, int)}  # fmt: skip
    # Both ends of vocabularies hold tokens that few models were trained on, and in 16 bits stock itself is far off there.
    middle = chain(range(vocabulary // 2, vocabulary), range(vocabulary // 2))
    plain = (token for token in middle if token not in special)
    ids = [token for token, _ in zip(plain, range(length))] or [0]
    return torch.tensor([ids], dtype=torch.int64, device=device)


def check_forward(adapter, observed: Observed, config: EngineConfig) -> tuple[list[str] | None, float | None]:
    """Raise UnsupportedModel unless two sequences in the batches of an engine get the logits that stock gives each.

    Their tokens begin alike, so that stock's one forward says what both must be. The first step computes the shorter
    one beside a third of the longer one, the second the rest: its rows are neither where they would be alone, nor where
    those before them were. Then the shorter one goes on by single tokens, beside the longer one and alone.

    Returns:
        The kernels of Triton and of torch that a decoder layer launched in the last step, by name, of the layer with
        the most of them; None where the kernels are not Triton's. And by how much of the largest logit the model's own
        results for a token scatter, where that is more than rounding in its type explains, else None.
    """
    tokens = observed.ids[0].tolist()
    shorter = tokens[: max(1, len(tokens) * 2 // 3)]
    scratch = scratch_config(adapter, config, max_batch_tokens=max(2, len(tokens)), max_num_seqs=2)
    cache, scheduler = build(adapter, scratch, max_model_len=len(tokens) + 1)
    runner = build_runner(adapter, scratch, cache, scheduler)
    # Stock itself computes other states for tokens one by one than for a prompt where prompts cannot be cut.
    alike = all(spec.takes_chunks for spec in adapter.states)
    singles = min(SINGLES, len(tokens) - len(shorter)) if alike else 0
    scheduler.add(Request(request_id="shorter", prompt_token_ids=shorter, max_tokens=singles + 1))
    scheduler.add(Request(request_id="longer", prompt_token_ids=tokens, max_tokens=1))
    off: dict[int, list[torch.Tensor]] = {}
    launches = None
    try:
        while (plan := scheduler.schedule()) is not None:
            logits, launches = _forward(runner, plan)
            _check_winners(runner, plan, logits)
            ends = {}
            for seq_id, begin, mine in zip(plan.seq_ids, plan.num_context, logits.split(plan.num_new)):
                end = ends[seq_id] = begin + len(mine)
                off.setdefault(seq_id, []).append(errors(mine, observed.logits[begin:end]))
            scheduler.commit(plan, {seq_id: [(tokens + tokens)[ends[seq_id]]] for _, seq_id in plan.samples})
    finally:
        runner.release()
    narrow = adapter.dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest"
    scatter = None
    for rows in map(torch.cat, off.values()):
        if not narrow and not small(rows, narrow):
            scatter = _scatter(adapter.module, observed)
            narrow = scatter > SCATTER
        if not small(rows, narrow) and not (narrow and small(rows, narrow, own=_scatter(adapter.module, observed))):
            raise UnsupportedModel(
                f"model: {type(adapter.module).__name__} computes other logits in packed batches than by itself (off "
                f"by {rows.max():.1g} of the largest), which hf_paged cannot explain"
            )
    return launches, scatter


def scratch_config(adapter, config: EngineConfig, **limits: int) -> EngineConfig:
    """`config` for a few short sequences on a cache of their own."""
    unset = dict.fromkeys(("block_size", "kv_dtype", "max_queue", "speculation"))
    memory = _memory(adapter)
    return config.replace(**unset, prefix_cache=False, kv_cache_memory=memory, cuda_graphs=False, **limits)


def _scatter(model: torch.nn.Module, observed: Observed) -> float:
    """The largest error of the model's own logits with fewer tokens in its batch, and with PERTURBATION on embeddings,
    or one in the last bit of their type."""
    ids, generator = observed.ids, torch.Generator().manual_seed(0)

    def perturb(module, args, output):
        noise = torch.randn(output.shape, generator=generator).to(output)
        return output * (1 + max(PERTURBATION, torch.finfo(output.dtype).eps) * noise)

    def error(count: int) -> float:
        with evaluating(model), torch.no_grad():
            logits = stock_rows(model, ids[:, :count]).rows
        return float(errors(logits, observed.logits[:count]).max())

    fewer = [error(count) for count in sorted({1, ids.shape[1] // 2, ids.shape[1] - 1} - {0})]
    handle = model.get_input_embeddings().register_forward_hook(perturb)
    try:
        return max(*fewer, error(ids.shape[1]), 0.0)
    finally:
        handle.remove()


def _forward(runner: ModelRunner, plan: StepPlan) -> tuple[torch.Tensor, list[str] | None]:
    """Logits of all rows, and of a single row on Triton what the layer with the most kernels launched."""
    step = runner.prepare(plan, rows=range(plan.num_tokens))
    if plan.num_tokens > 1 or ops.resolve_backend(runner.backend, runner.cache.device) != "triton":
        return runner.forward(step), None
    with counting(list(decoder_layers(runner.model.module).values())) as layers:
        logits = runner.forward(step)
    return logits, max(layers, key=len, default=None)


def _check_winners(runner: ModelRunner, plan: StepPlan, logits: torch.Tensor) -> None:
    """Let each rank of a sharded model keep its part of the logits where that gives the same largest ones."""
    model = runner.model
    head = None if model.team is None else split_head_of(model.module)
    if head is None:
        return
    model.split_head = head
    step = runner.prepare(plan, rows=range(plan.num_tokens))
    tokens, peaks = runner.run(step, lambda context: model.winners(context, context.rows))
    best, most = row_argmax(logits)
    if not model.team.unanimous(torch.equal(tokens, best) and torch.equal(peaks, most.to(peaks))):
        model.split_head = None


def small(off: torch.Tensor, narrow: bool, own: float = 0.0) -> bool:
    """Whether such errors of rows are those of rounding. `own`: how far a row of the model's own was off (`_scatter`)."""
    if not len(off):
        return True
    if not narrow:
        return bool(off.max() <= LIMIT)
    return bool(off.median() <= LIMIT_NARROW) and bool(off.max() <= max(LIMIT_NARROW_ROW, 2 * own))


def _memory(adapter) -> int:
    """Bytes for two short sequences."""
    a_token = sum(layer.bytes_per_token(adapter.dtype) for layer in adapter.layers)
    return 1024 * max(1, a_token) + 8 * sum(spec.num_bytes for spec in adapter.states)


def errors(mine: torch.Tensor, stock: torch.Tensor) -> torch.Tensor:
    """The relative error of every row of which stock's logits are numbers."""
    sound = stock.isfinite().all(-1)
    mine, stock = mine[sound].float(), stock[sound].float()
    return ((mine - stock).abs().amax(-1) / stock.abs().amax(-1).clamp_min(1.0)).nan_to_num(nan=float("inf"))
