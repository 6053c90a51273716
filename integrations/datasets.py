"""Functions for `dataset.map(..., batched=True)` of Hugging Face datasets: a batch of rows goes through the engine side by side.

    dataset.map(Generate(engine, SamplingParams(max_tokens=100), prompt="question", output="answer"), batched=True, batch_size=512)
    dataset.map(Score(engine, prompt="question", continuations="choices", output="logprobs"), batched=True)
    dataset.map(Embed(engine, text="text", output="embedding"), batched=True)

Rows keep their order, whatever `with_format` shows them as. The engine drains at the end of each batch, so batches should be several times
`max_num_seqs`. The functions live where their engine does: `num_proc` is refused. What they give depends on weights that may change,
so `map` finds none of it in its cache of earlier runs, unless it is given a `new_fingerprint`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping

from ..base.errors import InvalidArgument
from ..base.sampling_params import SamplingParams
from ..engine.engine import BatchEngine

__all__ = ["Embed", "Generate", "Score"]

From = str | Callable[[dict], object]


class _OfBatches:
    """What the three have in common.

    Args:
        engine: an Engine.
        output: the column that the results go to.
    """

    def __init__(self, engine: BatchEngine, output: str):
        self.engine, self.output = engine, output

    def __reduce__(self):
        """How datasets takes its fingerprint, and sends it to other processes: there it raises when it is called."""
        return _Elsewhere, (uuid.uuid4().hex,)


class Generate(_OfBatches):
    """Texts that follow prompts.

    Args:
        params: for all prompts; with `n` above 1 the results are lists of texts.
        prompt: the column, or a function of a row, that gives each prompt: text, messages or token ids.
        adapter: as in `Engine.generate`.

    Raises, from `map`: what `Engine.generate` raises; InvalidArgument without `batched=True` or for a column that is not there.
    """

    def __init__(
        self,
        engine: BatchEngine,
        params: SamplingParams | None = None,
        *,
        prompt: From = "prompt",
        output: str = "completion",
        adapter: str | None = None,
    ):
        super().__init__(engine, output)
        self.params = SamplingParams() if params is None else params
        self.prompt, self.adapter = prompt, adapter

    def __call__(self, batch: Mapping) -> dict[str, list]:
        outputs = self.engine.generate(_values(batch, self.prompt), self.params, adapter=self.adapter)
        texts = [[one.text for one in output.outputs] for output in outputs]
        return {self.output: texts if self.params.n > 1 else [one for (one,) in texts]}


class Score(_OfBatches):
    """Log-probabilities of continuations of prompts: a number for each, or where a row has a list of them, a list.

    Args:
        prompt, continuations: the columns, or functions of a row, as in `Engine.score`.
        per_token: divide each by its number of tokens.
        options: those of `Engine.score`.

    Raises, from `map`: what `Engine.score` raises, and what Generate raises.
    """

    def __init__(
        self,
        engine: BatchEngine,
        *,
        prompt: From = "prompt",
        continuations: From = "continuations",
        output: str = "logprobs",
        per_token: bool = False,
        **options,
    ):
        super().__init__(engine, output)
        self.prompt, self.continuations, self.per_token, self.options = prompt, continuations, per_token, options

    def __call__(self, batch: Mapping) -> dict[str, list]:
        given = _values(batch, self.continuations)
        lists = [[one] if isinstance(one, str) else one for one in given]
        scores = self.engine.score(_values(batch, self.prompt), lists, **self.options)
        numbers = [[one.logprob / (one.num_tokens if self.per_token else 1) for one in row] for row in scores]
        return {self.output: [row[0] if isinstance(one, str) else row for one, row in zip(given, numbers)]}


class Embed(_OfBatches):
    """A vector for each text.

    Args:
        text: the column, or a function of a row, that gives each text, messages or token ids.
        options: those of `Engine.embed`, such as `pooling`, `normalize`, `dimensions`.

    Raises, from `map`: what `Engine.embed` raises, and what Generate raises.
    """

    def __init__(self, engine: BatchEngine, *, text: From = "text", output: str = "embedding", **options):
        super().__init__(engine, output)
        self.text, self.options = text, options

    def __call__(self, batch: Mapping) -> dict[str, list]:
        outputs = self.engine.embed(_values(batch, self.text), **self.options)
        return {self.output: [output.embedding for output in outputs]}


class _Elsewhere:
    def __init__(self, name: str):
        self._name = name

    def __call__(self, batch):
        raise InvalidArgument("num_proc: the engine is in one process; leave num_proc out")


def _values(batch: Mapping, wanted: From) -> list:
    """What `wanted` is of each row."""
    if callable(wanted):
        columns = {name: _column(batch, name) for name in batch}
        length = min(map(len, columns.values()), default=0)
        return [wanted({name: column[place] for name, column in columns.items()}) for place in range(length)]
    return _column(batch, wanted)


def _column(batch: Mapping, name: str) -> list:
    if name not in batch:
        raise InvalidArgument(f"there is no column {name!r}, only {', '.join(map(repr, batch))}")
    column = _plain(batch[name])
    if not isinstance(column, list):
        raise InvalidArgument("rows come one by one: call map with batched=True")
    return column


def _plain(value):
    """Arrays, tensors and series as lists, at any depth."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        return value
    return [_plain(one) for one in value]
