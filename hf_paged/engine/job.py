"""Lists of prompts, run to their end on an engine: to generate, embed, score or classify."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from ..base.branch import Branch
from ..base.errors import InvalidArgument, RequestFailed
from ..base.sampling_params import SamplingParams
from ..base.tasks import ClassificationOutput, ClassifyParams, EmbeddingOutput, EmbedParams, ScoreOutput, TaskOutput
from ..base.types import RequestOutput
from .request_state import RequestState

if TYPE_CHECKING:
    from .intake import Intake

Work = list[tuple]  # (prompt, its SamplingParams or what a task takes, what else `submit` is told of it), in order


class Jobs:
    """What BatchEngine does with lists of prompts. They are requests like any other, in the same steps.

    `options` of the tasks are those of `add` for each request: `priority`, `user`, `deadline`, `cache_salt`,
    `adapter`, `forward_hooks`. `images` are those of the prompt, as in `add`; with a list of prompts, a list of those of
    each, or None for one without.
    """

    _intake: Intake

    def generate(
        self,
        prompts,
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        adapter: str | list[str | None] | None = None,
        images=None,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Run prompts to their end and return their outputs in order.

        Args:
            prompts: one prompt or a list of them, each as in `add`.
            params: for all prompts, or a list with one per prompt; each as in `add`.
            adapter: for all prompts, or a list with one per prompt; each as in `add`.
            images: of one prompt as in `add`; with a list of prompts, a list of those of each (None: it has none).
            progress: show a tqdm bar.

        Raises:
            RequestFailed: a prompt's own error. The other prompts are run to their end first; the exception's `outputs`
                lists all of them in order.
        """
        own = own_images(prompts, images)
        prompts = as_list(prompts)
        work = list(zip(prompts, _each("params", params, prompts), own))
        return self._run(work, progress, _each("adapter", adapter, prompts))

    def embed(
        self,
        prompts,
        pooling: str | None = None,
        normalize: bool = True,
        dimensions: int | None = None,
        *,
        images=None,
        progress: bool = False,
        **options,
    ) -> list[EmbeddingOutput]:
        """One vector for each prompt, of float32; see EmbedParams.

        Raises what `generate` raises.
        """
        params = EmbedParams(pooling=pooling, normalize=normalize, dimensions=dimensions)
        work = [(prompt, params, own) for prompt, own in zip(as_list(prompts), own_images(prompts, images))]
        return self._results(work, progress, options)

    def score(
        self, prompts, continuations, *, images=None, progress: bool = False, **options
    ) -> list[ScoreOutput] | list[list[ScoreOutput]]:
        """How likely continuations of prompts are.

        The continuations of a prompt share its keys and values, so many of them cost little more than the prompt once: the
        blocks that it fills are shared through the prefix cache, what is beyond the last of them is computed for each.

        Args:
            prompts: one prompt or a list of them, each as in `add`.
            continuations: of one prompt, a list of texts or of lists of token ids, each as in ScoreParams; of a list of
                prompts, a list of such lists.

        Returns: a ScoreOutput for each continuation; lists of them for a list of prompts.

        Raises what `generate` raises.
        """
        work, counts = self.scoring(prompts, continuations, images)
        return grouped(self._results(work, progress, options), counts)

    def scoring(self, prompts, continuations, images=None) -> tuple[Work, list[int] | None]:
        """The requests that `score` makes, and how many there are for each prompt of a list; see `grouped`."""
        one = is_one(prompts)
        work, counts = [], []
        lists = _with_continuations(as_list(prompts), [continuations] if one else continuations)
        for (prompt, given), own in zip(lists, own_images(prompts, images)):
            ids, media, params = self._intake.scored(prompt, given, **own)
            work += [(ids, wanted, {"media": media}) for wanted in params]
            counts.append(len(params))
        return work, None if one else counts

    def classify(
        self, prompts, activation: str | None = None, *, images=None, progress: bool = False, **options
    ) -> list[ClassificationOutput]:
        """What the model's sequence-classification head says of each prompt, or pair of texts.

        Args:
            prompts: one prompt or a list of them, each as in `add`, or a tuple of two texts for models that compare them.
            activation: see ClassifyParams.

        Raises what `generate` raises, and UnsupportedOption if the model has no such head.
        """
        params, own = ClassifyParams(activation=activation), own_images(prompts, images, pairs=True)
        work = [(prompt, params, more) for prompt, more in zip(as_list(prompts, pairs=True), own)]
        return self._results(work, progress, options)

    def _results(self, work: Work, progress: bool, options: dict) -> list:
        adapter = options.pop("adapter", None)
        functions = {name: options.pop(name) for name in ("forward_hooks",) if name in options}
        if functions:
            options["hooks"] = self.hooks(**functions)
        unknown = options.keys() - {"priority", "user", "deadline", "cache_salt", "hooks"}
        if unknown:
            raise TypeError(f"unexpected keyword argument {min(unknown)!r}")
        return [result_of(output) for output in self._run(work, progress, [adapter] * len(work), **options)]

    def _run(self, work: Work, progress: bool, adapters: list[str | None], **options) -> list[RequestOutput]:
        states: list[RequestState] = []
        try:
            for (prompt, params, own), adapter in zip(work, adapters):
                states.append(self.submit_when_possible(prompt, params, adapter=adapter, **own, **options))
            _finish_all(self, states, progress)
        finally:
            for state in states:
                self.release(state)
        outputs = [state.output for state in states]
        failed = next((output.error for output in outputs if output.error is not None), None)
        if failed is not None:
            failed.outputs = outputs
            raise failed
        return outputs


def result_of(output: RequestOutput) -> TaskOutput:
    """What a task's request brought. Raises RequestFailed if it ended without."""
    if output.result is None:
        raise output.error or RequestFailed(output.request_id, "it was aborted")
    return output.result


def is_one(prompts) -> bool:
    """Whether this is one prompt: text, messages, token ids or a Branch; else it is several."""
    return isinstance(prompts, str | Branch) or (
        isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], (int, dict))
    )


def as_list(prompts, *, pairs: bool = False) -> list:
    """One prompt or several as a list. With `pairs`, a tuple of texts is one."""
    is_pair = pairs and isinstance(prompts, tuple) and bool(prompts) and isinstance(prompts[0], str)
    return [prompts] if is_pair or is_one(prompts) else list(prompts)


def own_images(prompts, images, *, pairs: bool = False) -> list[dict]:
    """What `submit` is told of the images of each prompt. Raises InvalidArgument unless there are some, or None, for each."""
    given = as_list(prompts, pairs=pairs)
    if images is None:
        return [{}] * len(given)
    if given and given[0] is prompts:
        return [{"images": images}]
    if not isinstance(images, list | tuple) or len(images) != len(given):
        found = len(images) if isinstance(images, list | tuple) else type(images).__name__
        raise InvalidArgument(f"images must be a list with those of each prompt, got {found} for {len(given)} prompts")
    return [{} if own is None else {"images": own} for own in images]


def grouped(results: list, counts: list[int] | None) -> list:
    """Results of `Jobs.scoring`'s requests: a list for each prompt, if there were several."""
    if counts is None:
        return results
    following = iter(results)
    return [list(islice(following, count)) for count in counts]


def _with_continuations(prompts: list, continuations) -> list[tuple[object, list]]:
    """[(prompt, its continuations)]. Raises InvalidArgument unless there is a list for every prompt."""
    lists = list(continuations)
    if len(lists) != len(prompts):
        raise InvalidArgument(f"continuations has {len(lists)} lists for {len(prompts)} prompts")
    for place, given in enumerate(lists):
        if isinstance(given, str) or not hasattr(given, "__iter__"):
            kind = type(given).__name__
            raise InvalidArgument(f"continuations must be a list for each prompt, got {kind} at {place}")
    return [(prompt, list(given)) for prompt, given in zip(prompts, lists)]


def _each(name: str, value, prompts: list) -> list:
    """An option for every prompt: a list has one per prompt, anything else is for all."""
    if not isinstance(value, (list, tuple)):
        return [value] * len(prompts)
    if len(value) != len(prompts):
        raise InvalidArgument(f"{name} has {len(value)} entries for {len(prompts)} prompts")
    return list(value)


def _finish_all(engine, states: list[RequestState], progress: bool) -> None:
    with tqdm(total=len(states), disable=not progress, unit="request", dynamic_ncols=True) as bar:
        while not all(state.finished for state in states):
            engine.step()
            done = sum(state.finished for state in states)
            if done > bar.n:
                bar.set_postfix(tokens=sum(state.num_output for state in states), refresh=False)
                bar.update(done - bar.n)
