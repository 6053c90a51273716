"""Outputs of a required form: which tokens may come next. Grammars are llguidance's."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch

from ..base.errors import InvalidArgument
from ..base.structured import StructuredOutputsParams

LEXER_FUEL = 100_000  # a tenth of llguidance's default: about a second for the worst expressions
REMEMBERED = 64  # compiled forms: many requests share a few
_NOTHING = "NoExtensionBias"  # llguidance's name of a form that has no beginning


class Constraint:
    """The form of one sequence's output, and how far the output has come in it.

    It follows whatever tokens it is shown: it goes back where they differ from those it saw last.

    Args:
        eos_token_ids: what ends an output.
    """

    def __init__(self, matcher, vocab_size: int, eos_token_ids: frozenset[int]):
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._seen: list[int] = []
        self._forced = range(0)  # places in `_seen` where nothing else could be

    def fork(self) -> Constraint:
        """The same form, for another sequence, as far as this one has come."""
        with _faults_named():
            twin = Constraint(self._matcher.deep_copy(), self._vocab_size, self._eos_token_ids)
        twin._seen = list(self._seen)
        return twin

    def allowed(self, output: Sequence[int], guessed: int = 0) -> torch.Tensor | None:
        """bool [V]: the tokens that may follow `output`.

        Args:
            output: token ids so far.
            guessed: how many of the last of them are guesses. A wrong one, after which nothing can be right, gives None.

        Raises InvalidArgument if the output cannot have the form (tokens came from elsewhere), or the form takes more
        work than is allowed for one token, or fails in any other way.
        """
        output = list(output)
        if len(output) in self._forced and self._seen[: len(output)] == output:
            mask = torch.zeros(self._vocab_size, dtype=torch.bool)
            mask[self._seen[len(output)]] = True
            return mask
        with _faults_named():
            self._follow(output, guessed)
            if len(self._seen) < len(output):
                return None
            return self._mask()

    def forced(self, output: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that have to follow `output`: after each, the next is all that `allowed` leaves.

        EOS is not among them. Where the form fails they end; `allowed` says why when the output has come so far.
        """
        output = list(output)
        try:
            with _faults_named():
                self._follow(output, 0)
                self._forced = range(len(output), len(output))
                # (there are none, as a rule, and this is a hundred times as quick as a mask)
                while len(self._forced) < most and self._matcher.compute_ff_tokens():
                    (only, *others) = self._mask().nonzero().flatten().tolist()
                    if others or only in self._eos_token_ids:
                        break
                    self._follow([*self._seen, only], 0)
                    self._forced = range(len(output), len(self._seen))
        except InvalidArgument:
            pass
        return self._seen[len(output) :]

    def _mask(self) -> torch.Tensor:
        words = torch.zeros(-(-self._vocab_size // 32), dtype=torch.int32)
        self._matcher.unsafe_compute_mask_ptr(words.data_ptr(), words.nbytes)
        self._check()
        bits = words[:, None] >> torch.arange(32, dtype=torch.int32) & 1
        return bits.flatten()[: self._vocab_size].bool()

    def _follow(self, output: list[int], guessed: int) -> None:
        self._check()
        common = min(len(self._seen), len(output))
        if self._seen[:common] != output[:common]:
            common = next(i for i, (mine, theirs) in enumerate(zip(self._seen, output)) if mine != theirs)
        if len(self._seen) > common:
            self._matcher.rollback(len(self._seen) - common)
            del self._seen[common:]
            self._forced = range(self._forced.start, min(self._forced.stop, common))
        new = output[common:]
        fitting = self._matcher.validate_tokens(new) if new else 0
        if fitting < len(new) - guessed:
            raise InvalidArgument(f"structured_outputs: token {new[fitting]} of the output does not fit the form")
        self._matcher.consume_tokens(new[:fitting])
        self._check()
        self._seen += new[:fitting]

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InvalidArgument(f"structured_outputs: {_said(self._matcher.get_error())}")


@contextlib.contextmanager
def _faults_named():
    """Whatever a grammar's code raises is the fault of the form, and so of one request."""
    try:
        yield
    except InvalidArgument:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":  # Rust's, which is no Exception
            raise InvalidArgument(f"structured_outputs: the form cannot be followed: {error!r}") from error
        raise


class Constraints:
    """Compiles forms for one tokenizer and model. May be used from several threads.

    Args:
        tokenizer: a fast tokenizer of transformers, or None.
        vocab_size: of the model's logits.
    """

    def __init__(self, tokenizer, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._prepared: dict[frozenset[int], object] = {}  # the tokenizer as llguidance has it, for given EOS tokens
        self._compiled: OrderedDict[tuple, Constraint] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, params: StructuredOutputsParams, eos_token_ids: frozenset[int]) -> Constraint:
        """The form, ready to be forked. Raises InvalidArgument if it is none, or too large, or cannot be had here."""
        key = params, eos_token_ids
        with self._lock:
            constraint = self._compiled.get(key)
            if constraint is None:
                constraint = self._compiled[key] = self._compile(params, eos_token_ids)
            self._compiled.move_to_end(key)
            if len(self._compiled) > REMEMBERED:
                self._compiled.popitem(last=False)
        return constraint

    def _compile(self, params: StructuredOutputsParams, eos_token_ids: frozenset[int]) -> Constraint:
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError:
            raise InvalidArgument("structured_outputs needs the package llguidance: pip install hf_paged[structured]") from None
        limits = LLParserLimits(verbose_errors=False, initial_lexer_fuel=LEXER_FUEL)
        prepared = self._prepare(eos_token_ids)
        try:
            matcher = LLMatcher(prepared, _grammar(params, LLMatcher), log_level=0, limits=limits)
        except ValueError as error:  # too deeply nested to be read at all
            raise InvalidArgument(f"structured_outputs: {params.form}: {_said(str(error))}") from None
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first is the slowest, and finds what is too large: here it delays no step
        if matcher.is_error():
            raise InvalidArgument(f"structured_outputs: {params.form}: {_said(matcher.get_error())}")
        return Constraint(matcher, self._vocab_size, eos_token_ids)

    def _prepare(self, eos_token_ids: frozenset[int]):
        prepared = self._prepared.get(eos_token_ids)
        if prepared is None:
            from llguidance import LLTokenizer

            backend = getattr(self._tokenizer, "backend_tokenizer", None)
            if backend is None:
                raise InvalidArgument("structured_outputs needs an engine with a fast tokenizer")
            if not eos_token_ids:
                raise InvalidArgument("structured_outputs needs a model with an end-of-sequence token")
            described = json.loads(backend.to_str())
            described["truncation"] = described["padding"] = None
            size = max(self._vocab_size, backend.get_vocab_size(with_added_tokens=True))
            prepared = LLTokenizer(json.dumps(described), n_vocab=size, eos_token=sorted(eos_token_ids))
            self._prepared[eos_token_ids] = prepared
        return prepared


def _grammar(params: StructuredOutputsParams, matcher) -> str:
    if params.form == "regex":
        return matcher.grammar_from_regex(params.regex)
    if params.form == "grammar":
        return matcher.grammar_from_lark(params.grammar)
    if params.form == "choice":
        return matcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, params.choice)))
    options: dict = {"whitespace_flexible": not params.disable_any_whitespace}
    if params.whitespace_pattern is not None:
        options["whitespace_pattern"] = params.whitespace_pattern
    schema = params.json if params.form == "json" else '{"type": "object"}'
    return matcher.grammar_from_json_schema(schema, overrides=options)


def _said(message: str) -> str:
    """The first line of what llguidance says."""
    first = message.strip().splitlines()[0] if message.strip() else "unknown error"
    return "no text has this form: it contradicts itself, or needs itself to begin" if first == _NOTHING else first
