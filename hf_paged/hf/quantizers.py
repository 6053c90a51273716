"""Quantized checkpoints in transformers: its loader fills our layers, and they are packed one after the other.

transformers looks quantizers up by the checkpoint's `quant_method`. Importing this module puts ours there; they need no
other package. What is quantized on the fly, rather than loaded so, still goes to transformers' own.
"""

from __future__ import annotations

import re
import warnings
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import quantization_config as configs

from ..base.errors import InvalidArgument, UnsupportedOption
from ..quant.experts import ExpertLayers
from ..quant.formats import compressed_tensors
from ..quant.formats.awq import AWQ
from ..quant.formats.base import Format
from ..quant.formats.fp8 import INPUT_SCALES, SCALES, fp8_format
from ..quant.formats.gptq import GPTQ
from ..quant.linear import QuantLinear
from . import checkpoint as checkpoints
from . import old_checkpoints
from .weights import local


class _Stored:
    """A quantization config that keeps all the checkpoint says, to be saved again: also what transformers does not know."""

    stored: dict

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        config = cls(**cls.arguments(config_dict))
        config.stored = deepcopy(config_dict)
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def arguments(cls, stored: dict) -> dict:
        """What transformers' own config is made of."""
        return {name: value for name, value in stored.items() if value is not None}

    def post_init(self):
        """Values are checked where they are used, once for every layer they are used for."""

    def to_dict(self):
        return deepcopy(self.stored)

    to_diff_dict = to_dict


class GPTQConfig(_Stored, configs.GPTQConfig):
    @classmethod
    def arguments(cls, stored):
        if "bits" not in stored:
            raise InvalidArgument("quantization_config: bits is missing")
        return super().arguments(stored)


class AwqConfig(_Stored, configs.AwqConfig):
    @classmethod
    def arguments(cls, stored):
        return super().arguments(stored | {"version": None})  # transformers would only take those it knows


class FineGrainedFP8Config(_Stored, configs.FineGrainedFP8Config):
    pass


class FbgemmFp8Config(_Stored, configs.FbgemmFp8Config):
    pass


class CompressedTensorsConfig(_Stored, configs.CompressedTensorsConfig):
    def __init__(self, dequantize: bool = False, use_optimized_inference: bool = False, **kwargs):
        """Without the package that transformers has parse the rest."""
        self.quantization_config = None
        self.dequantize, self.use_optimized_inference = dequantize, use_optimized_inference
        self.quant_method = configs.QuantizationMethod.COMPRESSED_TENSORS


class PackedQuantizer(HfQuantizer):
    """Loads a quantized checkpoint into `QuantLinear`s.

    A linear layer is converted if the checkpoint has quantized tensors of it, whatever the config says of layers to
    leave out: what was stored is what the model is.
    """

    names: tuple[str, ...]  # tensors that only a quantized layer has
    left_out: tuple[str, ...] = ()  # tensors that are not needed
    own: type[HfQuantizer]  # transformers' quantizer for this method

    def __new__(cls, quantization_config=None, pre_quantized: bool = True, **kwargs):
        if not pre_quantized:
            return cls.own(quantization_config, pre_quantized=False, **kwargs)
        return super().__new__(cls)

    def layer_format(self, name: str, module: nn.Module, tensors: dict[str, Tensor]) -> Format:
        """The format of the layer that the checkpoint calls `name` and has these tensors of, in place of `module`."""
        raise NotImplementedError

    def is_quantized(self, module: nn.Module, tensors: dict[str, Tensor]) -> bool:
        """Whether the checkpoint has quantized tensors of a linear layer: in 8 bits, or with the names of one that is."""
        if not isinstance(module, (nn.Linear, Conv1D)):
            return False
        return any(name in tensors for name in self.names) or "weight" in tensors and _is_8_bit(tensors["weight"])

    def update_dtype(self, dtype):
        return torch.bfloat16 if dtype.itemsize == 1 else dtype  # an 8-bit type is only the weights'

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        if not checkpoint_files:
            raise UnsupportedOption("state_dict: a quantized model is loaded from its checkpoint's files")
        parts = getattr(getattr(model.config, "distributed_config", None), "tp_size", None) or 1
        if parts > 1 and getattr(self.quantization_config, "dequantize", False):
            raise UnsupportedOption("dequantize: sharded layers stay quantized")
        from .experts import QuantizedExperts  # needs what is imported after this module

        checkpoint = checkpoints.read(model, checkpoint_files)
        self._surplus_biases = []

        def make(name: str, module: nn.Linear) -> QuantLinear:
            with _naming(name):
                return self._layer(name, module, checkpoint)

        modules, plain = list(model.named_modules()), nn.Linear(1, 1, device="meta")
        self._experts = QuantizedExperts(model, checkpoint.layers, partial(self.is_quantized, plain), make)
        for name, module in modules:
            if self.is_quantized(module, checkpoint.layers[name]):
                model.set_submodule(name, make(name, module))
        _check_unconverted(model, checkpoint)
        if parts > 1 and any(isinstance(module, ExpertLayers) for module in model.modules()):
            raise UnsupportedOption("distributed_config: quantized experts are not sharded")

    def update_weight_conversions(self, weight_conversions, *args):
        return super().update_weight_conversions(self._experts.without_merging(weight_conversions), *args)

    def _layer(self, name: str, module: nn.Module, checkpoint: checkpoints.Checkpoint) -> QuantLinear:
        """The layer that takes a module's place, with nothing loaded yet."""
        if not _is_linear(module):
            raise UnsupportedOption(f"{type(module).__name__} cannot be quantized, only plain linear layers")
        N, K = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
        tensors = dict(checkpoint.layers[name])
        bias = tensors.pop("bias", None)
        if bias is not None and (bias.shape != (N,) or not bias.is_floating_point()):
            raise InvalidArgument(f"bias is {bias.dtype} {list(bias.shape)}, not a floating type [{N}]")
        if bias is None and module.bias is not None:
            raise InvalidArgument("bias is missing")
        if module.bias is None and bias is not None:
            self._surplus_biases.append(name)
        format = self.layer_format(checkpoint.names.get(name, name), module, tensors)
        tensors = {name: tensor for name, tensor in tensors.items() if name not in self.left_out}
        surplus = tensors.keys() - format.stored(N, K).keys()
        if surplus:
            raise UnsupportedOption(f"{', '.join(sorted(surplus))}: no tensor of {format}")
        layer = QuantLinear(K, N, bias is not None, format, dtype=module.weight.dtype, like=tensors)
        if "weight" not in tensors:
            layer.weight = _stand_in()
        return layer

    def _process_model_after_weight_loading(self, model, **kwargs):
        _check_plain(model)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
        for owner, names in self._experts.owners(layers).items():
            loaded = []
            for name in names:
                layer = layers.pop(name)  # nothing else may hold on to what stacking takes out
                with _naming(name):
                    loaded += self._pack(name, layer)
                del layer
            self._experts.stack(model, owner)
            checkpoints.give_back(loaded, model.get_submodule(owner))
        if hasattr(model.config, "transformers_weights"):
            del model.config.transformers_weights  # saved, the file has another name
        if getattr(self.quantization_config, "dequantize", False):
            _dequantize(model, model.dtype)

    def _pack(self, name: str, layer: QuantLinear) -> list[Tensor]:
        """What was loaded, for which there may be no more use."""
        _check_loaded(layer)
        vars(layer).pop("weight", None)
        for key, parameter in layer._parameters.items():
            if local(parameter) is not parameter:
                layer._parameters[key] = nn.Parameter(local(parameter).detach(), requires_grad=False)
        loaded = [tensor for key, tensor in layer.named_parameters() if key != "bias"]
        layer.pack_()
        if name in self._surplus_biases and not layer.bias.any():
            layer.bias = None  # auto-gptq gives every layer a bias
        return loaded

    def _dequantize(self, model, dtype=None):
        _dequantize(model, dtype or model.dtype)
        return model

    def is_serializable(self, *args, **kwargs):
        return True

    @property
    def is_trainable(self):
        return True  # the layers themselves are not, adapters on them are


class GPTQQuantizer(PackedQuantizer):
    names = ("qweight", "qzeros", "scales", "g_idx")
    own = auto.GptqHfQuantizer

    def layer_format(self, name, module, tensors):
        stored = dict(self.quantization_config.stored)
        for pattern, overrides in (stored.get("dynamic") or {}).items():
            if re.match(pattern.removeprefix("+:"), name):
                stored.update(overrides)
                break
        version = str(stored.get("checkpoint_format") or stored.get("format") or "gptq").lower()
        if stored.get("is_marlin_format"):
            version = "marlin"
        if stored.get("pack_dtype", "int32") != "int32":
            raise UnsupportedOption(f"pack_dtype {stored['pack_dtype']} is not supported, only int32")
        writers = str((stored.get("meta") or {}).get("quantizer", ""))
        return GPTQ(stored["bits"], stored.get("group_size", -1), version, whole_words="gptqmodel" in writers)


class AWQQuantizer(PackedQuantizer):
    names = ("qweight", "qzeros", "scales")
    own = auto.AwqQuantizer

    def layer_format(self, name, module, tensors):
        stored = self.quantization_config.stored
        bits = stored.get("bits", stored.get("w_bit", 4))
        if bits != 4:
            raise InvalidArgument(f"bits must be 4, not {bits!r}")
        version = stored.get("version") or stored.get("checkpoint_format") or stored.get("format") or "gemm"
        return AWQ(stored.get("group_size", stored.get("q_group_size", 128)), str(version).lower())


class FP8Quantizer(PackedQuantizer):
    names = SCALES + INPUT_SCALES
    own = auto.FineGrainedFP8HfQuantizer

    def layer_format(self, name, module, tensors):
        return fp8_format(self.quantization_config.stored, tensors)


class FbgemmFp8Quantizer(FP8Quantizer):
    """fbgemm's rows of fp8. Inputs larger than its `activation_scale_ub` are not cut off."""

    own = auto.FbgemmFp8HfQuantizer
    left_out = ("input_scale_ub",)


class CompressedTensorsQuantizer(PackedQuantizer):
    names = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale")
    own = auto.CompressedTensorsHfQuantizer

    def validate_environment(self, *args, **kwargs):
        if self.quantization_config.stored.get("kv_cache_scheme"):
            message = "kv_cache_scheme of the checkpoint is not used: its scales of keys and values are left out"
            warnings.warn(message, stacklevel=2)

    def layer_format(self, name, module, tensors):
        classes = [cls.__name__ for cls in type(module).__mro__]
        stored = self.quantization_config.stored
        return compressed_tensors.layer_format(stored.get("quantization_config", stored), name, classes, tensors)


_OURS: dict[str, tuple[type[PackedQuantizer], type]] = {
    "awq": (AWQQuantizer, AwqConfig),
    "compressed-tensors": (CompressedTensorsQuantizer, CompressedTensorsConfig),
    "fbgemm_fp8": (FbgemmFp8Quantizer, FbgemmFp8Config),
    "fp8": (FP8Quantizer, FineGrainedFP8Config),
    "gptq": (GPTQQuantizer, GPTQConfig),
}
_THEIRS: dict[str, tuple[type, type]] = {}


def register_quantizers() -> None:
    """Load GPTQ, AWQ, FP8 and compressed-tensors checkpoints with hf_paged's layers. Importing hf_paged does it."""
    for method, classes in _OURS.items():
        if method not in _THEIRS:
            _THEIRS[method] = auto.AUTO_QUANTIZER_MAPPING[method], auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method]
        auto.AUTO_QUANTIZER_MAPPING[method], auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = classes
    old_checkpoints.install()


def unregister_quantizers() -> None:
    """Load them with transformers' own quantizers again. Models that are loaded stay as they are."""
    for method, classes in _THEIRS.items():
        auto.AUTO_QUANTIZER_MAPPING[method], auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = classes
    _THEIRS.clear()
    old_checkpoints.uninstall()


def mark_quantized(model, stored: dict) -> None:
    """Make a model that has got `QuantLinear`s since it was loaded one that was loaded with them.

    Args:
        stored: the `quantization_config` of the checkpoint that it is saved as from now on.
    """
    quantizer_class, config_class = _OURS[stored["quant_method"]]
    config = config_class.from_dict(stored)
    model.hf_quantizer = quantizer_class(config)
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.config.quantization_config = config
    model.config._is_quantized = model.config.get_text_config(decoder=True)._is_quantized = True


class _naming:
    """Scope in which an error gets the name of the layer it is about."""

    def __init__(self, layer: str):
        self._layer = layer

    def __enter__(self):
        pass

    def __exit__(self, kind, error, traceback):
        if isinstance(error, InvalidArgument):
            raise type(error)(f"{self._layer}: {error}") from error


def _is_linear(module: nn.Module) -> bool:
    """Whether it is one that a `QuantLinear` can stand for: some that inherit from Linear, as routers, do more."""
    return type(module).forward in (nn.Linear.forward, Conv1D.forward) or type(module).__name__ == "FalconLinear"


def _is_8_bit(tensor: Tensor) -> bool:
    return tensor.dtype.itemsize == 1 and tensor.dtype != torch.bool


def _check_unconverted(model, checkpoint: checkpoints.Checkpoint) -> None:
    """Raises UnsupportedOption for quantized tensors that transformers would load into plain ones without their scales."""
    for name, module in model.named_modules():
        for key, tensor in {} if isinstance(module, QuantLinear) else checkpoint.layers[name].items():
            plain = module._parameters.get(key)
            if plain is not None and _is_8_bit(tensor) and not _is_8_bit(plain):
                raise UnsupportedOption(
                    f"{name}: {key} of a {type(module).__name__} is {tensor.dtype}; only linear layers can be quantized"
                )


def _stand_in() -> Tensor:
    """A `weight` while a layer is being loaded: a few models initialize it by name, unless it is marked as loaded."""
    tensor = torch.empty(0, device="meta")
    tensor._is_hf_initialized = True
    return tensor


def _check_loaded(layer: QuantLinear) -> None:
    for parameter in layer.parameters():
        if parameter.is_meta:
            raise UnsupportedOption("device_map: quantized layers cannot be offloaded")


def _check_plain(model) -> None:
    """Raises InvalidArgument for a parameter that transformers found nothing of and filled with random numbers.

    A head counts where the model is to generate: another one, on a base model, may have nothing to load.
    """
    checked = model if model.can_generate() else model.base_model
    expected = "|".join(model._keys_to_ignore_on_load_missing or ())
    for name, parameter in checked.named_parameters():
        if not (getattr(parameter, "_is_hf_initialized", False) or parameter.is_meta):
            if not (expected and re.search(expected, name)):
                raise InvalidArgument(f"{name} is missing in the checkpoint")


def _dequantize(model, dtype: torch.dtype) -> None:
    from .experts import dequantize_experts

    dequantize_experts(model, dtype)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(layer.dequantize(dtype))
            plain.bias = None if layer.bias is None else nn.Parameter(layer.bias.to(dtype))
            model.set_submodule(name, plain)


register_quantizers()  # once, with the first import; hf_paged imports this module as soon as transformers can be told
