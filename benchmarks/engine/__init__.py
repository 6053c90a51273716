"""The engine against stock transformers on a whole workload: `hf-paged bench`."""
