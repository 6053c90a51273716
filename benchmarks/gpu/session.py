"""What all parts of a benchmark run share."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .. import schema
from .check import repair_interpreter
from .models import SHAPES, TINY, ModelShape
from .report import Clock, Report
from .timing import ROUNDS, num_sets

MINUTES = 7.5


@dataclass
class Session:
    """A run on one device.

    Attributes:
        backend: of the kernels; "auto" is Triton on a GPU.
        tiny: small sizes and few rounds: to see that everything runs, on a CPU too. Its figures mean nothing.
        clock: the time left for all parts.
        copy_bandwidth: bytes per second of a large copy within the device, reads and writes counted; measured first.
    """

    device: torch.device
    backend: str
    tiny: bool
    report: Report
    clock: Clock
    copy_bandwidth: float = field(default=0.0, init=False)

    @property
    def shapes(self) -> dict[str, ModelShape]:
        return TINY if self.tiny else SHAPES

    @property
    def rounds(self) -> int:
        return 2 if self.tiny else ROUNDS

    @property
    def dtype(self) -> torch.dtype:
        """bf16; for the C++ kernels of a dry run float32."""
        return torch.bfloat16 if self.device.type != "cpu" or self.backend == "triton" else torch.float32

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def sets(self, num_bytes: float) -> int:
        return 1 if self.tiny else num_sets(num_bytes)

    def fits(self, num_bytes: float) -> bool:
        """Whether so much may be allocated now."""
        return self.device.type != "cuda" or num_bytes < 0.8 * torch.cuda.mem_get_info(self.device)[0]


def option_parser(description: str, minutes: float = MINUTES) -> argparse.ArgumentParser:
    """With the options that every benchmark of a GPU takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=minutes, help="what does not fit into them is named")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="auto", help="of the kernels: auto, triton, reference")
    parser.add_argument("--tiny", action="store_true", help="a dry run: tiny sizes, no meaning in the figures")
    parser.add_argument("--out", type=Path, default=schema.results_folder() / "gpu", help="folder of the CSV files")
    return parser


def add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", type=_models, default=list(SHAPES), help=f"of {', '.join(SHAPES)}")


def open_session(options: argparse.Namespace) -> Session:
    """The session of these options. Exits with a message where they ask for what cannot be."""
    device = torch.device(options.device)
    if device.type == "cpu" and not options.tiny:
        raise SystemExit("no GPU was found: on a CPU there is only a dry run, --tiny")
    repair_interpreter(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    report = Report(options.out / ("tiny.csv" if options.tiny else "gpu.csv"), device, aims=not options.tiny)
    clock = Clock(60 * options.minutes)
    return Session(device=device, backend=options.backend, tiny=options.tiny, report=report, clock=clock)


def _models(names: str) -> list[str]:
    chosen = names.split(",")
    if unknown := set(chosen) - set(SHAPES):
        raise argparse.ArgumentTypeError(f"no model {sorted(unknown)[0]!r}; there are {', '.join(SHAPES)}")
    return chosen
