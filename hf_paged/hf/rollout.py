"""Rollouts: generation from weights that are being trained, between the steps of an ordinary training loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..base.config import EngineConfig
from ..base.errors import InvalidArgument
from ..base.sampling_params import SamplingParams
from ..base.types import RequestOutput
from ..runtime.logprobs import chosen_logprobs
from .exact import exact_forwards, extents
from .patch import engine_of, is_patched, patch, patch_of, unpatch
from .peft import base_model


class Rollout:
    """What `rollout` returns. A context manager; `close` gives everything back.

    Attributes:
        exact: whether log-probabilities of generated tokens are, bit for bit, those of `model(input_ids)`.
    """

    def __init__(self, model: torch.nn.Module, config: EngineConfig | None, *, tokenizer=None, **overrides):
        self.model = model
        self._patched_here = not is_patched(model)
        if self._patched_here:
            patch(model, config, tokenizer=tokenizer, **overrides)
        elif config is not None or overrides:
            raise InvalidArgument("config: the model is patched already, with one of its own; unpatch it first")
        self.exact = patch_of(model).exact

    @torch.no_grad()
    def generate(
        self, prompts, params: SamplingParams | Sequence[SamplingParams] | None = None, **options
    ) -> list[RequestOutput]:
        """`Engine.generate` with the weights as they are now, in eval mode whatever mode the model is in.

        The memory of the KV cache is given back before this returns, for the backward pass.
        """
        engine = engine_of(self.model)
        try:
            return engine.generate(prompts, params, **options)
        finally:
            engine.sleep()

    def logprobs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        count: int | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Log-probabilities of the last tokens of each row, on the engine's kernels; without gradient.

        Args:
            input_ids: [B, L], padded on either side where `attention_mask` [B, L] is 0.
            count: of how many columns; default all but the first.
            temperature: what logits are divided by before.

        Returns:
            float32 [B, count]; 0 where a column is padding, or has no token before it.

        Raises InvalidArgument for wrong shapes, UnsupportedOption for a mask with zeros between ones.
        """
        columns = input_ids.shape[1]
        count = columns - 1 if count is None else count
        if not 0 < count < columns:
            raise InvalidArgument(f"count must be between 1 and {columns - 1}, got {count!r}")
        if not temperature > 0:
            raise InvalidArgument(f"temperature must be positive, got {temperature!r}")
        first, lengths = extents(input_ids, attention_mask)
        rows = [ids[begin : begin + length] for ids, begin, length in zip(input_ids.tolist(), first, lengths)]
        # logits of the token before the first wanted one, up to the last but one
        wanted = [min(length, max(0, begin + length - (columns - count) + 1)) for begin, length in zip(first, lengths)]
        result = torch.zeros(len(rows), count)
        with torch.no_grad(), exact_forwards(base_model(self.model)) as forwards:
            for spans, logits in forwards.run(rows, wanted):
                for index, places in spans:
                    ids, end = rows[index], first[index] + lengths[index] - (columns - count)
                    chosen = torch.tensor(ids[len(ids) - len(places) + 1 :], dtype=torch.int64, device=logits.device)
                    if len(chosen):
                        result[index, end - len(chosen) : end] = chosen_logprobs(logits[places[:-1]], chosen, temperature)
        return result.to(input_ids.device)

    def close(self) -> None:
        """Unpatch the model, unless it was patched before."""
        if self._patched_here and is_patched(self.model):
            unpatch(self.model)

    def __enter__(self) -> Rollout:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


def rollout(model: torch.nn.Module, config: EngineConfig | None = None, *, tokenizer=None, **overrides) -> Rollout:
    """Generate from a model that is being trained, in its own process, on its own weights.

        with hf_paged.rollout(model, exact=True) as rollout:
            for batch in data:
                outputs = rollout.generate(batch, SamplingParams(n=8, logprobs=0))
                loss(model, outputs).backward()
                optimizer.step()

    There is no copy of the weights and nothing to synchronize: what `optimizer.step()` wrote is seen by the next `generate`,
    which drops the prefixes cached before. Training mode, hooks, gradients and `requires_grad` stay as they are.

    Args:
        model: a transformers model or a PeftModel around one; its active adapters are part of it.
        config: see `patch`, which is called unless the model is patched; `overrides` are its fields by name. With
            `exact=True` the log-probabilities of generated tokens are bit for bit those of `model(input_ids)`.
    """
    return Rollout(model, config, tokenizer=tokenizer, **overrides)
