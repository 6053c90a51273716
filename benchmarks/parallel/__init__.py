"""Sharded models: what goes between ranks, counted and predicted."""
