"""What sentence-transformers notes beside a checkpoint of how its texts become vectors."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

_MODE = "pooling_mode_"
_POOLINGS = {"cls_token": "cls", "cls": "cls", "lasttoken": "last", "mean_tokens": "mean", "mean": "mean"}
_PACKAGE = "sentence_transformers."
_MODULES, _GENERAL, _LIMITS = "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"


@dataclass(frozen=True)
class SentenceNotes:
    """
    Attributes:
        pooling: as EmbedParams has it; what else is done comes back by its own name. "mean" where nothing is said.
        normalizes: vectors are scaled to length 1, whatever is asked for.
        pools_prompt: whether the tokens of a prompt before the text are part of what is pooled.
        prompts: texts to put before others, by name.
        default_prompt_name: the one of them that is used where none is named.
        max_seq_length: tokens beyond it are cut off; None where nothing is said.
        similarity: "cosine", "dot", "euclidean" or "manhattan".
    """

    pooling: str = "mean"
    normalizes: bool = False
    pools_prompt: bool = True
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    max_seq_length: int | None = None
    similarity: str = "cosine"


def sentence_notes(config) -> SentenceNotes:
    """Of the checkpoint that a model's `config` was loaded from: a folder, or a repository in the hub's cache."""
    source = getattr(config, "_name_or_path", "")
    modules = _read(source, _MODULES) or []
    kinds = [_kind(module["type"]) for module in modules]
    pooled = _read(source, _pooling_file(modules)) or {}
    # the model itself, and what changes nothing when it runs, are no further steps
    further = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize", "Dropout")]
    general = _read(source, _GENERAL) or {}
    limits = _read(source, _LIMITS) or {}
    return SentenceNotes(
        pooling=", then ".join([_pooling(pooled), *further]),
        normalizes="Normalize" in kinds,
        pools_prompt=pooled.get("include_prompt", True),
        prompts={name: text or "" for name, text in (general.get("prompts") or {}).items()},
        default_prompt_name=general.get("default_prompt_name"),
        max_seq_length=limits.get("max_seq_length"),
        similarity=general.get("similarity_fn_name") or "cosine",
    )


def fetch_notes(source: str) -> None:
    """Bring them to the hub's cache, if `source` is a repository that has any."""
    from transformers.utils import cached_file

    if Path(source).is_dir():
        return
    with contextlib.suppress(OSError):  # few repositories have any
        cached_file(source, _MODULES)
        for file in (_pooling_file(_read(source, _MODULES) or []), _GENERAL, _LIMITS):
            with contextlib.suppress(OSError):
                cached_file(source, file)


def _pooling_file(modules: list[dict]) -> str:
    folders = [module["path"] for module in modules if _kind(module["type"]) == "Pooling"]
    return f"{folders[0] if folders else '1_Pooling'}/config.json"


def _kind(name: str) -> str:
    """The class of a module, with its package where that is somebody else's."""
    return name.rpartition(".")[2] if name.startswith(_PACKAGE) else name


def _pooling(noted: dict) -> str:
    modes = noted.get("pooling_mode")
    if modes is None:  # before version 6
        modes = [name.removeprefix(_MODE) for name, chosen in noted.items() if name.startswith(_MODE) and chosen]
    modes = [modes] if isinstance(modes, str) else modes
    return "+".join(_POOLINGS.get(mode, mode) for mode in modes) or "mean"


def _read(source: str, file: str):
    """A JSON file beside a checkpoint; None if it is not there."""
    if not source:
        return None
    path = Path(source, file)
    if not path.is_file():
        try:
            path = try_to_load_from_cache(source, file)
        except HFValidationError:  # a folder, or no name of a repository
            return None
    return json.loads(Path(path).read_text(encoding="utf-8")) if isinstance(path, str | Path) else None
