"""How the tensors of a quantized linear layer are stored in checkpoints, one module for every family of formats."""
