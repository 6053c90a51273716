"""The command line. `app.py` names the commands; each has a module of its own."""

from .app import main

__all__ = ["main"]
