"""A server as `hf-paged serve` runs it, other clients that ask all the while, and what requests may not leave behind."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import threading
import time

import httpx

from hf_paged.integrations.openai import create_app
from hf_paged.integrations.openai.serve import Process, Server, listening

KEPT = 48 * 2**20  # bytes by which the process may have grown: what allocators and caches keep


def memory() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def served(engine, settings):
    """(host, port) of a server."""
    process = Process(port=0, header_timeout=2)
    with listening(process) as listeners:
        server = Server(create_app(engine, settings), process)
        thread = threading.Thread(target=server.run, kwargs={"sockets": listeners})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        gc.collect()
        gc.freeze()  # as the server's process does: else every look at the memory goes through all libraries
        yield listeners[0].getsockname()
        gc.unfreeze()
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def others_unharmed(address, engine, path: str, body: dict, expected: str):
    """Scope in which another client asks all the while, and once more at its end, and gets the text `expected` each time.

    Afterwards nothing that was asked within is left: no request, no block of the cache, no memory.
    """
    over, wrong, right = threading.Event(), [], []

    def ask() -> None:
        with httpx.Client(base_url=f"http://{address[0]}:{address[1]}", timeout=60) as client:
            while True:
                last = over.is_set()
                answer = client.post(path, json=body)
                text = text_of(answer) if answer.status_code == 200 else answer.text
                (right if text == expected else wrong).append(text)
                if last or wrong:
                    return
                time.sleep(0.05)

    other = threading.Thread(target=ask)
    before = memory()
    other.start()
    try:
        yield
    finally:
        over.set()
        other.join()
    assert not wrong and right
    until = time.monotonic() + 30
    while engine.has_unfinished() and time.monotonic() < until:
        time.sleep(0.01)
    assert not engine.has_unfinished() and engine.stats()["kv_bytes_in_use"] == 0
    engine.check_integrity()
    assert memory() - before < KEPT


def text_of(answer: httpx.Response) -> str:
    """Of the first choice of a completion, of a chat or not."""
    choice = answer.json()["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def post(client, path: str, body) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post(path, content=content, headers={"Content-Type": "application/json"})


def refused(answer: httpx.Response, word: str, *statuses: int) -> None:
    error = answer.json()["error"]
    assert answer.status_code in (statuses or (400,)), error
    assert word in f"{error['param']} {error['message']}", error
