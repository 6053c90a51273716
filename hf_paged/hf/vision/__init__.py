"""Images in transformers models: the model's own encoder and projector, whose outputs stand for tokens of the prompt."""
