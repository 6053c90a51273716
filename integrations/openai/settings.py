"""How a server behaves: what it is called, what it takes, who may use it."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field

from ...base.errors import InvalidArgument
from .auth import check_keys
from .media_hosts import AllowedHosts
from .parsing import check_names

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")  # as browsers send it: no path, not even /


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that one request may ask for. What is beyond is answered 400 (413 for bytes), by name.

    Attributes:
        body_bytes: of a request's body.
        completions: n, and prompts times n.
        prompts: in one request.
        messages: in one conversation.
        stop: stop strings and stop tokens.
        logit_bias: entries.
        allowed_token_ids: tokens of that field.
        logprobs: most likely tokens to report beside each.
        image_bytes: of all images of one request, as they are encoded (PNG, JPEG).
        tools: functions of one request.
        tool_characters: of the schemas and descriptions of all of them.
        adapters: loaded at a time, where requests may load them.
        adapter_rank: of such an adapter.
        characters_per_token: of a text, for each token of the longest sequence: what is longer could not fit, and is not
            even cut into tokens.
    """

    body_bytes: int = 16 * 2**20
    completions: int = 128
    prompts: int = 1024
    messages: int = 4096
    stop: int = 16
    logit_bias: int = 1024
    allowed_token_ids: int = 65_536
    logprobs: int = 20
    image_bytes: int = 32 * 2**20
    tools: int = 128
    tool_characters: int = 256 * 1024
    adapters: int = 64
    adapter_rank: int = 256
    characters_per_token: int = 64


@dataclass(frozen=True, kw_only=True)
class Settings:
    """
    Attributes:
        model_name: what clients call the model; default its name or path.
        api_keys: one of them has to come with every request, as `Authorization: Bearer KEY`; none: anybody may ask.
        limits: see Limits.
        cors_origins: of the web pages whose scripts may ask, such as "https://example.org"; "*" is all.
        request_timeout: seconds after which a request ends with an error; None: never. A request's header
            X-Request-Timeout may ask for less.
        body_timeout: seconds in which a request's body must have come.
        default_max_tokens: of completions that name none; None: as many as fit. (Chats always get as many as fit.)
        tool_parser: how the model writes calls of functions: a name of `parsing.CALL_FORMATS`, "none", or "auto", which goes by
            its chat template.
        reasoning_parser: how it writes what it thinks first: the same of `parsing.REASONING_FORMATS`.
        request_chat_templates: whether a request may bring a chat template of its own, which is a program.
        stored_responses: most answers of /v1/responses that are kept, in memory; 0: none.
        stored_response_bytes: of all of them, as JSON.
        response_tag: letters and digits that the ids of responses begin with, after "resp_". Where several servers share an
            address, what stands before them can tell by it which one has a response.
        enable_adapters: whether requests may load and unload adapters, for which the server reads folders they name.
        page: whether there is a page to chat with, at `/`. Anybody may load it; what it asks needs a key like all else.
        allowed_media_hosts: where images may be fetched from that requests name by http or https; see
            `media_hosts.AllowedHosts`. None: images come within requests, as data URLs.
        media_timeout: seconds in which such an image must have come.
        log_client_address: whether the log tells who asked.
    """

    model_name: str | None = None
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    request_timeout: float | None = None
    body_timeout: float = 60.0
    default_max_tokens: int | None = 16
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    request_chat_templates: bool = False
    stored_responses: int = 1024
    stored_response_bytes: int = 256 * 2**20
    response_tag: str = ""
    enable_adapters: bool = False
    page: bool = True
    allowed_media_hosts: tuple[str, ...] = ()
    media_timeout: float = 10.0
    log_client_address: bool = False

    def __post_init__(self):
        check_keys(self.api_keys)
        AllowedHosts(self.allowed_media_hosts)
        check_names(self.tool_parser, self.reasoning_parser)
        if self.request_chat_templates and sys.platform != "linux":
            raise InvalidArgument("request_chat_templates needs Linux, which bounds the time and memory of a process")
        if self.request_timeout is not None and not self.request_timeout > 0:
            raise InvalidArgument(f"request_timeout must be a positive number of seconds, got {self.request_timeout!r}")
        for name in ("body_timeout", "media_timeout"):
            if not getattr(self, name) > 0:
                raise InvalidArgument(f"{name} must be a positive number of seconds, got {getattr(self, name)!r}")
        for name in ("stored_responses", "stored_response_bytes"):
            if getattr(self, name) < 0:
                raise InvalidArgument(f"{name} must not be negative, got {getattr(self, name)}")
        if not re.fullmatch(r"[A-Za-z0-9]{0,64}", self.response_tag):
            raise InvalidArgument(f"response_tag must be up to 64 letters and digits, got {self.response_tag!r}")
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise InvalidArgument(f"cors_origins: {origin!r} is no origin; one looks like https://example.org, and * is all")
