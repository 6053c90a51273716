"""The self-check of `patch(model, verify=True)`: the model before and after patching, layer by layer.

Two sequences of different length. Before patching, stock `generate` runs each by itself: the prompt, then four tokens
one at a time. After patching, an engine of its own runs both together, prompts in chunks, on the same tokens. The
output of every decoder layer and the logits of every new token are compared.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig

from ..base.config import EngineConfig
from ..base.errors import RequestFailed, VerificationFailed
from ..base.sampling_params import SamplingParams
from ..engine.engine import BatchEngine
from ..engine.request_state import RowHooks
from ..runtime.layout import kv_dtype_of
from ..runtime.packed import current_batch
from .model import TransformersModel
from .spec import decoder_layers, text_config, vocab_size
from .swap import evaluating
from .watch import without_hooks

NUM_NEW = 5  # the first comes with the prompt, then four decode steps
LENGTHS = (21, 45)
LOGITS = "the logits"
LONGEST_WINDOW = 512  # prompts reach beyond sliding windows up to this one
# Largest difference of two rows as a share of their size. Narrow types round differently in every kernel, which adds up
# over the layers, and a router of experts near a tie then sends a row elsewhere: of those, the median row counts.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


@dataclass
class _Trace:
    """What one sequence gave: by layer its rows [n, H] in pieces, and last the logits [V] of every new token."""

    prompt: list[int]
    new: list[int] = field(default_factory=list)
    layers: dict[str, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))


class Verification:
    """Made before a model is patched; `check` compares with it afterwards."""

    def __init__(self, model: torch.nn.Module):
        self._layers = decoder_layers(model)
        self._expected = [_Trace(prompt) for prompt in _prompts(model)]
        saved = model.generation_config
        model.generation_config = GenerationConfig(pad_token_id=0)
        try:
            with evaluating(model), without_hooks(model):
                for trace in self._expected:
                    self._run_stock(model, trace)
        finally:
            model.generation_config = saved

    def _run_stock(self, model: torch.nn.Module, trace: _Trace) -> None:
        def record(name: str, rows: torch.Tensor) -> None:
            pieces = trace.layers[name]
            pieces.append(rows[-1:] if pieces else rows)  # a model without a cache computes all of them every time

        ids = torch.tensor([trace.prompt], device=model.device)
        with _recording(model, self._layers, record):
            result = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NUM_NEW,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        trace.new = result.sequences[0, ids.shape[1] :].tolist()
        trace.layers[LOGITS] = [logits[0] for logits in result.logits]

    def check(self, adapter: TransformersModel, config: EngineConfig) -> float:
        """Run the patched model. Returns the largest difference found, as a share of a row's size (see `_difference`).

        Raises VerificationFailed, naming the first layer that differs by more than its type's tolerance.
        """
        kv_dtype = kv_dtype_of(config.kv_dtype, adapter.dtype)
        allowed = max(TOLERANCES.get(dtype, max(TOLERANCES.values())) for dtype in (adapter.dtype, kv_dtype))
        actual = self._run_paged(adapter, config)
        worst = 0.0
        for name in self._expected[0].layers:  # in the order in which they ran
            for expected, trace in zip(self._expected, actual):
                error, row = _difference(expected.layers[name], trace.layers[name], narrow=allowed > 1e-3)
                if not error <= allowed:
                    position = row + (len(expected.prompt) - 1 if name == LOGITS else 0)
                    raise VerificationFailed(
                        f"model: patched, this {type(adapter.module).__name__} gives other results, first in {name}: "
                        f"off by {error:.2g} of its size (allowed for {adapter.dtype}: {allowed:g}), most at position "
                        f"{position} of a prompt of {len(expected.prompt)} tokens and {NUM_NEW} new ones. The model "
                        "was left unpatched"
                    )
                worst = max(worst, error)
        return worst

    def _run_paged(self, adapter: TransformersModel, config: EngineConfig) -> list[_Trace]:
        traces = {f"verify-{place}": _Trace(trace.prompt) for place, trace in enumerate(self._expected)}

        def record(name: str, rows: torch.Tensor) -> None:
            for segment in current_batch().segments:
                traces[segment.request_id].layers[name].append(rows[segment.rows].clone())

        longest = max(len(trace.prompt) for trace in self._expected)
        private = config.replace(
            max_batch_tokens=max(16, longest // 8),
            max_num_seqs=len(traces),
            max_model_len=longest + NUM_NEW,
            max_queue=None,
            kv_cache_memory=None,
            cuda_graphs=False,
            speculation=None,
        )
        engine = BatchEngine(adapter, None, private)
        try:
            with without_hooks(adapter.module), _recording(adapter.module, self._layers, record):
                states = [
                    engine.submit(trace.prompt, _PARAMS, request_id=name, hooks=_forcing(trace.new))
                    for name, trace in zip(traces, self._expected)
                ]
                while engine.has_unfinished():
                    engine.step()
            for state in states:
                state.raise_error()
                traces[state.request.request_id].layers[LOGITS] = [raw for raw, _ in state.captured()]
        except RequestFailed as error:
            raise VerificationFailed(
                f"model: patched, this {type(adapter.module).__name__} fails where it did not before: "
                f"{error.__cause__ or error}. The model was left unpatched"
            ) from error
        finally:
            engine.close()
            adapter.weights_replaced()  # with the hooks it really has
        return list(traces.values())


_PARAMS = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True, detokenize=False)


def _forcing(tokens: list[int]) -> RowHooks:
    """The sequence gets `tokens`, whatever is sampled."""
    given = iter(tokens)
    return RowHooks(replace=lambda _: next(given), capture=True)


def _prompts(model: torch.nn.Module) -> list[list[int]]:
    config = text_config(model)
    most = (getattr(config, "max_position_embeddings", None) or LONGEST_WINDOW * 2) - NUM_NEW
    short, long = LENGTHS
    for name in ("sliding_window", "attention_chunk_size"):
        window = getattr(config, name, None)
        if isinstance(window, int) and window <= LONGEST_WINDOW:
            long = max(long, window + window // 4 + 8)
    generator = torch.Generator().manual_seed(0)
    lengths = [max(1, min(length, most)) for length in (short, long)]
    return [torch.randint(vocab_size(model), (length,), generator=generator).tolist() for length in lengths]


@contextmanager
def _recording(
    model: torch.nn.Module, layers: dict[str, torch.nn.Module], record: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """While inside, `record(name, rows [T, H])` gets the output of every layer that runs."""
    calls: Counter = Counter()  # of each layer in the forward that runs: some models go round

    def hook(name: str):
        def forward_hook(module, args, output):
            calls[name] += 1
            output = output[0] if isinstance(output, (tuple, list)) else output
            record(name if calls[name] == 1 else f"{name} (pass {calls[name]})", output[0].detach())

        return forward_hook

    handles = [model.register_forward_pre_hook(lambda *_: calls.clear())]
    handles += [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _difference(expected: list[torch.Tensor], actual: list[torch.Tensor], *, narrow: bool) -> tuple[float, int]:
    """(largest difference of two rows as a share of their size, the row); infinite where a number is not finite.

    Rows that are not finite in `expected` say nothing. `narrow`: the largest of the medians of the early rows, the later
    ones and those that were decoded.
    """
    if not actual:
        return float("inf"), 0
    rows, others = (torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]) for parts in (expected, actual))
    if rows.shape != others.shape:
        return float("inf"), min(len(rows), len(others)) - 1
    rows, others = rows.double(), others.double()
    size = rows.norm(dim=-1).clamp_min(1e-30)
    share = ((rows - others).norm(dim=-1) / size).nan_to_num(float("inf"))
    share[~rows.isfinite().all(-1)] = 0.0
    groups = [share]
    if narrow and len(share) > 2 * NUM_NEW:
        groups = [*share[: 1 - NUM_NEW].chunk(2), share[1 - NUM_NEW :]]
    medians = [group.median() if narrow else group.max() for group in groups]
    worst = max(range(len(groups)), key=lambda place: medians[place])
    return medians[worst].item(), sum(map(len, groups[:worst])) + int(groups[worst].argmax())
