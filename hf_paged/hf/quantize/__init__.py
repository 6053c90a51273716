"""Quantizing the linear layers of a loaded model: on the spot, or calibrated and written as a checkpoint."""
