"""What clients may ask of /v1/responses. Fields are OpenAI's, and vLLM's for what OpenAI has no field."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr

from ..protocol import Effort, Function, JSONSchema, Many, Number, Strict, Unread

Status = Literal["in_progress", "completed", "incomplete"]
Id = Annotated[StrictStr, Field(min_length=1, max_length=128)]


class InputText(Strict):
    type: Literal["input_text"]
    text: StrictStr


class InputImage(Strict):
    """`detail` as in chat completions' ImageURL. There are no files here."""

    type: Literal["input_image"]
    image_url: StrictStr
    detail: Literal["auto", "high"] = "auto"
    file_id: None = None


class OutputText(Strict):
    """As it was answered. Its log-probabilities and annotations say nothing to the model."""

    type: Literal["output_text"]
    text: StrictStr
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputMessage(Strict):
    """What somebody said: the assistant, too."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: StrictStr | Many[Annotated[InputText | InputImage | OutputText, Field(discriminator="type")]]
    id: Id | None = None
    status: Status | None = None


class FunctionCall(Strict):
    type: Literal["function_call"]
    call_id: Id
    name: StrictStr
    arguments: StrictStr
    id: Id | None = None
    status: Status | None = None


class FunctionCallOutput(Strict):
    type: Literal["function_call_output"]
    call_id: Id
    output: StrictStr | Many[InputText]
    id: Id | None = None
    status: Status | None = None


class ReasoningText(Strict):
    type: Literal["reasoning_text"]
    text: StrictStr


class ReasoningItem(Strict):
    """What the assistant thought. There are no summaries here, and nothing is encrypted."""

    type: Literal["reasoning"]
    id: Id | None = None
    summary: list[Any] = Field([], max_length=0)
    content: Many[ReasoningText] | None = None
    encrypted_content: None = None
    status: Status | None = None


Item = InputMessage | FunctionCall | FunctionCallOutput | ReasoningItem


class FunctionTool(Function):
    """Tools that OpenAI's servers run themselves are refused by name."""

    type: Literal["function"]


class NamedTool(Strict):
    type: Literal["function"]
    name: StrictStr


class AllowedTools(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Many[NamedTool] = Field(min_length=1)


class TextFormat(Strict):
    type: Literal["text"]


class JSONObjectFormat(Strict):
    type: Literal["json_object"]


class JSONSchemaFormat(JSONSchema):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class TextOptions(Strict):
    format: Annotated[TextFormat | JSONObjectFormat | JSONSchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(Strict):
    effort: Effort | None = None


class StreamOptions(Strict):
    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(Unread):
    """What says nothing to the model is told again with the answer."""

    input: StrictStr | Many[Item]
    model: StrictStr | None = None
    instructions: StrictStr | None = None
    previous_response_id: StrictStr | None = None
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    background: StrictBool = False
    store: StrictBool | None = None
    max_output_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0)] | None = None
    tools: Many[FunctionTool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: StrictBool = True
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: Literal["disabled"] | None = None
    # beyond OpenAI's
    top_k: StrictInt | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    presence_penalty: Number = 0
    frequency_penalty: Number = 0
    seed: StrictInt | None = None
    stop: StrictStr | Many[StrictStr] | None = None
    min_tokens: StrictInt = 0
    ignore_eos: StrictBool = False
    chat_template_kwargs: dict[str, Any] | None = None
    priority: StrictInt = 0
    cache_salt: StrictStr | None = None

    @property
    def num_logprobs(self) -> int | None:
        """How many most likely tokens to tell beside each; None: tell nothing."""
        return (self.top_logprobs or 0) if self.include else None


class Retrieve(Strict):
    """Of the query."""

    stream: bool = False
    starting_after: Annotated[int, Field(ge=0)] | None = None


class ListItems(Strict):
    """Of the query."""

    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
