"""What quantized layers are stored as: the format of a layer, and what config.json says of the checkpoint."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import version

from ...base.errors import UnsupportedModel
from ...quant.formats.awq import AWQ
from ...quant.formats.base import Format
from ...quant.formats.eight_bit import EightBit
from ...quant.formats.gptq import GPTQ
from ...quant.gptq import Gptq
from ...quant.rounding import Scheme

FLOAT_QUANTIZED = "float-quantized"


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
        "static_groups": options is not None and options.act_order and options.static_groups,
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


def as_awq(scheme: Scheme, kept: list[str], quantized: list[str]) -> Stored:
    """AWQ, version "gemm". `kept`, `quantized`: linear layers that stay as they are, and those that do not.

    Raises UnsupportedModel if the name of one that stays is part of one that does not: the config tells them apart by that.
    """
    for name in kept:
        if part := next((other for other in quantized if name in other), None):
            raise UnsupportedModel(f"model: AWQ checkpoints cannot say that {name} is not quantized but {part} is")
    config = {
        "quant_method": "awq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": kept or None,
    }
    return Stored(AWQ(scheme.group_size), config)


def as_fp8(kept: list[str], classes: list[str]) -> Stored:
    """compressed-tensors, "float-quantized": e4m3, a scale for every row of a weight, inputs rounded when they come.

    Not transformers' own fp8 format: that has a scale for all of a weight or for blocks of it, which is less exact or does
    not fit every layer; and vLLM runs this one as it is. `kept`: linear layers of decoder layers that stay as they are;
    `classes`: those of the others.
    """
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": classes,
        "weights": number | {"strategy": "channel", "dynamic": False},
        "input_activations": number | {"strategy": "token", "dynamic": True},
        "output_activations": None,
        "format": FLOAT_QUANTIZED,
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": FLOAT_QUANTIZED,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", *kept],
    }
    return Stored(EightBit("fp8", (1, None), activations="fp8"), config)


def _pattern(name: str) -> str:
    """The layer of this name in every decoder layer."""
    return re.sub(r"\\\.\d+\\\.", r"\.\\d+\.", re.escape(name))
