"""From a client's request to SamplingParams."""

from __future__ import annotations

from ...base.sampling_params import SamplingParams
from .errors import Refused
from .protocol import Generation, ResponseFormat
from .settings import Limits

# Fields that SamplingParams calls the same.
_SAME = (
    *("n", "presence_penalty", "frequency_penalty", "seed", "min_tokens", "stop_token_ids", "ignore_eos", "bad_words"),
    *("include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens", "allowed_token_ids"),
    "prompt_logprobs",
)
_FROM_MODEL = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def defaults_of(generation_config) -> dict:
    """What a request that says nothing gets: what the model's makers recommend, else no rule at all."""
    if not getattr(generation_config, "do_sample", False):
        own = {"repetition_penalty": getattr(generation_config, "repetition_penalty", None)}
    else:
        own = {name: getattr(generation_config, name, None) for name in _FROM_MODEL}
    return {"temperature": 1.0} | {name: value for name, value in own.items() if value is not None}


def sampling_params(
    request: Generation, defaults: dict, limits: Limits, *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """
    Args:
        defaults: see `defaults_of`.
        max_tokens, logprobs: of this request, whose fields for them depend on the kind of request.

    Raises:
        Refused: it asks for more than `limits` allow, or fields that exclude each other.
        InvalidArgument: a value is wrong.
    """
    check_limits(request, limits, logprobs)
    values = {name: getattr(request, name) for name in _SAME}
    values |= {name: getattr(request, name) for name in _FROM_MODEL}
    values = defaults | {name: value for name, value in values.items() if value is not None}
    stop = [request.stop] if isinstance(request.stop, str) else request.stop
    return SamplingParams(
        **values,
        stop=stop or None,
        max_tokens=max_tokens,
        logprobs=logprobs,
        logit_bias=_logit_bias(request.logit_bias),
        structured_outputs=_form(request),
    )


def check_limits(request: Generation, limits: Limits, logprobs: int | None) -> None:
    stops = [] if request.stop is None else [request.stop] if isinstance(request.stop, str) else request.stop
    for name, value, most in (
        ("n", request.n, limits.completions),
        ("stop", len(stops), limits.stop),
        ("stop_token_ids", len(request.stop_token_ids or ()), limits.stop),
        ("logit_bias", len(request.logit_bias or ()), limits.logit_bias),
        ("allowed_token_ids", len(request.allowed_token_ids or ()), limits.allowed_token_ids),
        ("logprobs", logprobs or 0, limits.logprobs),
        ("prompt_logprobs", request.prompt_logprobs or 0, limits.logprobs),
    ):
        if value > most:
            raise Refused(f"{name}: {value} is more than the {most} this server allows", param=name, code="too_many")


def _logit_bias(bias: dict | None) -> dict[int, float] | None:
    """OpenAI's keys are token ids as text."""
    if not bias:
        return None
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) < 12):
            raise Refused(f"logit_bias: {key!r} is no token id", param="logit_bias", code="invalid_value")
    return {int(key): value for key, value in bias.items()}


def _form(request: Generation) -> dict | None:
    form = request.structured_outputs
    if form is not None:
        if request.response_format is not None and request.response_format.type != "text":
            raise Refused("response_format and structured_outputs exclude each other", param="structured_outputs")
        return form.model_dump(by_alias=True, exclude_none=True)
    return None if request.response_format is None else _format(request.response_format)


def _format(asked: ResponseFormat) -> dict | None:
    if asked.type == "text":
        return None
    if asked.type == "json_object":
        return {"json_object": True}
    if asked.json_schema is None:
        raise Refused("response_format.json_schema is missing", param="response_format.json_schema")
    schema = asked.json_schema.schema_
    return {"json_object": True} if schema is None else {"json": schema}
