"""/v1/responses: answers made of items, kept for the turns that follow."""

from .routes import router

__all__ = ["router"]
