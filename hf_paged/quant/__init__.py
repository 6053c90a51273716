"""Quantized linear layers: what checkpoints store, and the modules that run it."""
