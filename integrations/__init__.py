"""Adapters between hf_paged's public names and other programs. Imported as `hf_paged.integrations`."""
