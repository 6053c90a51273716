"""Whether everything that runs on a GPU is right: every kernel against float32, then the engine against stock.

    python -m hf_paged.benchmarks.gpu.check [--only attention,engine] [--small] [--device cuda]

One line per area, with the case that came closest to its bound (or beyond it); the exit status is 1 if any area fails.
Inputs are random, never zeros. Needs torch, triton and transformers, no test framework. On a CPU it runs in Triton's
interpreter (TRITON_INTERPRET=1, from a checkout), where only `--small` ends in reasonable time.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from hf_paged_kernels import ops

from . import check_attention, check_engine, check_layers, check_quantized, check_sampling
from .checking import Case, Setting, run_area
from .report import device_name, release_memory

AREAS: dict[str, Callable[[Setting], Iterator[Case]]] = {
    **check_layers.AREAS,
    **{name: area for name, area in check_quantized.AREAS.items() if "engine" not in name},
    **check_attention.AREAS,
    **check_sampling.AREAS,
    **check_engine.AREAS,
    "quantized-engine": check_quantized.engine,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"areas whose names begin with one of these; there are {', '.join(AREAS)}")
    parser.add_argument("--small", action="store_true", help="few and small cases")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="triton", help="of the kernels (reference: to check this check)")
    options = parser.parse_args(arguments)
    wanted = tuple(options.only.split(",")) if options.only else ("",)
    areas = {name: area for name, area in AREAS.items() if name.startswith(wanted)}
    if not areas:
        parser.error(f"no such area; there are {', '.join(AREAS)}")
    setting = Setting(device=torch.device(options.device), small=options.small, backend=options.backend)
    repair_interpreter(setting.device)
    if reason := ops.why_unsupported(setting.backend, setting.device):
        parser.error(f"backend {setting.backend} cannot run on {setting.device}: {reason}")
    print(f"{device_name(setting.device)}, torch {torch.__version__}, backend {setting.backend}", flush=True)
    return check(areas, setting)


def check(areas: dict[str, Callable[[Setting], Iterator[Case]]], setting: Setting) -> int:
    """Run the areas; 0 if all passed, else 1."""
    failed = []
    for name, area in areas.items():
        if not run_area(name, area(setting)):
            failed.append(name)
        release_memory(setting.device)
    print(f"FAILED: {', '.join(failed)}" if failed else f"all {len(areas)} areas passed")
    return 1 if failed else 0


def repair_interpreter(device: torch.device) -> None:
    """On a CPU, what the tests do: without their repairs Triton's interpreter gets products in bf16 wrong."""
    path = Path(__file__).resolve().parents[2] / "tests" / "triton_interpreter.py"
    if device.type == "cpu" and path.exists() and path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
        sys.path.append(str(path.parent))  # where its own parts are
        spec.loader.exec_module(module)


if __name__ == "__main__":
    sys.exit(main())
