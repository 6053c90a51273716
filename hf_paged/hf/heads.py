"""What stands on the body of a transformers model: a head for the next token, one for classifying texts, or none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ..base.errors import UnsupportedModel
from ..runtime.batch import StepContext, active_context
from .spec import text_config
from .swap import own_forwards


@dataclass(frozen=True)
class Head:
    """
    Attributes:
        generates: whether the head gives logits of next tokens.
        classifier: [.., H] -> [.., C] of a sequence-classification model, which stock applies to all positions and then
            takes one; None of others.
        labels: names of its C labels.
        activation: what makes scores of its logits: "softmax", "sigmoid" or "none".
        ignored: a token whose positions it passes over at the end of a text; None: none.
    """

    generates: bool = False
    classifier: torch.nn.Module | None = None
    labels: list[str] = field(default_factory=list)
    activation: str = "none"
    ignored: int | None = None


def head_of(model: torch.nn.Module) -> Head:
    """Raises UnsupportedModel for a head that hf_paged does not know."""
    name = type(model).__name__
    if hasattr(model, "generate"):
        return Head(generates=True)
    if model.base_model is model:
        return Head()
    classifier = getattr(model, "score", None)
    if not name.endswith("ForSequenceClassification") or not isinstance(classifier, torch.nn.Module):
        raise UnsupportedModel(
            f"model: {name} has a head that hf_paged does not run: it runs those for generating, those called `score` of "
            "sequence-classification models, and models without a head"
        )
    config = model.config
    return Head(
        classifier=classifier,
        labels=[config.id2label[index] for index in range(config.num_labels)],
        activation=_activation(config),
        ignored=text_config(model).pad_token_id,
    )


def _activation(config) -> str:
    """As transformers' text-classification pipeline chooses it."""
    if config.problem_type == "regression":
        return "none"
    several = config.problem_type == "multi_label_classification"
    return "sigmoid" if several or config.num_labels == 1 else "softmax"


@dataclass
class StockRows:
    """What a model's own forward makes of every token.

    Attributes:
        rows: what its head gives, [L, V] or [L, C]; without a head the hidden states [L, H].
        body: the module whose output are the hidden states after the last norm; the model itself if it has no head. None if
            there is no telling.
        hidden_size: H; None without a body.
    """

    rows: torch.Tensor
    body: torch.nn.Module | None
    hidden_size: int | None


def stock_rows(model: torch.nn.Module, ids: torch.Tensor) -> StockRows:
    """Run the model's own forward on `ids` [1, L].

    Raises UnsupportedModel for a classifier that does not take the last position.
    """
    head, length = head_of(model), ids.shape[1]
    positions = torch.arange(length, device=ids.device)[None]
    bodies = _bodies(model)
    with own_forwards(), _recording([*bodies, *filter(None, [head.classifier])]) as outputs:
        output = model(input_ids=ids, position_ids=positions, use_cache=False)
    # some models call parts of what is said to be their body
    states = [(body, _first(outputs[body])) for body in bodies if body in outputs]
    body, hidden = next(((body, states) for body, states in states if states.shape[:2] == (1, length)), (None, None))
    size = None if body is None else hidden.shape[-1]
    if head.generates:
        return StockRows(output.logits[0], body, size)
    if body is None:
        raise UnsupportedModel(f"model: {type(model).__name__} does not show its hidden states")
    if head.classifier is None:
        return StockRows(hidden[0], body, size)
    rows = outputs[head.classifier][0]
    if len(rows) != length or not torch.equal(rows[-1], output.logits[0]):
        raise UnsupportedModel(f"model: {type(model).__name__} does not classify by the hidden state of the last token")
    return StockRows(rows, body, size)


def _bodies(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules that may give the hidden states, the likeliest first."""
    if model.base_model is model and not hasattr(model, "generate"):
        return [model]
    candidates = [model.base_model, model.get_decoder(), getattr(model, "model", None)]
    found = [module for module in candidates if isinstance(module, torch.nn.Module) and module is not model]
    return list(dict.fromkeys(found))


@contextmanager
def _recording(modules: list[torch.nn.Module]) -> Iterator[dict[torch.nn.Module, object]]:
    """By module, what it returned last while inside."""
    outputs: dict[torch.nn.Module, object] = {}
    record = lambda module, args, output: outputs.update({module: output})  # noqa: E731
    handles = [module.register_forward_hook(record) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _first(output) -> torch.Tensor:
    return output if torch.is_tensor(output) else output[0]


@contextmanager
def keeping_hidden(body: torch.nn.Module, context: StepContext) -> Iterator[None]:
    """While inside, the first output of `body` becomes the hidden states of `context`, if they are needed."""
    if not context.needs_hidden:
        yield
        return

    def keep(module, args, output):
        if active_context() is context:  # else another thread runs the same model
            context.hidden = _first(output)[0]

    handle = body.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()
