"""lm-evaluation-harness on the engine: its model `hf`, whose requests run side by side.

    lm_eval.simple_evaluate(model=HFPaged(pretrained=model, tokenizer=tokenizer), tasks=[...])
    lm_eval.simple_evaluate(model="hf-paged", model_args={"pretrained": name}, tasks=[...])      # after `import hf_paged`

Loading, tokenization, chat templates and what a task's numbers mean are lm-eval's own, inherited. Only where it would pad
batches and run the model on them, all requests of a call go to the engine.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections import defaultdict

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria
from tqdm import tqdm

from ..base.config import EngineConfig
from ..base.errors import InvalidArgument, UnsupportedOption
from ..base.tasks import ScoreParams
from ..hf.generation import start_generate
from ..hf.patch import engine_of, is_patched, patch, unpatch
from ..hf.rows import RowCriterion, RowGeneration

__all__ = ["HFPaged"]

_ENGINE = frozenset(field.name for field in dataclasses.fields(EngineConfig))
_AHEAD = 2  # calls of `generate` that are started, in multiples of what the engine runs at once
_logger = logging.getLogger(__name__)


@register_model("hf-paged")
class HFPaged(HFLM):
    """lm-eval's `hf` model whose log-likelihoods and texts come from hf_paged's engine.

    Results are those of `hf` with `batch_size=1` (in bf16 and fp16 with `softmax_dtype=float32`, up to rounding); only what is
    sampled is drawn from other random numbers. Every request that ends is told to lm-eval's request cache at once.

    The model is patched (see `hf_paged.patch`) until `close`, or the end of a `with` block, takes that back.

    Args:
        pretrained: a name or folder, or a loaded model, which may be patched: then its engine is used as it is.
        quantization: of `hf_paged.patch`.
        options: those of `hf`, and fields of EngineConfig by name (`max_num_seqs`, `kv_dtype`, ...). `batch_size`,
            `max_batch_size` and `logits_cache` have no effect: the engine makes its own batches.

    Raises:
        InvalidArgument, UnsupportedOption: an option is wrong, or has no meaning here, by name.
        UnsupportedModel: see `hf_paged.patch`.
    """

    def __init__(self, pretrained, *, quantization: str | None = None, **options):
        chosen = {name: options.pop(name) for name in _ENGINE & options.keys()}
        if quantization is not None:
            chosen["quantization"] = quantization
        _refuse(options)
        if options.get("device") is None:
            options["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        super().__init__(pretrained, **options)
        self._patched_here = not is_patched(self.model)
        if self._patched_here:
            if self._max_length:
                chosen.setdefault("max_model_len", self._max_length)
            patch(self.model, tokenizer=self.tokenizer, **chosen)
        elif chosen:
            raise InvalidArgument(f"{min(chosen)}: this model is patched already; give it to hf_paged.patch")
        self._engine = engine_of(self.model)
        if self._engine.max_model_len < self.max_length:
            self.close()
            raise InvalidArgument(
                f"max_length is {self.max_length}, but the engine's max_model_len {self._engine.max_model_len}"
            )

    def close(self) -> None:
        """Unpatch the model if it was patched here. Closing twice is fine."""
        if self._patched_here and is_patched(self.model):
            unpatch(self.model)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    @property
    def batch_size(self) -> int:
        """How many requests of a call lm-eval's own code hands on at once: all."""
        return sys.maxsize

    def _bar(self, total: int, title: str, disable: bool) -> tqdm:
        return tqdm(total=total, desc=title, disable=disable or self.rank != 0)

    # -- log-likelihoods

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        """[(texts or None, context ids, continuation ids)] -> [(log-probability, whether it is greedy)]."""
        fitted = [self._fitted(context, continuation) for _, context, continuation in requests]
        results: list[tuple[float, bool] | None] = [None] * len(requests)
        states = []
        with self._bar(len(requests), "Running loglikelihood requests", disable_tqdm) as bar:

            def submit(place: int, context: list[int], continuation: list[int]):
                def ended(output) -> None:
                    if output.result is None:
                        return  # an error, which is raised below
                    results[place] = answer = (output.result.logprob, output.result.is_greedy)
                    texts = requests[place][0]
                    if texts is not None:  # windows of one text are told together, by loglikelihood_rolling
                        self.cache_hook.add_partial("loglikelihood", texts, answer)
                    bar.update()

                params = ScoreParams(continuation=continuation)
                return self._engine.submit_when_possible(context, params, on_output=ended)

            try:
                for place, (context, continuation) in enumerate(fitted):
                    states.append(submit(place, context, continuation))
                for state in states:
                    while not state.finished:
                        self._engine.step()
            finally:
                for state in states:
                    self._engine.release(state)
        for state in states:
            state.raise_error()
        return results

    def _fitted(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """The end of the context that fits before the continuation, whose last token the model does not see."""
        if not 0 < len(continuation) <= self.max_length:
            raise InvalidArgument(
                f"a continuation has {len(continuation)} tokens; it must have from 1 to max_length, {self.max_length}"
            )
        excess = max(len(context) + len(continuation) - self.max_length - 1, 0)
        if excess:
            _logger.warning(
                f"Combined length of context ({len(context)}) and continuation ({len(continuation)}) exceeds model's maximum "
                f"length ({self.max_length}). Truncating {excess} tokens from the left."
            )
        return context[excess:], continuation

    # -- texts

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The texts that follow the contexts of `requests`, each up to its stop strings."""
        results: list[str | None] = [None] * len(requests)
        running: dict[int, _Call] = {}
        most = _AHEAD * self._engine.config.max_num_seqs
        with self._bar(len(requests), "Running generate_until requests", disable_tqdm) as bar:

            def advance() -> None:
                """Take what has ended; or else make a step."""
                ended = [place for place, call in running.items() if call.complete()]
                for place in ended:
                    results[place] = text = self._text(running.pop(place))
                    self.cache_hook.add_partial("generate_until", requests[place].args, text)
                    bar.update()
                if running and not ended:
                    self._engine.step()

            try:
                for place, request in enumerate(requests):
                    running[place] = self._start(*request.args)
                    while len(running) >= most:
                        advance()
                while running:
                    advance()
            finally:
                for call in running.values():
                    call.release()
        return results

    def _start(self, context: str, options: dict) -> _Call:
        """`generate` for one context, as `hf` calls it, up to where it is in the engine."""
        options = normalize_gen_kwargs(options, self.max_gen_toks)
        until = handle_stop_sequences(
            options.pop("until"), eos=self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        )
        most = options.pop("max_gen_toks")
        if most >= self.max_length:
            raise InvalidArgument(f"max_gen_toks ({most}) must be less than max_length ({self.max_length})")
        ids, mask = self.tok_batch_encode(
            [context], left_truncate_len=self.max_length - most, truncation=self.truncation
        )
        width = ids.shape[1]
        if "max_length" in options:
            _logger.warning("`max_length` in generation kwargs. Please use `max_gen_toks` instead.")
        options.setdefault("temperature", 0.0)
        if not options["do_sample"] and not options["temperature"]:
            del options["temperature"]
        started = start_generate(
            self.model,
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            max_length=options.pop("max_length", width + most),
            stopping_criteria=self._criteria(until, width, options),
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
            **options,
        )
        return _Call(started, width, until)

    def _criteria(self, until: list[str], width: int, options: dict) -> list:
        beams = options.get("num_beams") or getattr(self.model.generation_config, "num_beams", None) or 1
        if beams > 1:  # `hf`'s own looks at the first beam and then ends all
            return stop_sequences_criteria(self.tokenizer, until, width, 1)
        return [_StopTexts(self.tokenizer, until, width)]

    def _text(self, call: _Call) -> str:
        """What `hf` makes of the new tokens: without what was thought, up to the first stop string."""
        tokens = call.new_tokens()
        marker = self.think_end_token
        if isinstance(marker, int) and marker in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(marker) :]
        text = self.tok_decode(tokens)
        if isinstance(marker, int):
            text = text.lstrip()
        return postprocess_generated_text(text, call.until, marker if isinstance(marker, str) else None)


class _Call:
    """One call of `generate`, running or done (what does not run as rows of the engine is done when it is started)."""

    def __init__(self, started: RowGeneration | torch.Tensor, width: int, until: list[str]):
        self._started = started
        self.width, self.until = width, until

    def complete(self) -> bool:
        return torch.is_tensor(self._started) or self._started.complete()

    def new_tokens(self) -> list[int]:
        """Of the first sequence, once it is complete. Raises its error."""
        self.release()
        sequences = self._started if torch.is_tensor(self._started) else self._started.result()
        return sequences[0, self.width :].tolist()

    def release(self) -> None:
        if not torch.is_tensor(self._started):
            self._started.release()


class _StopTexts(RowCriterion):
    """Ends a row whose new text has a stop string among its last tokens; how many of them is `hf`'s rule.

    Special tokens count as text, and nothing of the prompt does.
    """

    def __init__(self, tokenizer, until: list[str], width: int):
        self._tokenizer, self._width = tokenizer, width
        self._stops: dict[int, list[str]] = defaultdict(list)  # by the number of last tokens to look at
        for stop in until:
            self._stops[len(tokenizer.encode(stop, add_special_tokens=False)) + 2].append(stop)

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([self._found(row) for row in input_ids[:, self._width :].tolist()], device=input_ids.device)

    def _found(self, tokens: list[int]) -> bool:
        for count, stops in self._stops.items():
            text = self._tokenizer.decode(tokens[-count:])
            if any(stop in text for stop in stops):
                return True
        return False


def _refuse(options: dict) -> None:
    """Raise UnsupportedOption for what `hf` takes and the engine has no place for."""
    reasons = {
        "mixed_precision_dtype": "the engine runs in the model's own dtype; give `dtype`",
        "parallelize": "the engine's model is on one device",
        "tp_plan": "a sharded model is evaluated as a server's, by lm-eval's `local-completions`",
    }
    for name, reason in reasons.items():
        if options.get(name):
            raise UnsupportedOption(f"{name}: {reason}")
    if options.get("softmax_dtype") not in (None, "float32", torch.float32):
        raise UnsupportedOption("softmax_dtype: log-probabilities are computed in float32")
