"""The names users import: complete, sorted, each one there, and free until it is used."""

from __future__ import annotations

import subprocess
import sys

import hf_paged
from hf_paged.base import errors

DOCUMENTED = {
    *("AdapterInfo", "AsyncEngine", "Branch", "Engine", "EngineConfig", "ImageLimits", "KVState", "Offload", "SamplingParams"),
    *("Speculation", "StructuredOutputsParams", "StructuredOutputsProcessor"),
    *("ClassificationOutput", "ClassifyParams", "EmbedParams", "EmbeddingOutput", "ScoreOutput", "ScoreParams"),
    *("CompletionDelta", "CompletionOutput", "Logprob", "RequestDelta", "RequestOutput"),
    *("current_batch", "engine_of", "explain", "follow", "patch", "unpatch"),
    *("register_quantizers", "rollout", "unregister_quantizers"),
}
HEAVY = ("torch", "transformers", "numpy", "typer", "rich", "gguf", "matplotlib", "tqdm")


def error_names() -> set[str]:
    return {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}


def test_all_is_what_is_documented():
    assert set(hf_paged.__all__) == DOCUMENTED | error_names()
    assert list(hf_paged.__all__) == sorted(set(hf_paged.__all__))


def test_every_name_is_there():
    for name in hf_paged.__all__:
        assert getattr(hf_paged, name).__module__.startswith("hf_paged.")
    assert set(hf_paged.__all__) <= set(dir(hf_paged))
    assert not hasattr(hf_paged, "no_such_name")


def test_import_is_light():
    code = f"import sys, hf_paged; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_library_needs_no_command_line_packages():
    code = "import sys, hf_paged; [getattr(hf_paged, name) for name in hf_paged.__all__]"
    code += "; print(*[name for name in ('typer', 'gguf', 'matplotlib') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
