#!/usr/bin/env python3
"""Compile every kernel for GPUs that are not here, through its own launcher, and print what came of it.

    python tests/gpu/compile_kernels.py [--arch sm_90 ...] [--only NAME] [--json FILE]

No GPU, driver or CUDA toolkit is needed: Triton's wheel has ptxas and cuobjdump. One line per launch: registers and shared
memory of a program, bytes spilled, matrix instructions. The exit status is 1 if anything spills, does not fit, lacks an
instruction that its case names, or converts integers where its case says that it need not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported: interpreted functions cannot be compiled
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import triton  # noqa: E402
import triton.backends.nvidia  # noqa: E402
from compile_cases import CASES, Case  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.driver import DriverBase  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402

from hf_paged_kernels.triton.launch import recording  # noqa: E402

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # bytes a program may have
TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
INSTRUCTIONS = ("HMMA", "HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "IMMA", "IGMMA")


@dataclass
class Line:
    """One compiled launch; `problem` is empty if it passes."""

    case: str
    arch: str
    kernel: str
    warps: int
    registers: int
    shared: int
    spilled: int
    mma: str
    conversions: int = 0  # from integers to floats, in NVIDIA's machine code
    problem: str = ""

    HEADER = f"{'case':<34} {'arch':<7} {'kernel':<34} warps  regs  shared  spill  mma"

    def __str__(self) -> str:
        text = f"{self.case:<34} {self.arch:<7} {self.kernel:<34} {self.warps:>5} {self.registers:>5} "
        return f"{text}{self.shared:>7} {self.spilled:>6}  {self.mma or '-'}  {self.problem}".rstrip()


class Elsewhere(DriverBase):
    """Stands in for the driver of a GPU that is not here, so that `kernel.warmup` compiles for it."""

    def __init__(self, target: GPUTarget):
        self.target = target

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self):
        return self.target

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def get_benchmarker(self):
        return None

    def get_current_device(self):
        return (self.target.backend, self.target.arch)

    def get_current_stream(self, device):
        return 0


def compile_case(case: Case, arch: str) -> list[Line]:
    lines: list[Line] = []

    def compile_launch(kernel, grid, args, meta):
        name = kernel.__name__.strip("_")
        if any(size < 1 for size in grid):
            lines.append(Line(case.name, arch, name, 0, 0, 0, 0, "", problem=f"launched on an empty grid {grid}"))
            return
        compiled = kernel.warmup(*args, grid=grid, **meta)
        lines.append(inspect(case.name, arch, name, compiled))

    with recording(arch, compile_launch):
        case.run()
    wanted = case.mma.get(arch)
    if not lines:
        lines.append(Line(case.name, arch, "", 0, 0, 0, 0, "", problem="launched nothing"))
    elif wanted and not any(wanted in line.mma for line in lines):
        lines[0].problem = f"no {wanted} in any of its kernels"
    for line in lines:
        if case.without_conversions and line.conversions:
            line.problem = line.problem or f"{line.conversions} conversions from integers"
    return lines


def inspect(case: str, arch: str, kernel: str, compiled) -> Line:
    shared = compiled.metadata.shared
    registers, spilled, mma, conversions = (_amd if arch.startswith("gfx") else _nvidia)(compiled, arch)
    line = Line(case, arch, kernel, compiled.metadata.num_warps, registers, shared, spilled, mma, conversions)
    if spilled:
        line.problem = f"spills {spilled} bytes"
    if shared > SHARED_LIMIT[arch]:
        line.problem = f"needs {shared} bytes of shared memory, there are {SHARED_LIMIT[arch]}"
    return line


def _amd(compiled, arch: str) -> tuple[int, int, str, int]:
    text = compiled.asm["amdgcn"]

    def value(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", text)[1])

    spilled = 4 * (value("vgpr_spill_count") + value("sgpr_spill_count"))
    return value("vgpr_count"), spilled, "mfma" if "v_mfma" in text else "", 0


def _nvidia(compiled, arch: str) -> tuple[int, int, str, int]:
    """Registers and machine code from the binary; only ptxas itself tells what was spilled."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        usage = _run("cuobjdump", "--dump-resource-usage", cubin)
        code = _run("cuobjdump", "-sass", cubin)
        name = re.search(r"\.target (sm_\w+)", compiled.asm["ptx"])[1]
        log = _run(get_ptxas(int(arch[3:])).path, "-v", f"--gpu-name={name}", ptx, "-o", Path(folder, "again"))
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log)))
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in INSTRUCTIONS}
    mma = " ".join(f"{name} {count}" for name, count in counts.items() if count)
    return registers, spilled, mma, len(re.findall(r"\bI2FP?\b", code))


def _run(tool: str, *arguments) -> str:
    """What one of the tools says. A path stands for itself."""
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=ARCHS, action="append")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write the lines there too")
    options = parser.parse_args()
    lines: list[Line] = []
    print(Line.HEADER)
    for arch in options.arch or ARCHS:
        triton.runtime.driver.set_active(Elsewhere(target(arch)))
        for case in CASES:
            if arch not in case.without and (not options.only or options.only in case.name):
                new = compile_case(case, arch)
                lines += new
                print(*new, sep="\n", flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(line) for line in lines]))
    return int(any(line.problem for line in lines))


def target(arch: str) -> GPUTarget:
    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


if __name__ == "__main__":
    sys.exit(main())
