"""A list of prompts, run to their end on an engine."""

from __future__ import annotations

from tqdm.auto import tqdm

from ..base.errors import InvalidArgument
from ..base.types import RequestOutput
from .request_state import RequestState


def run_job(engine, prompts, params, progress: bool) -> list[RequestOutput]:
    """See `BatchEngine.generate`."""
    single = isinstance(prompts, str) or (
        isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], (int, dict))
    )
    prompts = [prompts] if single else list(prompts)
    if isinstance(params, (list, tuple)):
        if len(params) != len(prompts):
            raise InvalidArgument(f"params has {len(params)} entries for {len(prompts)} prompts")
    else:
        params = [params] * len(prompts)
    states: list[RequestState] = []
    try:
        for prompt, one in zip(prompts, params):
            states.append(engine.submit_when_possible(prompt, one))
        _finish_all(engine, states, progress)
    finally:
        for state in states:
            engine.release(state)
    outputs = [state.output for state in states]
    failed = next((output.error for output in outputs if output.error is not None), None)
    if failed is not None:
        failed.outputs = outputs
        raise failed
    return outputs


def _finish_all(engine, states: list[RequestState], progress: bool) -> None:
    with tqdm(total=len(states), disable=not progress, unit="request", dynamic_ncols=True) as bar:
        while not all(state.finished for state in states):
            engine.step()
            done = sum(state.finished for state in states)
            if done > bar.n:
                bar.set_postfix(tokens=sum(state.num_output for state in states), refresh=False)
                bar.update(done - bar.n)
