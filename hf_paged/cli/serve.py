"""`hf-paged serve`: an OpenAI-compatible server."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..base.images import ImageLimits
from .common import (
    IMAGE_QUEUE_MEMORY,
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
    Quantization,
    Speculation,
    Threads,
    UserError,
    follow_rank_0,
    offload_of,
    open_engine,
)

SPINS = "1000"  # some microseconds
ENVIRONMENT = "HF_PAGED"  # what its variables begin with

_ENGINE, _LISTEN, _TLS = "Model", "Listening", "TLS"
_ACCESS, _BOUNDS, _WATCH = "Who may ask", "Bounds", "Logs and traces"

Model = Annotated[
    str | None,
    typer.Argument(
        help="Hub id or local folder; without one, the embedded SmolLM2-135M-Instruct.",
        show_default=False,
        envvar=f"{ENVIRONMENT}_MODEL",
    ),
]


def _option(panel: str, text: str, *names: str, **more):
    return typer.Option(*names, help=text, rich_help_panel=panel, show_envvar=False, **more)


def serve(
    model: Model = None,
    served_model_name: Annotated[str | None, _option(_ENGINE, "What clients call the model. Default: its id or folder.")] = None,
    max_num_seqs: Annotated[int, _option(_ENGINE, "Most sequences running at once.", min=1)] = 64,
    max_batch_tokens: Annotated[
        int | None,
        _option(_ENGINE, "Most tokens of a step: fewer keep streams steady beside long prompts. Default: 512; CUDA: 8192.", min=1),
    ] = None,
    max_model_len: Annotated[int | None, _option(_ENGINE, "Most tokens of a sequence. Default: the model's limit.")] = None,
    kv_cache_memory: Annotated[str | None, _option(_ENGINE, 'Most memory of the KV cache: "2GiB", or "0.5" for a share of what is free.')] = None,
    offload: Annotated[str | None, _option(_ENGINE, 'Memory of the host for evicted prefixes and preempted requests, such as "8GiB".')] = None,
    offload_disk: Annotated[Path | None, _option(_ENGINE, OFFLOAD_DISK)] = None,
    offload_disk_memory: Annotated[str, _option(_ENGINE, OFFLOAD_DISK_MEMORY)] = "20GiB",
    kv_dtype: Annotated[str | None, _option(_ENGINE, "fp8, int8, or a floating type. Default: the model's.")] = None,
    policy: Annotated[str, _option(_ENGINE, "Who runs first: fcfs; priority (lower numbers); or fair (users served least).")] = "fcfs",
    adapter: Annotated[
        list[str] | None, _option(_ENGINE, "A PEFT adapter, as NAME=FOLDER: a model's name for clients; repeatable.")
    ] = None,
    chat_template: Annotated[
        Path | None, _option(_ENGINE, "A file with a chat template instead of the model's, such as one that knows tools.")
    ] = None,
    tool_parser: Annotated[
        str, _option(_ENGINE, "How the model writes calls of functions: a format's name, auto (by the chat template), or none.")
    ] = "auto",
    reasoning_parser: Annotated[
        str, _option(_ENGINE, "How the model writes what it thinks first: a format's name, auto, or none.")
    ] = "auto",
    speculation: Speculation = None,
    draft_model: DraftModel = None,
    quantization: Quantization = None,
    expert_parallel: ExpertParallel = False,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    host: Annotated[str, _option(_LISTEN, "Address to listen at; 0.0.0.0 is all of the machine's.")] = "127.0.0.1",
    port: Annotated[int, _option(_LISTEN, "0: any free port.", min=0, max=65535)] = 8000,
    uds: Annotated[Path | None, _option(_LISTEN, "A Unix socket instead of an address.")] = None,
    root_path: Annotated[str, _option(_LISTEN, "The prefix that a proxy takes off the paths, such as /llm.")] = "",
    backlog: Annotated[int, _option(_LISTEN, "Connections that wait to be accepted.", min=1)] = 2048,
    keep_alive: Annotated[float, _option(_LISTEN, "Seconds that an idle connection is kept.")] = 5,
    ssl_certfile: Annotated[Path | None, _option(_TLS, "The certificate, and those between it and the root.")] = None,
    ssl_keyfile: Annotated[Path | None, _option(_TLS, "Its key, if that is in a file of its own.")] = None,
    ssl_keyfile_password: Annotated[
        str | None, _option(_TLS, f"What the key is encrypted with; better in {ENVIRONMENT}_SSL_KEYFILE_PASSWORD.")
    ] = None,
    ssl_ca_certs: Annotated[Path | None, _option(_TLS, "Clients need a certificate signed by one of these.")] = None,
    api_key: Annotated[
        list[str] | None,
        _option(_ACCESS, f"A key clients must send; repeatable. Better in a file, or in {ENVIRONMENT}_API_KEYS, with commas."),
    ] = None,
    api_key_file: Annotated[Path | None, _option(_ACCESS, "Keys, one a line.")] = None,
    cors_origin: Annotated[
        list[str] | None,
        _option(_ACCESS, "A web page's origin, such as https://example.org, that may ask from a browser; repeatable; * is all."),
    ] = None,
    request_chat_templates: Annotated[
        bool, _option(_ACCESS, "Let requests bring chat templates, which are programs.", "--request-chat-templates")
    ] = False,
    enable_adapters: Annotated[
        bool, _option(_ACCESS, "Let requests load adapters, from folders of this machine.", "--enable-adapters")
    ] = False,
    allowed_media_hosts: Annotated[list[str] | None, _option(_ACCESS, MEDIA_HOSTS)] = None,
    page: Annotated[bool, _option(_ACCESS, "A page to chat with, at /.", "--page/--no-page")] = True,
    max_queue: Annotated[int, _option(_BOUNDS, "Most requests waiting; more are answered 429.", min=1)] = 1024,
    stored_responses: Annotated[
        int, _option(_BOUNDS, "Most answers of /v1/responses that are kept, in memory; 0: none.", min=0)
    ] = 1024,
    request_timeout: Annotated[
        float | None, _option(_BOUNDS, "Seconds after which a request ends with an error. Requests may ask for less.")
    ] = None,
    grace: Annotated[
        float, _option(_BOUNDS, "Seconds that running requests get when the server is stopped.", min=0)
    ] = 30,
    header_timeout: Annotated[float, _option(_BOUNDS, "Seconds in which a request's headers must come.")] = 15,
    body_timeout: Annotated[float, _option(_BOUNDS, "Seconds in which a request's body must come.")] = 60,
    max_images: Annotated[int, _option(_BOUNDS, MAX_IMAGES, min=1)] = 16,
    max_image_pixels: Annotated[int, _option(_BOUNDS, MAX_IMAGE_PIXELS, min=1)] = 1 << 25,
    image_queue_memory: Annotated[str, _option(_BOUNDS, IMAGE_QUEUE_MEMORY)] = "4GiB",
    media_timeout: Annotated[float, _option(_BOUNDS, MEDIA_TIMEOUT)] = 10,
    max_connections: Annotated[
        int | None, _option(_BOUNDS, "Most open connections; more are closed. Default: as many as the system allows.", min=1)
    ] = None,
    log_format: Annotated[str, _option(_WATCH, "text, or json: one object a line.")] = "text",
    log_level: Annotated[str, _option(_WATCH, "debug, info, warning or error.")] = "info",
    log_client_address: Annotated[
        bool, _option(_WATCH, "Log who asked, by address.", "--log-client-address")
    ] = False,
    otlp_endpoint: Annotated[
        str | None, _option(_WATCH, "Send OpenTelemetry traces there by OTLP over HTTP, such as http://localhost:4318.")
    ] = None,
) -> None:
    """Serve a model to OpenAI's clients, until SIGINT or SIGTERM.

    Every option may come from the environment: --max-queue is HF_PAGED_MAX_QUEUE.
    """
    settings = {
        "model_name": served_model_name,
        "tool_parser": tool_parser,
        "reasoning_parser": reasoning_parser,
        "stored_responses": stored_responses,
        "request_timeout": request_timeout,
        "request_chat_templates": request_chat_templates,
        "cors_origins": tuple(cors_origin or ()),
        "body_timeout": body_timeout,
        "enable_adapters": enable_adapters,
        "page": page,
        "allowed_media_hosts": tuple(allowed_media_hosts or ()),
        "media_timeout": media_timeout,
        "log_client_address": log_client_address,
    }
    process = {"host": host, "port": port, "uds": uds, "root_path": root_path, "backlog": backlog, "grace": grace}
    process |= {"keep_alive": keep_alive, "header_timeout": header_timeout, "max_connections": max_connections}
    process |= {"ssl_certfile": ssl_certfile, "ssl_keyfile": ssl_keyfile, "ssl_ca_certs": ssl_ca_certs}
    process |= {"ssl_keyfile_password": ssl_keyfile_password, "log_format": log_format, "log_level": log_level}
    engine = {"max_num_seqs": max_num_seqs, "max_queue": max_queue, "max_model_len": max_model_len, "policy": policy}
    engine |= {"max_batch_tokens": max_batch_tokens, "kv_cache_memory": kv_cache_memory, "kv_dtype": kv_dtype}
    engine["offload"] = offload_of(offload, offload_disk, offload_disk_memory)
    engine["images"] = ImageLimits(
        max_count=max_images, max_pixels=max_image_pixels, queue_memory=image_queue_memory
    )
    loading = {"model": model, "dtype": dtype, "device": device, "threads": threads, "progress": sys.stderr.isatty()}
    loading |= {"speculation": speculation, "draft_model": draft_model, "quantization": quantization, "engine": engine}
    loading |= {"expert_parallel": expert_parallel}
    template = None if chat_template is None else chat_template.read_text(encoding="utf-8")
    own = {"adapters": _folders(adapter or []), "chat_template": template}
    raise typer.Exit(_run(api_key or [], api_key_file, otlp_endpoint, own, settings, process, loading))


def _folders(adapters: list[str]) -> dict[str, str]:
    """NAME=FOLDER, by name."""
    folders = dict(adapter.partition("=")[::2] for adapter in adapters)
    for name, folder in folders.items():
        if not name or not folder:
            raise UserError(f"--adapter takes NAME=FOLDER, not {name or '=' + folder!r}")
    if len(folders) < len(adapters):
        raise UserError("--adapter: two adapters have the same name")
    return folders


def _run(
    keys: list[str],
    key_file: Path | None,
    otlp_endpoint: str | None,
    own: dict,
    settings: dict,
    process: dict,
    loading: dict,
) -> int:
    """Load, patch, serve until a signal comes; the exit status. What is wrong with the options shows before the weights are read."""
    _spin_briefly()
    follow_rank_0(**loading)
    try:
        from hf_paged.integrations.openai import Settings, create_app
        from hf_paged.integrations.openai.auth import read_keys
        from hf_paged.integrations.openai.serve import Process, listening, serve
    except ImportError as error:
        raise UserError(f"hf-paged serve needs {error.name}: pip install hf_paged[server]") from None
    settings = Settings(api_keys=read_keys(keys, key_file), **settings)
    process = Process(**process)
    tracing = None if otlp_endpoint is None else _tracing(otlp_endpoint)
    with listening(process) as listeners, open_engine(**loading) as (_, tokenizer, engine):
        if own["chat_template"] is not None:
            tokenizer.chat_template = own["chat_template"]
        for name, folder in own["adapters"].items():
            engine.load_adapter(name, folder)
        team = engine.model.team
        if team is not None:  # one rank alone cannot go on: let requests hear of it, and end
            team.on_failure(lambda: os.kill(os.getpid(), signal.SIGTERM))
        status = serve(create_app(engine, settings, tracer_provider=tracing), process, listeners)
        if team is not None:
            team.check()
        return status


def _spin_briefly() -> None:
    """Let the engine's OpenMP threads sleep soon when they wait for each other. It has to be said before torch is imported.

    By default they spin for milliseconds, on cores that the event loop and other processes need: where there are as many
    threads as cores, whoever takes one of them for a moment stops all the others.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


def _tracing(endpoint: str):
    try:
        from hf_paged.integrations.openai.tracing import exporting
    except ImportError as error:
        raise UserError(f"--otlp-endpoint needs {error.name}: pip install hf_paged[otel]") from None
    return exporting(endpoint)
