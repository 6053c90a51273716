"""The command line: `hf-paged`, also `python -m hf_paged`. Commands import torch and models only when they run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..base.images import ImageLimits
from . import bench, serve
from .common import (
    MAX_IMAGE_PIXELS,
    MAX_IMAGES,
    MEDIA_HOSTS,
    MEDIA_TIMEOUT,
    OFFLOAD_DISK,
    OFFLOAD_DISK_MEMORY,
    Device,
    DraftModel,
    Dtype,
    ExpertParallel,
    Model,
    Quantization,
    Speculation,
    Threads,
    guard,
    offload_of,
)
from .ranks import adopt_mpi

app = typer.Typer(
    name="hf-paged",
    help="Hugging Face models through a paged KV cache and continuous batching.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a request failed or tokens differ, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with guard(debug="--debug" in arguments):
        adopt_mpi()
        app(args=arguments, prog_name="hf-paged")


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"hf-paged {installed('hf_paged')}")
        raise typer.Exit()


@app.command()
def generate(
    model: Model = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            help='Prompts: .jsonl with {"prompt": ...} or {"messages": [...]} and sampling parameters, '
            "else text with one prompt a line; - is standard input.",
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            help="An image that every prompt is about, for a model that takes some; to be repeated. Without --chat a prompt has "
            "the model's placeholder for it."
        ),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt through the model's chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Most new tokens of a request.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of each request's own sampling.")] = None,
    json_schema: Annotated[Path | None, typer.Option(help="Answers are JSON that follows this file's schema.")] = None,
    regex: Annotated[str | None, typer.Option(help="Answers match this regular expression.")] = None,
    choice: Annotated[list[str] | None, typer.Option(help="Answers are one of these; to be repeated.")] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="Print one JSON object per request.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
    speculation: Speculation = None,
    draft_model: DraftModel = None,
    quantization: Quantization = None,
    expert_parallel: ExpertParallel = False,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Generate from many prompts at once; answers are printed in the prompts' order."""
    from .generate import run_generate

    sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    form = {"json": json_schema and json_schema.read_text(encoding="utf-8"), "regex": regex, "choice": choice}
    if any(value is not None for value in form.values()):
        sampling["structured_outputs"] = form
    loading = {"model": model, "dtype": dtype, "device": device, "threads": threads, "progress": not quiet}
    loading |= {"speculation": speculation, "draft_model": draft_model, "quantization": quantization}
    loading |= {"expert_parallel": expert_parallel}
    raise typer.Exit(run_generate(prompt or [], file, image or [], chat, sampling, json_lines, loading))


@app.command()
def chat(
    model: Model = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this and exit.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of one answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.2,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 0.9,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    speculation: Speculation = None,
    draft_model: DraftModel = None,
    quantization: Quantization = None,
    expert_parallel: ExpertParallel = False,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Chat in the terminal. /reset forgets the conversation, /exit leaves, Ctrl-C stops an answer."""
    from .chat import run_chat

    sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    loading = {"model": model, "dtype": dtype, "device": device, "threads": threads, "progress": sys.stderr.isatty()}
    loading |= {"speculation": speculation, "draft_model": draft_model, "quantization": quantization}
    loading |= {"expert_parallel": expert_parallel}
    run_chat(prompt, system, sampling, loading)


app.command(context_settings={"auto_envvar_prefix": serve.ENVIRONMENT})(serve.serve)


@app.command("run-batch")
def run_batch(
    requests: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            help='Requests in OpenAI\'s batch format: one {"custom_id", "method": "POST", "url", "body"} a line; '
            "- is standard input.",
        ),
    ],
    results: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="File for the results, in the order in which they come. What it holds already is not run again; "
            "- is standard output.",
        ),
    ],
    model: Model = None,
    max_concurrency: Annotated[
        int | None, typer.Option(help="Most requests under way. Default: twice --max-num-seqs.", min=1)
    ] = None,
    model_name: Annotated[
        str | None, typer.Option("--served-model-name", help="What the requests call the model. Default: its id or folder.")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Most sequences running at once.", min=1)] = 64,
    max_model_len: Annotated[int | None, typer.Option(help="Most tokens of a sequence. Default: the model's limit.")] = None,
    kv_cache_memory: Annotated[str | None, typer.Option(help='Most memory of the KV cache: "2GiB", or "0.5" for a share of what is free.')] = None,
    offload: Annotated[str | None, typer.Option(help='Memory of the host for evicted prefixes and preempted requests, such as "8GiB".')] = None,
    offload_disk: Annotated[Path | None, typer.Option(help=OFFLOAD_DISK)] = None,
    offload_disk_memory: Annotated[str, typer.Option(help=OFFLOAD_DISK_MEMORY)] = "20GiB",
    kv_dtype: Annotated[str | None, typer.Option(help="fp8, int8, or a floating type. Default: the model's.")] = None,
    allowed_media_hosts: Annotated[list[str] | None, typer.Option(help=MEDIA_HOSTS)] = None,
    media_timeout: Annotated[float, typer.Option(help=MEDIA_TIMEOUT)] = 10,
    max_images: Annotated[int, typer.Option(help=MAX_IMAGES, min=1)] = 16,
    max_image_pixels: Annotated[int, typer.Option(help=MAX_IMAGE_PIXELS, min=1)] = 1 << 25,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
    speculation: Speculation = None,
    draft_model: DraftModel = None,
    quantization: Quantization = None,
    expert_parallel: ExpertParallel = False,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Answer a file of requests as `serve` would; a run that was cut off goes on where it was."""
    from .run_batch import run_batch as run

    engine = {"max_num_seqs": max_num_seqs, "max_model_len": max_model_len}
    engine |= {"kv_cache_memory": kv_cache_memory, "kv_dtype": kv_dtype, "offload": offload_of(offload, offload_disk, offload_disk_memory)}
    engine["images"] = ImageLimits(max_count=max_images, max_pixels=max_image_pixels)
    settings = {"model_name": model_name, "allowed_media_hosts": tuple(allowed_media_hosts or ())}
    settings["media_timeout"] = media_timeout
    loading = {"model": model, "dtype": dtype, "device": device, "threads": threads, "progress": not quiet}
    loading |= {"speculation": speculation, "draft_model": draft_model, "quantization": quantization, "engine": engine}
    loading |= {"expert_parallel": expert_parallel}
    most = max_concurrency or 2 * max_num_seqs
    raise typer.Exit(run(requests, results, most, settings, loading))


@app.command()
def explain(
    model: Model = None,
    quantization: Quantization = None,
    expert_parallel: ExpertParallel = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Show what the engine would run for each layer of a model, and the reason for any slower path."""
    import hf_paged

    from .common import open_engine

    loading = {"model": model, "dtype": dtype, "device": device, "threads": None, "progress": False}
    loading |= {"expert_parallel": expert_parallel}
    with open_engine(quantization=quantization, **loading) as (patched, _, _):
        typer.echo(str(hf_paged.explain(patched)))


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Hub id or local folder, or SmolLM2-135M-Instruct for the embedded model.")],
    out: Annotated[Path, typer.Argument(help="Folder for the checkpoint; new or empty.")],
    calibration: Annotated[
        Path,
        typer.Option(
            "--calibration",
            help='Text like what the model will see: a text file, or .jsonl with {"text": ...}, {"prompt": ...} or '
            '{"messages": [...]} a line. A tenth of it, at the end, is kept to measure perplexity on. fp8 needs nothing else.',
        ),
    ],
    format: Annotated[str, typer.Option(help="gptq, awq or fp8.")] = "gptq",
    bits: Annotated[int | None, typer.Option(help="gptq: 2, 3, 4 or 8; awq: 4; fp8: 8. Default 4.")] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="Input features that share a scale, -1 for all; halved until it divides them. Default 128."),
    ] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--sym/--asym", help="Without or with zero points. Default: gptq without, awq with.")
    ] = None,
    act_order: Annotated[
        bool | None, typer.Option("--act-order/--no-act-order", help="gptq: columns of large inputs first. Default yes.")
    ] = None,
    static_groups: Annotated[
        bool | None,
        typer.Option(
            "--static-groups/--no-static-groups",
            help="gptq: with --act-order, groups stay neighbouring columns, which run faster. Default yes.",
        ),
    ] = None,
    damping: Annotated[float | None, typer.Option(help="gptq: added to the Hessian's diagonal. Default 0.01.")] = None,
    sequences: Annotated[int, typer.Option(help="Most sequences to calibrate on.", min=2)] = 128,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.", min=8)] = 512,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Quantize a model's linear layers with calibration text, and write a checkpoint that other tools read, too."""
    from .quantize import run_quantize

    options = {"method": format, "bits": bits, "group_size": group_size, "symmetric": symmetric}
    options |= {"act_order": act_order, "static_groups": static_groups, "damping": damping}
    loading = {"model": model, "dtype": dtype, "device": device, "threads": threads, "progress": not quiet}
    run_quantize(out, calibration, sequences, length, options, loading)


@app.command(
    "lm-eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)
def lm_eval(context: typer.Context) -> None:
    """lm-evaluation-harness's own command, `lm_eval`, which then knows `--model hf-paged`."""
    from .lm_eval import run_lm_eval

    run_lm_eval(context.args)


@app.command()
def demo(
    model: Model = None,
    requests: Annotated[int, typer.Option(help="How many requests to compare.", min=1)] = 32,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Chat with a real model, then run the same requests through stock transformers and through hf_paged."""
    from .demo import run_demo

    raise typer.Exit(0 if run_demo(model, requests, device, threads) else 1)


app.command()(bench.bench)
