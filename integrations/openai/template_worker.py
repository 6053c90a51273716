"""Runs chat templates that requests bring, in a process of its own: `python template_worker.py SECONDS BYTES`.

A template is a program. jinja2's sandbox keeps it from files and names, not from running for ever or filling the memory,
and in the server's process either would stop everybody. So every template runs in a fork of this process, which the
system ends when its time is over, and gives no more memory than it may have.

Standard input is a socket. Every byte on it brings a socket of its own, on which one request comes as JSON and one
answer goes back: {"text": ...} or {"error": ...}. Nothing, if the template had to be ended.

This file is run as a script, so that it imports neither torch nor the server.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import sys

_GENERATION = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")  # a tag of transformers' own


def main(seconds: float, memory: int) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the server's matter, which closes the socket
    channel = socket.socket(fileno=0)
    while True:
        data, sockets, _, _ = socket.recv_fds(channel, 1, 1)
        if not data:
            return
        if os.fork() == 0:
            try:
                channel.close()
                _limit(seconds, memory)
                _answer(socket.socket(fileno=sockets[0]), render_jinja_template)
            finally:
                os._exit(0)
        for descriptor in sockets:
            os.close(descriptor)


def _limit(seconds: float, memory: int) -> None:
    """For this process, from now on."""
    signal.setitimer(signal.ITIMER_REAL, seconds)  # nothing handles the signal, so it ends the process, whatever runs
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _answer(connection: socket.socket, render) -> None:
    with connection, connection.makefile("rb") as incoming:
        asked = json.load(incoming)
        try:
            most, arguments = asked["most"], asked["arguments"]
            _check_names(arguments["chat_template"], asked["must_read"])
            [text], _ = render(**arguments)
            answer = {"text": text} if len(text) <= most else {"error": f"it makes more than {most} characters"}
        except Exception as error:  # a template may raise anything
            answer = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        connection.sendall(json.dumps(answer).encode())


def _check_names(template: str, names: list[str]) -> None:
    """Raise ValueError for a name that the template does not read: what it stands for would be ignored."""
    from jinja2 import meta
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=[loopcontrols])
    known = meta.find_undeclared_variables(environment.parse(_GENERATION.sub("", template)))
    for name in names:
        if name not in known:
            raise ValueError(f"the template does not read {name}")


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
