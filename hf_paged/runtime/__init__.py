"""Tensors of one step: the paged KV cache, the packed batch, the model's forward, and sampling."""
