"""A real uvicorn server on a real socket, over a tiny model."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import uvicorn
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

MODEL = "tiny"
EOS = 2
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_model():
    model = tiny_model("llama", vocab_size=320)
    model.generation_config.eos_token_id = EOS
    return model


def make_tokenizer():
    tokenizer = tiny_tokenizer(320)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@contextlib.contextmanager
def serving(app):
    """The base address of `app` while it is served."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
