"""`hf-paged chat`: a conversation in the terminal.

The whole conversation is the prompt of every turn; its blocks are still in the prefix cache, so a turn costs only its
own new tokens.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .common import UserError, chat_prompt, one_line, open_engine

HELP = "/reset forgets the conversation, /exit leaves, Ctrl-C stops an answer"


def run_chat(prompt: str | None, system: str | None, sampling: dict, loading: dict) -> None:
    from hf_paged.base.sampling_params import SamplingParams

    params = SamplingParams(**sampling)
    with open_engine(**loading) as (model, tokenizer, engine):
        chat = Chat(engine, tokenizer, params, system)
        if prompt is not None:
            chat.turn(prompt)
            return
        if sys.stdin.isatty():
            name = getattr(model.config, "_name_or_path", "") or type(model).__name__
            print(f"{name} on {model.device}. {HELP}.")
        _converse(chat)


def _converse(chat: Chat) -> None:
    while True:
        try:
            line = input("\n> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print(f"\n({HELP})")
            continue
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            chat.reset()
            print("(the conversation is forgotten)")
        elif line.startswith("/"):
            print(f"(unknown command {line}; {HELP})")
        elif line:
            try:
                chat.turn(line)
            except ValueError as error:  # too long, or refused by the template: the conversation goes on
                print(f"({one_line(error)})")


class Chat:
    """A conversation with an engine. `turn` adds one question and its answer, or nothing if it raises."""

    def __init__(self, engine, tokenizer, params, system: str | None = None):
        self.engine, self.tokenizer, self.params = engine, tokenizer, params
        self.system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict] = []

    def reset(self) -> None:
        self.messages = []

    def turn(self, text: str, write: Callable[[str], None] | None = None) -> str:
        """Stream the answer to `text`; returns what was answered, up to where Ctrl-C stopped it."""
        write = write or _write
        asked = [*self.messages, {"role": "user", "content": text}]
        request_id = self.engine.add(chat_prompt(self.engine, self.tokenizer, [*self.system, *asked]), self.params)
        answer = ""
        with interrupts() as interrupted:
            while self.engine.has_unfinished():
                for output in self.engine.step():
                    if output.request_id != request_id:
                        continue
                    if output.error is not None:
                        raise UserError(one_line(output.error)) from output.error
                    whole = output.outputs[0].text
                    write(whole[len(answer) :])
                    answer = whole
                if interrupted():
                    self.engine.abort(request_id)
                    write(" ...")
                    break
        write("\n")
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return answer


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Within it Ctrl-C is noted instead of raised, so that no step is torn; yields a function that asks for it."""
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(True))
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)
