"""What quantized layers are stored as: the format of a layer, and what config.json says of the checkpoint."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import version

from ...quant.formats.base import Format
from ...quant.formats.gptq import GPTQ
from ...quant.gptq import Gptq
from ...quant.rounding import Scheme


@dataclass(frozen=True)
class Stored:
    """A layer's format, and the checkpoint's `quantization_config`."""

    format: Format
    config: dict


def as_gptq(scheme: Scheme, kept: list[str], options: Gptq | None = None) -> Stored:
    """GPTQ, version 1, which every reader knows. `kept`: linear layers of decoder layers that stay as they are."""
    config = {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": options is not None and options.act_order and not options.static_groups,
        "static_groups": options is not None and options.static_groups,
        "true_sequential": options is not None,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"hf_paged:{version('hf_paged')}"]},
    }
    if options is not None:
        config["damp_percent"] = options.damping
    if kept:
        config["dynamic"] = {f"-:^{_pattern(name)}$": {} for name in kept}
    return Stored(GPTQ(scheme.bits, scheme.group_size), config)


def _pattern(name: str) -> str:
    """The layer of this name in every decoder layer."""
    return re.sub(r"\\\.\d+\\\.", r"\.\\d+\.", re.escape(name))
