"""PEFT adapters side by side in one batch, beside the model and not in it.

- loading.py: an adapter from a folder, as PEFT loads it, on a copy of the model's structure that shares its weights.
- targets.py: what PEFT's modules of an adapter do to the model's layers, as terms that kernels add, or why not.
- sites.py: the model's layers with the terms of every adapter, and a forward's rows.
- overlay.py: PEFT's own modules in the model while a forward runs, for what there are no terms of.
- bank.py: the adapters of one model.
"""
