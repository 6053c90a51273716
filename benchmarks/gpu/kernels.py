"""Kernels by themselves: how near they come to the memory's bandwidth or the tensor cores' rate, and to other kernels.

    python -m hf_paged.benchmarks.gpu.kernels [--minutes 4] [--sweep]

Inputs are random and cold (see `timing`). Rows go to gpu.csv as they come.
"""

from __future__ import annotations

import sys

import torch

from . import kernels_attention, kernels_layers, kernels_quantized
from .session import Session, open_session, option_parser
from .sweep import sweep
from .timing import measure

COPY_BYTES, TINY_COPY_BYTES = 2**30, 2**16
MINUTES = 4
PARTS = {  # in this order; each with its share of the time
    "decode attention": (kernels_attention.decode, 0.22),
    "latent attention": (kernels_attention.latent, 0.03),
    "prefill attention": (kernels_attention.prefill, 0.2),
    "linear": (kernels_layers.linear, 0.15),
    "quantized linear": (kernels_quantized.linear, 0.25),
    "quantized experts": (kernels_quantized.experts, 0.05),
    "elementwise": (kernels_layers.elementwise, 0.05),
    "sampling": (kernels_layers.sampling, 0.05),
}


def main(arguments: list[str] | None = None) -> int:
    parser = option_parser(__doc__, MINUTES)
    parser.add_argument("--sweep", action="store_true", help="instead, try other tiles than the launchers choose")
    options = parser.parse_args(arguments)
    session = open_session(options)
    sweep(session) if options.sweep else run(session)
    return session.report.close()


def run(session: Session) -> None:
    """All parts, within the session's time."""
    measure_copy_bandwidth(session)
    shares = 1.0
    for name, (part, share) in PARTS.items():
        print(f"{name}:", flush=True)
        part(session, session.clock.part(session.clock.left * share / shares))
        shares -= share


def measure_copy_bandwidth(session: Session) -> None:
    """What a large copy within the device reaches: everything that is bound by memory is a share of it."""
    size = TINY_COPY_BYTES if session.tiny else COPY_BYTES
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=session.device)
    target = torch.empty_like(source)
    timing = measure({"copy": lambda i: target.copy_(source)}, 1, session.device, rounds=session.rounds)["copy"]
    rates = [2 * size / seconds for seconds in timing.samples]
    session.copy_bandwidth = 2 * size / timing.median
    session.report.add("copy", f"{size} bytes", "torch copy_", "rate", "GB/s", [rate / 1e9 for rate in rates])


if __name__ == "__main__":
    sys.exit(main())
