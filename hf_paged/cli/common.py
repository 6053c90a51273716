"""What the commands share: option types, errors as one line, a loaded and patched model."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..base.offload import Offload
from .ranks import num_ranks, rank

Model = Annotated[
    str | None,
    typer.Argument(help="Hub id or local folder; without one, the embedded SmolLM2-135M-Instruct.", show_default=False),
]


def _option(text: str, **more):
    return typer.Option(help=text, rich_help_panel="Model", show_envvar=False, **more)


Dtype = Annotated[str | None, _option("float32, bfloat16 or float16. Default: the checkpoint's.")]
Device = Annotated[str | None, _option("cpu, cuda, cuda:1, ... Default: CUDA where there is one.")]
Speculation = Annotated[
    str | None,
    _option("Guess tokens ahead, for the same output in fewer steps: ngram repeats what was said before."),
]
DraftModel = Annotated[
    str | None,
    _option("Hub id or local folder of a smaller model with the same vocabulary, to guess tokens ahead."),
]
Quantization = Annotated[
    str | None,
    _option("Round the linear layers' weights to int4, int8 or fp8 after loading. Checkpoints are loaded as they are."),
]
ExpertParallel = Annotated[
    bool,
    _option("Of a mixture of experts on several ranks, each has whole experts rather than a part of every one."),
]
Threads = Annotated[int | None, _option("CPU threads. Default: torch's own.", min=1)]

# Help of what both a server and a batch have
OFFLOAD_DISK = "Folder for prefixes that --offload has no room for, or holds at the end: they outlive the process. May be shared."
OFFLOAD_DISK_MEMORY = 'Most bytes of the files in --offload-disk, such as "20GiB".'
MEDIA_HOSTS = "A host, *.domain, address or network, maybe with :PORT, to fetch images from that requests name; repeatable."
MEDIA_TIMEOUT = "Seconds in which an image that a request names must come."
MAX_IMAGES = "Most images of a request."
IMAGE_QUEUE_MEMORY = "Most memory of images of requests that have not ended, such as 4GiB; more are answered 429."
MAX_IMAGE_PIXELS = "Most pixels of an image; all of a request may have four times as many."

DTYPES = ("float32", "bfloat16", "float16")
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


class UserError(ValueError):
    """Bad input to a command; the message is shown as it is."""


def check_alone(command: str) -> None:
    """Raise UserError if there are several processes: they would all do the same."""
    if num_ranks() > 1:
        raise UserError(f"{command} runs in one process, not under torchrun or `accelerate launch`")


def offload_of(memory: str | None, disk: Path | None, disk_memory: str) -> Offload | None:
    """EngineConfig.offload of the options --offload, --offload-disk and --offload-disk-memory."""
    if memory is None and disk is not None:
        raise UserError("--offload-disk needs --offload, the memory that it is behind")
    return None if memory is None else Offload(memory, disk=disk, disk_memory=disk_memory)


@contextmanager
def guard(debug: bool = False) -> Iterator[None]:
    """Turn what a user can cause into one line on stderr and exit status 2; anything else keeps its traceback."""
    from hf_paged.base.errors import HfPagedError, ParallelError

    try:
        yield
    except KeyboardInterrupt:
        if debug:
            raise
        print("hf-paged: interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:  # the reader of our output went away
        sys.stderr.close()
        raise SystemExit(1) from None
    except ParallelError as error:
        if debug:
            raise
        print(f"hf-paged (rank {rank()}): {one_line(error)}", file=sys.stderr)
        raise SystemExit(FAILED) from None
    except (HfPagedError, OSError, ValueError, ImportError) as error:
        if debug:
            raise
        name = f"hf-paged (rank {rank()})" if rank() else "hf-paged"
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None


def one_line(error: BaseException) -> str:
    """An error's message up to its first line break, or its class where it has none."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def dtype_name(name: str | None) -> str | None:
    if name is not None and name not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return name


def quiet_libraries() -> None:
    """Keep transformers' notes about our own loading out of the output."""
    import huggingface_hub.utils.logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()


def load(
    *,
    model: str | None,
    dtype: str | None,
    device: str | None,
    threads: int | None,
    progress: bool,
    ranks: int = 1,
    expert_parallel: bool = False,
):
    """The model, unpatched, and its tokenizer.

    Args:
        ranks: how many processes load it together, each its shards.
        expert_parallel: each its experts.
    """
    dtype = dtype_name(dtype)
    import torch

    from hf_paged.hf.build import load_model

    quiet_libraries()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        return load_model(
            model,
            dtype=dtype and getattr(torch, dtype),
            device=device,
            progress=progress and not rank(),
            num_ranks=ranks,
            expert_parallel=expert_parallel,
        )
    except (RuntimeError, AssertionError) as error:  # no such device (torch asserts), or too little memory
        raise UserError(one_line(error)) from error


@contextmanager
def open_engine(
    *,
    speculation: str | None = None,
    draft_model: str | None = None,
    quantization: str | None = None,
    engine: dict | None = None,
    **loading,
) -> Iterator[tuple]:
    """(patched model, tokenizer, engine); everything is undone afterwards.

    Where several processes hold the model, rank 0 alone gets that far: the others take part in what it does, and exit.

    Args:
        engine: more fields of EngineConfig.
    """
    import hf_paged
    from hf_paged.hf.build import load_processor
    from hf_paged.hf.quantize.spot import check_kind

    config = hf_paged.EngineConfig(speculation=speculation, **(engine or {}))  # a mistake shows before the weights are read
    check_kind(quantization)
    model, tokenizer = load(**loading, ranks=num_ranks())
    draft = None if draft_model is None or rank() else load(**loading | {"model": draft_model, "expert_parallel": False})[0]
    if rank():
        config = config.replace(speculation=None)  # rank 0 guesses
    processor = load_processor(loading["model"], model, tokenizer) if loading["model"] else None
    hf_paged.patch(model, config, tokenizer=processor or tokenizer, draft_model=draft, quantization=quantization)
    try:
        if rank():
            for name in (signal.SIGINT, signal.SIGTERM):
                signal.signal(name, signal.SIG_IGN)  # meant for all ranks: rank 0 finishes what it does, and says so
            hf_paged.follow(model)
            raise SystemExit(0)
        yield model, tokenizer, hf_paged.engine_of(model)
    finally:
        hf_paged.unpatch(model)


def follow_rank_0(**loading) -> None:
    """On other ranks than 0: take part in what rank 0 does with the model, and exit when that ends. `open_engine`'s options.

    For commands whose rank 0 has more to do before it loads the model: reading prompts, listening.
    """
    if rank():
        with open_engine(**loading):
            raise AssertionError("only rank 0 has an engine")


def chat_prompt(engine, tokenizer, messages: list[dict]) -> list[int] | list[dict]:
    """A conversation as the engine takes it, ready for the assistant's next words: token ids, or itself where there may be
    images in it.

    Raises UserError if the model has no chat template or its template refuses the messages.
    """
    if engine.processor is not None and getattr(tokenizer, "chat_template", None):
        return messages
    return chat_tokens(tokenizer, messages)


def chat_tokens(tokenizer, messages: list[dict]) -> list[int]:
    """The tokens of a conversation without images. Raises as `chat_prompt`."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("this model has no chat template; use plain prompts")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise jinja's own errors, by way of whatever they call
        raise UserError(f"the model's chat template refuses these messages: {one_line(error)}") from error
    return tokenizer(text, add_special_tokens=False).input_ids
