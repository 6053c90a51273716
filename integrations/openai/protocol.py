"""What clients may ask. Fields are OpenAI's, and vLLM's for what OpenAI has no field; any other is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

Number = StrictFloat | StrictInt
T = TypeVar("T")
Many = Annotated[list[T], Field(fail_fast=True)]  # of a million wrong members, one is complained about


class Strict(BaseModel):
    """No field is converted, none is ignored."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


RequestId = Annotated[StrictStr, Field(max_length=128, pattern=r"^[A-Za-z0-9_.:-]+$")]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]  # of reasoning
Metadata = Annotated[
    dict[Annotated[StrictStr, Field(max_length=64)], Annotated[StrictStr, Field(max_length=512)]], Field(max_length=16)
]


class Unread(Strict):
    """What says nothing to a model, and of which a server like this keeps nothing.

    `safety_identifier` and `user` tell whose share of the engine a request is served from (`Service.share`).
    """

    user: StrictStr | None = None
    metadata: Metadata | None = None
    safety_identifier: StrictStr | None = None
    prompt_cache_key: StrictStr | None = None
    service_tier: Literal["auto", "default"] | None = None


class StreamOptions(Strict):
    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = False


class JSONSchema(Strict):
    name: StrictStr
    description: StrictStr | None = None
    schema_: dict[str, Any] | StrictBool | None = Field(None, alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


class StructuredOutputs(Strict):
    """As `hf_paged.StructuredOutputsParams`."""

    json_: dict[str, Any] | StrictStr | None = Field(None, alias="json")
    json_object: StrictBool | None = None
    regex: StrictStr | None = None
    choice: Many[StrictStr] | None = None
    grammar: StrictStr | None = None
    disable_any_whitespace: StrictBool = False
    whitespace_pattern: StrictStr | None = None


class Generation(Unread):
    """What all requests for text share."""

    model: StrictStr | None = None
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    n: StrictInt = 1
    max_tokens: StrictInt | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    presence_penalty: Number = 0
    frequency_penalty: Number = 0
    seed: StrictInt | None = None
    stop: StrictStr | Many[StrictStr] | None = None
    logit_bias: dict[str, Number] | None = None
    # beyond OpenAI's
    top_k: StrictInt | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    min_tokens: StrictInt = 0
    stop_token_ids: Many[StrictInt] | None = None
    include_stop_str_in_output: StrictBool = False
    ignore_eos: StrictBool = False
    skip_special_tokens: StrictBool = True
    spaces_between_special_tokens: StrictBool = True
    allowed_token_ids: Many[StrictInt] | None = None
    bad_words: Many[StrictStr] | None = None
    prompt_logprobs: StrictInt | None = None
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None
    priority: StrictInt = 0
    cache_salt: StrictStr | None = None
    request_id: RequestId | None = None
    return_token_ids: StrictBool = False


class CompletionRequest(Generation):
    prompt: StrictStr | Many[StrictStr] | Many[StrictInt] | Many[Many[StrictInt]]
    max_tokens: StrictInt | None = None
    logprobs: StrictInt | None = None
    echo: StrictBool = False
    best_of: StrictInt | None = None
    suffix: StrictStr | None = None
    add_special_tokens: StrictBool = True


class TextPart(Strict):
    type: Literal["text"]
    text: StrictStr


class ImageURL(Strict):
    """`detail` "low", a smaller image than the one sent, is not to be had here."""

    url: StrictStr
    detail: Literal["auto", "high"] | None = None


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class FunctionCall(Strict):
    name: StrictStr
    arguments: StrictStr


class ToolCall(Strict):
    id: StrictStr | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: StrictInt | None = None


class Function(Strict):
    name: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class FunctionTool(Strict):
    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    name: StrictStr


class NamedTool(Strict):
    """One function, by its name."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Strict):
    mode: Literal["auto", "required"]
    tools: Many[NamedTool] = Field(min_length=1)


class AllowedToolsChoice(Strict):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class Message(Strict):
    """One message of a conversation. Content parts other than text and images are refused by name.

    `reasoning` and `reasoning_content` are two names of one thing: what the assistant thought.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | Many[Part] | None = None
    name: StrictStr | None = None
    refusal: StrictStr | None = None
    tool_calls: Many[ToolCall] | None = None
    tool_call_id: StrictStr | None = None
    reasoning_content: StrictStr | None = None
    reasoning: StrictStr | None = None

    @property
    def text(self) -> str:
        """All of the content that is text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content or () if isinstance(part, TextPart))

    @property
    def images(self) -> dict[int, ImagePart]:
        """By their place in the content."""
        if isinstance(self.content, str):
            return {}
        return {place: part for place, part in enumerate(self.content or ()) if isinstance(part, ImagePart)}


class ChatCompletionRequest(Generation):
    messages: Many[Message] = Field(min_length=1)
    store: Literal[False] | None = None
    modalities: Many[Literal["text"]] | None = None
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool = False
    top_logprobs: StrictInt | None = None
    tools: Many[FunctionTool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | AllowedToolsChoice | None = None
    parallel_tool_calls: StrictBool = True
    reasoning_effort: Effort | None = None
    # beyond OpenAI's
    add_generation_prompt: StrictBool = True
    continue_final_message: StrictBool = False
    chat_template: StrictStr | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: Many[dict[str, Any]] | None = None
    echo: StrictBool = False
    include_reasoning: StrictBool = True


class TokenizeRequest(Strict):
    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: Many[Message] | None = None
    tools: Many[FunctionTool] | None = None
    add_special_tokens: StrictBool = True
    add_generation_prompt: StrictBool = True
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: StrictBool = False


class DetokenizeRequest(Strict):
    model: StrictStr | None = None
    tokens: Many[StrictInt]
    skip_special_tokens: StrictBool = False
