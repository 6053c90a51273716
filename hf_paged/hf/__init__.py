"""The only room that imports transformers: models in, plain tensors and token ids out."""
