"""Folders as auto-gptq and autoawq left them before transformers knew quantized checkpoints.

What was quantized how lies in a file of its own beside config.json, and the weights have a name of their own
(gptq_model-4bit-128g.safetensors). Both are put into the configuration that transformers reads: `quantization_config`
and `transformers_weights`. Only folders on this machine are completed, not names of a hub.
"""

from __future__ import annotations

import json
from functools import wraps
from pathlib import Path

_QUANTIZATION = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def install() -> None:
    """Have transformers complete the configurations it reads."""
    from transformers.configuration_utils import PreTrainedConfig

    original = PreTrainedConfig.__dict__["get_config_dict"]
    if hasattr(original.__func__, "hf_paged_original"):
        return

    @wraps(original.__func__)
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        found, unused = original.__func__(cls, pretrained_model_name_or_path, **kwargs)
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if found and folder.is_dir():
            found |= _completion(folder, found)
        return found, unused

    get_config_dict.hf_paged_original = original
    PreTrainedConfig.get_config_dict = classmethod(get_config_dict)


def uninstall() -> None:
    from transformers.configuration_utils import PreTrainedConfig

    current = PreTrainedConfig.__dict__["get_config_dict"]
    PreTrainedConfig.get_config_dict = getattr(current.__func__, "hf_paged_original", current)


def _completion(folder: Path, config: dict) -> dict:
    """What a folder's files say beyond its config.json."""
    quantization, added = config.get("quantization_config"), {}
    for file, method in _QUANTIZATION.items():
        if quantization is None and (folder / file).is_file():
            quantization = {"quant_method": method} | json.loads((folder / file).read_text())
            added["quantization_config"] = quantization
    if quantization is None or "transformers_weights" in config or any((folder / name).is_file() for name in _WEIGHTS):
        return added
    for pattern in ("*.safetensors.index.json", "*.safetensors"):
        files = sorted(file.name for file in folder.glob(pattern))
        if len(files) == 1:
            return added | {"transformers_weights": files[0]}
    return added
