"""hf_paged: the Hugging Face model you already have, several times faster, and provably the same.

    import hf_paged
    hf_paged.patch(model)          # model.generate now runs through a paged, continuously batching engine
    hf_paged.unpatch(model)        # and this takes it all back

Names load on first use, so importing hf_paged costs nothing. It makes transformers' `pipeline` know `backend="paged"`
and its `from_pretrained` load quantized checkpoints with our layers, on several ranks, too, PEFT put adapters on these,
and lm-evaluation-harness know the model `hf-paged`; now, or when they are imported.
"""

from __future__ import annotations

import importlib

from .base.post_import import when_imported

__version__ = "0.1.0"

_HOMES = {
    "AdapterInfo": "base.types",
    "AsyncEngine": "engine.async_engine",
    "Branch": "base.branch",
    "CacheFull": "base.errors",
    "ClassificationOutput": "base.tasks",
    "ClassifyParams": "base.tasks",
    "CompletionDelta": "base.types",
    "CompletionOutput": "base.types",
    "DeadlineExceeded": "base.errors",
    "EmbedParams": "base.tasks",
    "EmbeddingOutput": "base.tasks",
    "Engine": "hf.engine",
    "EngineClosed": "base.errors",
    "EngineConfig": "base.config",
    "HfPagedError": "base.errors",
    "ImageLimits": "base.images",
    "InvalidArgument": "base.errors",
    "KVState": "runtime.kv_state",
    "KernelUnavailable": "base.errors",
    "Logprob": "base.types",
    "Offload": "base.offload",
    "ParallelError": "base.errors",
    "QueueFull": "base.errors",
    "RequestDelta": "base.types",
    "RequestFailed": "base.errors",
    "RequestOutput": "base.types",
    "RequestTooLarge": "base.errors",
    "SamplingParams": "base.sampling_params",
    "ScoreOutput": "base.tasks",
    "ScoreParams": "base.tasks",
    "Speculation": "base.config",
    "StructuredOutputsParams": "base.structured",
    "StructuredOutputsProcessor": "hf.structured",
    "UnsupportedModel": "base.errors",
    "UnsupportedOption": "base.errors",
    "VerificationFailed": "base.errors",
    "current_batch": "runtime.packed",
    "engine_of": "hf.patch",
    "explain": "hf.patch",
    "follow": "hf.patch",
    "patch": "hf.patch",
    "register_quantizers": "hf.quantizers",
    "rollout": "hf.rollout",
    "unpatch": "hf.patch",
    "unregister_quantizers": "hf.quantizers",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'hf_paged' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(__all__))


def _join_lm_eval() -> None:
    registry = getattr(importlib.import_module("lm_eval.api.registry"), "model_registry", None)
    if registry is not None:  # versions without it are none of ours to disturb
        registry.register("hf-paged", target=f"{__name__}.integrations.lm_eval:HFPaged")


when_imported("lm_eval.models", _join_lm_eval)
when_imported("peft.tuners.lora.model", lambda: importlib.import_module(".hf.lora", __name__).install())
when_imported("transformers.pipelines", lambda: importlib.import_module(".integrations.pipeline", __name__))
when_imported("transformers.distributed.mixin", lambda: importlib.import_module(".hf.plans", __name__))
when_imported("transformers.quantizers.auto", lambda: importlib.import_module(".hf.quantizers", __name__))
when_imported(
    "transformers.configuration_utils", lambda: importlib.import_module(".hf.old_checkpoints", __name__).install()
)
