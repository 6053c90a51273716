"""A real uvicorn server on a real socket, over a tiny model."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
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


class Running:
    """A server's process, whose log is read line by line."""

    def __init__(self, checkpoint, *options: str, **environment: str):
        command = [sys.executable, "-m", "hf_paged", "serve", str(checkpoint), "--port", "0", "--log-format", "json"]
        env = os.environ | {"HF_PAGED_SERVED_MODEL_NAME": MODEL, "HF_PAGED_THREADS": "1"} | environment
        self.process = subprocess.Popen([*command, *options], env=env, stderr=subprocess.PIPE, text=True)
        self.lines: list[dict] = []

    def wait_for(self, message: str) -> dict:
        for line in self.process.stderr:
            self.lines.append(json.loads(line))
            if self.lines[-1]["message"] == message:
                return self.lines[-1]
        raise AssertionError(f"it ended without {message!r}: {self.lines}")

    def url(self) -> str:
        [at] = self.wait_for("listening")["at"]
        return at

    def ended(self) -> int:
        with self.process.stderr:
            self.lines += [json.loads(line) for line in self.process.stderr]
        return self.process.wait(timeout=60)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()
