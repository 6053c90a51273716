"""LoRA adapters on quantized layers, for PEFT. Imported, and told to `install()`, once PEFT itself has been imported.

PEFT makes the layer of an adapter from the type of the layer it goes on, and refuses types it does not know. Here it
learns one more, and to count it in where `target_modules` asks for all linear layers.
"""

from __future__ import annotations

from functools import wraps

from peft.tuners import tuners_utils
from peft.tuners.lora import layer as lora_layers
from peft.tuners.lora.model import LoraModel

from ..base.errors import InvalidArgument
from ..quant.linear import QuantLinear

ALL_LINEAR = "all-linear"
WITHOUT_WEIGHT = ("gaussian", "eva")  # ways to begin, among those with a name, that do not take the weight apart
MERGE = (
    "merge: the weights of {} are quantized, and rounding them again would lose much of what the adapter learned; keep "
    "the adapter beside them, or merge it into the model it was quantized from and quantize that"
)


class LoraQuantLinear(lora_layers.Linear):
    """base_layer(x) + B(A(dropout(x))) * scaling, on a QuantLinear. It can be trained, and not be merged."""

    @property
    def lora_variants(self):
        return {(): None}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config, **kwargs) -> None:
        begin = config.init_lora_weights
        if isinstance(begin, str) and begin.lower() not in WITHOUT_WEIGHT:
            raise InvalidArgument(
                f"init_lora_weights={begin!r} begins with parts of the layer's weight, which is quantized here; use True, "
                f"False or one of {', '.join(map(repr, WITHOUT_WEIGHT))}"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise InvalidArgument(MERGE.format("this layer"))

    def _get_in_out_features(self, module) -> tuple[int, int]:
        return module.in_features, module.out_features


def install() -> None:
    """Idempotent."""
    if not hasattr(LoraModel._create_new_module, "__wrapped__"):
        LoraModel._create_new_module = staticmethod(_creating(LoraModel._create_new_module))
        LoraModel._check_merge_allowed = _checking(LoraModel._check_merge_allowed)
        tuners_utils._maybe_include_all_linear_layers = _including(tuners_utils._maybe_include_all_linear_layers)


def _creating(original):
    @wraps(original)
    def create_new_module(lora_config, adapter_name, target, **kwargs):
        inner = target.get_base_layer() if isinstance(target, tuners_utils.BaseTunerLayer) else target
        if not isinstance(inner, QuantLinear):
            return original(lora_config, adapter_name, target, **kwargs)
        return LoraQuantLinear(target, adapter_name, config=lora_config, **kwargs)

    return create_new_module


def _checking(original):
    @wraps(original)
    def check_merge_allowed(self):
        """Before any layer is merged."""
        original(self)
        for name, module in self.model.named_modules():
            if isinstance(module, LoraQuantLinear):
                raise InvalidArgument(MERGE.format(name))

    return check_merge_allowed


def _including(original):
    @wraps(original)
    def maybe_include_all_linear_layers(peft_config, model):
        asked = getattr(peft_config, "target_modules", None)
        peft_config = original(peft_config, model)
        if isinstance(asked, str) and asked.lower() == ALL_LINEAR:
            head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
            quantized = {
                name
                for name, module in model.named_modules()
                if isinstance(module, QuantLinear) and module is not head and not name.endswith(".base_layer")
            }
            peft_config.target_modules = {*peft_config.target_modules, *quantized}
        return peft_config

    return maybe_include_all_linear_layers
