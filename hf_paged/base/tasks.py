"""What a request may want instead of tokens, and what it gets. Plain data, checked when it is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .errors import InvalidArgument
from .types import RequestMetrics

if TYPE_CHECKING:
    import numpy

POOLINGS = ("mean", "last", "cls")
ACTIVATIONS = (None, "softmax", "sigmoid", "none")


@dataclass(frozen=True, kw_only=True)
class EmbedParams:
    """One vector for a text, from the hidden states after the model's last norm.

    Attributes:
        pooling: "mean" of all tokens, or that of the "last" or the first token ("cls"). None: what the checkpoint says
            (sentence-transformers' modules.json and what it names), "mean" where it says nothing.
        normalize: scale to length 1.
        dimensions: keep only so many leading numbers (before normalising), for models trained for that (Matryoshka).
            None: all.

    Raises InvalidArgument for a value that is wrong.
    """

    pooling: Literal["mean", "last", "cls"] | None = None
    normalize: bool = True
    dimensions: int | None = None

    def __post_init__(self):
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise InvalidArgument(f"pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        if not isinstance(self.normalize, bool):
            raise InvalidArgument(f"normalize must be True or False, got {self.normalize!r}")
        count = self.dimensions
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise InvalidArgument(f"dimensions must be a positive integer, got {count!r}")


@dataclass(frozen=True, kw_only=True)
class ScoreParams:
    """How likely a continuation of the prompt is.

    Attributes:
        continuation: text or token ids. Text is tokenized together with a prompt given as text, and by itself where a token
            would reach across the boundary.

    Raises InvalidArgument if it is empty or neither.
    """

    continuation: str | Iterable[int]

    def __post_init__(self):
        given = self.continuation
        if not isinstance(given, str):
            try:
                if isinstance(given, bytes | Mapping | Set):
                    raise TypeError
                given = tuple(given.tolist() if hasattr(given, "tolist") else given)
            except TypeError:
                kind = type(given).__name__
                raise InvalidArgument(f"continuation must be text or token ids, got {kind}") from None
            object.__setattr__(self, "continuation", given)
        if not given:
            raise InvalidArgument("continuation is empty")


@dataclass(frozen=True, kw_only=True)
class ClassifyParams:
    """What a sequence-classification head says of a text, or of a pair of texts given as a tuple.

    Attributes:
        activation: of the logits: "softmax", "sigmoid" or "none". By default what the model's config says: "none" for
            regression, "sigmoid" for several labels at once or a single one, else "softmax".

    Raises InvalidArgument for a value that is wrong.
    """

    activation: Literal["softmax", "sigmoid", "none"] | None = None

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise InvalidArgument(f"activation must be 'softmax', 'sigmoid', 'none' or None, got {self.activation!r}")


@dataclass(slots=True, kw_only=True)
class TaskOutput:
    """What all tasks have in common.

    Attributes:
        prompt_token_ids: of the prompt.
        metrics: times and counts; those of the request, live until it has finished.
    """

    request_id: str
    prompt_token_ids: list[int]
    metrics: RequestMetrics


@dataclass(slots=True, kw_only=True)
class EmbeddingOutput(TaskOutput):
    """`embedding`: float32 [D]."""

    embedding: numpy.ndarray


@dataclass(slots=True, kw_only=True)
class ScoreOutput(TaskOutput):
    """
    Attributes:
        token_ids: the continuation's.
        token_logprobs: the natural logarithm of each one's probability after all before it.
        ranks: of each one among all tokens; 1 is the most likely, and so are others with the same probability.
        is_greedy: whether greedy decoding would give this continuation. (Of equal logits it takes the first.)
    """

    token_ids: list[int]
    token_logprobs: list[float]
    ranks: list[int]
    is_greedy: bool

    @property
    def logprob(self) -> float:
        """Of the whole continuation: the sum."""
        return sum(self.token_logprobs)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(slots=True, kw_only=True)
class ClassificationOutput(TaskOutput):
    """
    Attributes:
        logits: float32 [C], one for each label.
        scores: float32 [C], after the activation.
        label: the name of the label with the highest score.
    """

    logits: numpy.ndarray
    scores: numpy.ndarray
    label: str
