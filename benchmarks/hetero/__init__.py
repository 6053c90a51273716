"""Requests of different kinds in one batch."""
