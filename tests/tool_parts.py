"""Servers whose model writes what a test wants, in any format of calls and reasoning."""

from __future__ import annotations

import contextlib

import openai
import torch
from server_parts import EOS, MODEL, serving
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

from hf_paged import AsyncEngine, Engine, EngineConfig
from hf_paged.integrations.openai import Settings, create_app

SPECIAL = [
    *(
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "[THINK]",
        "[/THINK]",
        "<|python_tag|>",
        "<|python_start|>",
        "<|python_end|>",
    ),
    *(
        "<|tool_call_start|>",
        "<|tool_call_end|>",
        "<|start|>",
        "<|channel|>",
        "<|message|>",
        "<|constrain|>",
        "<|end|>",
    ),
    *(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
    ),
]
TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% if reasoning_effort %}({{ reasoning_effort }}){% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% if message.reasoning_content %}#{{ message.reasoning_content }}#{% endif %}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}:"
    "{% for key, value in call.function.arguments.items() %}{{ key }}={{ value }};{% endfor %}{% endfor %}"
    "{% if message.role == 'tool' %}@{{ message.name }}{% endif %}.{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{{ opening }}{% endif %}"
)
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Oslo", "São Paulo"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["city"],
    "additionalProperties": False,
}
ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "exact": {"type": "boolean"}},
    "required": ["a", "exact"],
    "additionalProperties": False,
}
SCHEMAS = {"get_weather": WEATHER, "add": ADD}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "It does.", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
# a description of answers for transformers' own parser
DESCRIBED = {
    "start_anchor": "<assistant>",
    "fields": {
        "content": {"content": "text"},
        "thinking": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "content": "json",
            "repeats": True,
            "transform": {"type": "function", "function": "{content}"},
        },
    },
}
MESSAGES = [{"role": "user", "content": "Weather?"}]


class Script:
    """Has every answer begin with these tokens, whatever the model would say."""

    def __init__(self, tokens: list[int]):
        self._tokens = tokens
        self._prompt: int | None = None

    def __call__(self, token_ids, logits: torch.Tensor) -> torch.Tensor:
        if self._prompt is None:
            self._prompt = len(token_ids)
        place = len(token_ids) - self._prompt
        if place >= len(self._tokens):
            return logits
        forced = torch.full_like(logits, -torch.inf)
        forced[self._tokens[place]] = 0
        return forced


class ScriptedEngine(AsyncEngine):
    """
    Attributes:
        script: what all answers say; None: what the model says.
        beginning: what they begin with.
    """

    script: str | None = None
    beginning: str | None = None

    def stream(self, prompt, params=None, **options):
        text = self.beginning if self.script is None else self.script
        if text is not None:
            tokens = self.engine.tokenizer(text, add_special_tokens=False).input_ids
            options["logits_processors"] = [Script(tokens if self.script is None else [*tokens, EOS])]
        return super().stream(prompt, params, **options)


def make_engine() -> ScriptedEngine:
    tokenizer = tiny_tokenizer(320)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = TEMPLATE
    model = tiny_model("llama", vocab_size=320 + len(SPECIAL))
    model.generation_config.eos_token_id = EOS
    return ScriptedEngine(Engine(model, tokenizer, EngineConfig(max_num_seqs=8)))


@contextlib.contextmanager
def client_of(engine, **settings):
    """The real client of a server with these settings."""
    with serving(create_app(engine, Settings(model_name=MODEL, **settings))) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            yield client


def streamed(client, **options):
    """A streamed answer put together by its deltas alone: (content, reasoning, [(id, name, arguments)], reason)."""
    content, reasoning, calls, reason = None, None, [], None
    for chunk in client.chat.completions.create(stream=True, **options):
        for choice in chunk.choices:
            assert reason is None
            delta = choice.delta
            if delta.content is not None:
                content = (content or "") + delta.content
            if getattr(delta, "reasoning_content", None) is not None:
                assert delta.reasoning == delta.reasoning_content
                reasoning = (reasoning or "") + delta.reasoning_content
            for call in delta.tool_calls or ():
                if call.id is not None:
                    assert call.index == len(calls) and call.type == "function"
                    calls.append([call.id, call.function.name, ""])
                calls[call.index][2] += call.function.arguments
            reason = choice.finish_reason
    return content, reasoning, calls, reason
