"""The engine: requests in, steps of continuous batching, outputs out."""
