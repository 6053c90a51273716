"""From messages to the tokens of a prompt, by the model's chat template."""

from __future__ import annotations

from jinja2 import TemplateError

from .errors import Refused
from .protocol import Message
from .service import Service


def chat_tokens(
    service: Service,
    messages: list[Message],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    chat_template: str | None = None,
    chat_template_kwargs: dict | None = None,
    documents: list[dict] | None = None,
    tools: list[dict] | None = None,
) -> list[int]:
    """Runs the template, which may take a while. Raises Refused, naming the field at fault."""
    limit = service.settings.limits.messages
    if len(messages) > limit:
        raise Refused(f"messages: {len(messages)} are more than the {limit} allowed", param="messages", code="too_many")
    if chat_template is not None and not service.settings.request_chat_templates:
        raise Refused("chat_template: this server takes none from requests", param="chat_template", code="not_allowed")
    if chat_template is None and not getattr(service.tokenizer, "chat_template", None):
        raise Refused("messages: this model has no chat template", param="messages", code="no_chat_template")
    options = dict(chat_template_kwargs or {})
    reserved = options.keys() & {"conversation", "tokenize", "return_dict", "return_tensors", "padding", "truncation"}
    if reserved:
        name = f"chat_template_kwargs.{min(reserved)}"
        raise Refused(f"{name} is not the template's", param=name, code="not_allowed")
    if continue_final_message:
        add_generation_prompt = False
    try:
        text = service.tokenizer.apply_chat_template(
            [_plain(message) for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template=chat_template,
            documents=documents,
            tools=tools,
            **options,
        )
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise Refused(f"messages: the chat template refuses them: {error}", param="messages", code="template") from error
    return service.tokenizer(text, add_special_tokens=False).input_ids


def _plain(message: Message) -> dict:
    """A message as templates read it: its text in one string, arguments of tools as objects."""
    plain = message.model_dump(exclude_none=True)
    content = message.content
    plain["content"] = content if isinstance(content, str) else "".join(part.text for part in content or ())
    if plain["role"] == "developer":
        plain["role"] = "system"
    return plain
