"""What the routes share that want no tokens: fields of their requests, and how their texts run."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import Response
from pydantic import BaseModel, Field, StrictBool, StrictInt, StrictStr

from ...base.errors import InvalidArgument, RequestTooLarge
from ...base.tasks import ClassifyParams, EmbedParams, TaskOutput
from .cutting import cannot_cut
from .errors import Refused
from .protocol import RequestId, Strict
from .service import Service, Usage, jobs_of, new_id

Text = str | list[int] | tuple[str, str]


class TaskRequest(Strict):
    """
    Attributes:
        truncate_prompt_tokens: cut texts to so many tokens, on the side the tokenizer says; -1: to as many as fit.
    """

    model: StrictStr | None = None
    user: StrictStr | None = None
    # beyond OpenAI's
    truncate_prompt_tokens: Annotated[StrictInt, Field(ge=-1)] | None = None
    add_special_tokens: StrictBool = True
    priority: StrictInt = 0
    cache_salt: StrictStr | None = None
    request_id: RequestId | None = None


class Tokens(BaseModel):
    """What `service.Usage` tells."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class TaskRun:
    """One request's texts on their way through the engine.

    Args:
        kind: what its id begins with.

    Attributes:
        id: of the answer.
        model: what answers: the model, or the adapter that the request names.
        usage: tokens, as far as they were computed.
    """

    def __init__(self, service: Service, body: TaskRequest, kind: str):
        most = service.max_model_len
        if body.truncate_prompt_tokens == 0 or (body.truncate_prompt_tokens or 0) > most:
            raise cannot_cut(f"it must be -1, or from 1 to {most}")
        self._service, self._body = service, body
        self._adapter = service.adapter(body.model)
        self.model = self._adapter or service.model_name
        self.id = new_id(kind) if body.request_id is None else body.request_id
        self.usage = Usage()

    async def results(self, texts: list[Text], params: EmbedParams | ClassifyParams, field: str) -> list[TaskOutput]:
        """What comes of each text; the first error ends all.

        Args:
            field: of the request, where the texts are from.
        """
        most = self._service.settings.limits.prompts
        if len(texts) > most:
            raise Refused(f"{field}: {len(texts)} are more than the {most} allowed", param=field, code="too_many")
        if not texts:
            raise Refused(f"{field} is empty", param=field, code="invalid_value")
        prompts = await asyncio.to_thread(self._tokens, texts, field)
        user = self._service.share(self._body)
        jobs = jobs_of(prompts, params, self._body, request_id=self.id, user=user, adapter=self._adapter)
        try:
            wholes = await self._service.finished(jobs, self.usage)
        except RequestTooLarge as error:
            raise Refused(_named(error, field), param=field, code="context_length_exceeded") from error
        except InvalidArgument as error:
            if str(error).startswith("prompt"):
                raise Refused(_named(error, field), param=field, code="invalid_value") from error
            raise
        return [whole.result for whole in wholes]

    def _tokens(self, texts: list[Text], field: str) -> list[list[int]]:
        most = self._body.truncate_prompt_tokens
        if most is None:  # else they are cut to what fits
            for text in texts:
                if not isinstance(text, list):
                    self._service.check_length(field, text if isinstance(text, str) else "".join(text))
        if most == -1:
            most = self._service.max_model_len
        return [self._cut(text, most) for text in texts]

    def _cut(self, text: Text, most: int | None) -> list[int]:
        tokenizer, special = self._service.tokenizer, self._body.add_special_tokens
        if isinstance(text, list):
            return text if most is None else text[-most:] if tokenizer.truncation_side == "left" else text[:most]
        parts = [text] if isinstance(text, str) else text
        if most is None:
            return tokenizer(*parts, add_special_tokens=special).input_ids
        return self._service.cutter.cut(parts, most, special)


def _named(error: Exception, field: str) -> str:
    return str(error).replace("prompt", field, 1)


async def answered(model: BaseModel) -> Response:
    """A large answer, written by a thread."""
    return Response(await asyncio.to_thread(model.model_dump_json), media_type="application/json")
