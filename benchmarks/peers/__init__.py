"""OpenAI-compatible servers as systems of `hf-paged bench`."""
