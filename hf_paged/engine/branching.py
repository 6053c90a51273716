"""Going on from earlier: requests that begin in the middle of another's output, and requests that go back in their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..base.branch import Branch
from ..base.errors import InvalidArgument, UnsupportedOption
from ..base.sampling_params import SamplingParams
from ..base.types import Logprob, RequestOutput
from ..core.media import bidirectional_blocks
from ..core.request import Sequence
from ..runtime.media import Media
from ..runtime.sampler import derive_seed

if TYPE_CHECKING:
    from ..core.scheduler import Scheduler
    from .intake import Intake
    from .jump import JumpAhead
    from .lock import FairLock
    from .open_requests import OpenRequests
    from .request_state import RequestState
    from .speculation import Speculator


@dataclass(frozen=True, slots=True)
class Origin:
    """What a request was asked beside its prompt, as far as it decides keys and values; and how it was sampled.

    `media` is None when the request has ended and had some: who keeps its output shall not keep its images.
    """

    params: SamplingParams
    adapter: str | None
    cache_salt: str | bytes | None
    media: Media | None
    has_forward_hooks: bool


class Branching:
    """What BatchEngine offers of this."""

    _intake: Intake
    _jump: JumpAhead
    _lock: FairLock
    _requests: OpenRequests
    _scheduler: Scheduler
    _speculator: Speculator | None

    def fork(self, request: str | RequestOutput, position: int | None = None, *, index: int = 0) -> Branch:
        """Where a request can be gone on from: after the first `position` tokens of its prompt and one of its outputs.

        Any number of requests may be added with the Branch as their prompt, now or later, each with parameters of its own
        (default: those of this request, with an n of 1). What is in the cache of the tokens before `position` they share;
        the rest is computed again. The request itself goes on.

        Args:
            request: the id of an unfinished request, or the RequestOutput of any; not one that was pickled or copied.
            position: in tokens, prompt included; within the prompt, too. None: all there are now.
            index: which of its completions.

        Raises:
            InvalidArgument: there is no such request or completion, or no such position; or it lies within an image whose
                tokens are computed together.
            UnsupportedOption: the request is one to embed, score or classify, or has forward hooks, whose changes nobody
                shares; or it had images and has ended, as these are kept no longer.
        """
        with self._lock:
            output = request if isinstance(request, RequestOutput) else self._unfinished(request).output
            return branch_of(output, position, index)

    def roll_back(
        self, request_id: str, position: int, params: SamplingParams | None = None, *, index: int = 0
    ) -> None:
        """Let an unfinished request go on from an earlier position, as if it had never come further.

        Its RequestOutput gets a new CompletionOutput with the tokens, text and log-probabilities up to there. Penalties, stop
        strings, the form of structured outputs and the draws of its seed are as they were at that position: with the
        same parameters, and nobody's function in between, the same tokens follow again. May be called between two steps, as
        in `on_output`, but from no processor, criterion or hook.

        Args:
            position: how many tokens stay, prompt included; all of the prompt does.
            params: how to go on from there, for requests with an n of 1; default as before.
            index: which of its completions.

        Raises:
            InvalidArgument: there is no such unfinished request, completion or position; the tokens that stay would have
                ended it under `params`, or it could not run under them.
            UnsupportedOption: its tokens have been given out one by one (`AsyncEngine.stream`), or it has none.
        """
        with self._between_steps():
            state = self._unfinished(request_id)
            if state.output.origin is None:
                raise UnsupportedOption(f"request_id {request_id!r}: {_NO_TOKENS}")
            if state.streamed:
                raise UnsupportedOption(
                    f"request_id {request_id!r}: what `stream` gave out cannot be taken back; read it with `generate`"
                )
            kept = branch_of(state.output, position, index, within_output=True)
            sequence = _unfinished_sequence(state, index)
            if sequence.pending_forks and len(kept) < len(sequence.token_ids):
                raise InvalidArgument("position: the completions of this request have not begun; roll back when they have")
            if params is not None:
                self._change(state, kept, params)
            self._scheduler.roll_back(sequence, len(kept))
            state.restart(sequence, kept)
            if self._speculator is not None:
                self._speculator.forget(sequence.seq_id)
            self._requests.touch(state)

    def _unfinished(self, request_id: str) -> RequestState:
        state = self._requests.get(request_id) if isinstance(request_id, str) else None
        if state is None or state.finished:
            raise InvalidArgument(
                f"request {request_id!r} is no unfinished one; of one that has ended, `fork` takes the RequestOutput"
            )
        return state

    def _change(self, state: RequestState, kept: Branch, params: SamplingParams) -> None:
        """The request goes on after `kept` under other parameters."""
        old = state.params
        if not isinstance(params, SamplingParams) or old.n != 1 or params.n != 1:
            raise InvalidArgument("params must be SamplingParams with an n of 1, of a request that has an n of 1")
        if params.prompt_logprobs != old.prompt_logprobs:
            raise InvalidArgument("params: prompt_logprobs cannot change, the prompt has been computed")
        origin = state.output.origin
        again = self._intake.request(kept, params, hooks=state.hooks)
        self._scheduler.check(again.request)
        self._jump.forget(state)
        state.take_over(again)
        state.output.origin = replace(origin, params=params)
        self._jump.admitted(state)
        if state.seed is None:
            self._count += 1
            state.seed = derive_seed(self.config.seed, self._count)


def branch_of(output: RequestOutput, position: int | None, index: int, *, within_output: bool = False) -> Branch:
    """See `Branching.fork`. With `within_output` the whole prompt must stay."""
    origin: Origin | None = getattr(output, "origin", None)
    if origin is None:
        raise UnsupportedOption(f"request {output.request_id!r}: {_NO_TOKENS}")
    if origin.has_forward_hooks and not within_output:
        raise UnsupportedOption(
            f"request {output.request_id!r} has forward_hooks: what they changed is nobody else's, so it cannot be forked"
        )
    if origin.media is None:
        raise UnsupportedOption(
            f"request {output.request_id!r} had images, which are not kept when a request has ended; fork it while it runs"
        )
    prompt = output.prompt_token_ids
    completion = next((one for one in output.outputs if one.index == index), None)
    if completion is None and not (index == 0 and not output.outputs):
        raise InvalidArgument(f"index must name a completion that has begun, got {index!r}")
    tokens = [] if completion is None else completion.token_ids
    total, least = len(prompt) + len(tokens), len(prompt) if within_output else 1
    position = total if position is None else position
    if not isinstance(position, int) or isinstance(position, bool) or not least <= position <= total:
        raise InvalidArgument(f"position must be between {least} and the {total} tokens there are, got {position!r}")
    num_output = max(0, position - len(prompt))
    entries = None if completion is None or completion.logprobs is None else completion.logprobs[:num_output]
    return Branch(
        prompt_token_ids=prompt[:position],
        output_token_ids=tokens[:num_output],
        logprobs=entries,
        prompt=output.prompt if position >= len(prompt) else None,
        params=replace(origin.params, n=1),
        adapter=origin.adapter,
        cache_salt=origin.cache_salt,
        media=cut(origin.media, position) if position < len(prompt) else origin.media,
    )


_NO_TOKENS = (
    "there is nothing to go on from: it brings no tokens, is a row of `generate`, or this is a copy of its output; a Branch can "
    "be made of any tokens"
)


def cut(media: Media, position: int) -> Media:
    """The images among the first `position` tokens of a prompt. Raises InvalidArgument if it lies within one."""
    blocks = [(span.start, span.end) for span in media.spans] + list(bidirectional_blocks(media.spans))
    for first, end in blocks:
        if first < position < end:
            raise InvalidArgument(f"position {position} lies within an image, whose tokens are {first} to {end - 1}")
    spans = tuple(span for span in media.spans if span.end <= position)
    items = {span.key: media.items[span.key] for span in spans}
    return Media(spans, items, None if media.shifts is None else media.shifts[:, :position])


def checked_branch(branch: Branch, given: Mapping[str, object]) -> Branch:
    """Raise InvalidArgument for a Branch that is none, or if options are given that it has itself."""
    for name, value in given.items():
        if value is not None:
            raise InvalidArgument(f"{name}: the prompt is a Branch, which has its own")
    if not isinstance(branch.media, Media | None) or not isinstance(branch.params, SamplingParams | None):
        raise InvalidArgument("prompt: the media and params of a Branch are what `fork` gave it")
    return branch


def kept_logprobs(branch: Branch, wanted: int | None) -> list[dict[int, Logprob]] | None:
    """Log-probabilities of a branch's output tokens as a request has them that wants `wanted`.

    Raises InvalidArgument if the branch does not have them.
    """
    tokens, entries = branch.output_token_ids, branch.logprobs
    if wanted is None or not len(tokens):
        return None if wanted is None else []
    if entries is not None and len(entries) == len(tokens):
        if branch.params is not None and wanted == branch.params.logprobs:
            return list(entries)
        if wanted == 0:
            return [{token: entry[token]} for token, entry in zip(tokens, entries, strict=True)]
    has = None if branch.params is None or entries is None else branch.params.logprobs
    raise InvalidArgument(f"logprobs {wanted}: those of the output tokens that stay are not known; the request had {has}")


def _unfinished_sequence(state: RequestState, index: int) -> Sequence:
    """One of a request's sequences. Raises InvalidArgument if it has ended."""
    sequence = next(one for one in state.request.sequences if one.index == index)
    if sequence.finish_reason is not None:
        raise InvalidArgument(f"index {index}: that completion has ended; fork it")
    return sequence
