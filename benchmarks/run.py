"""Run a benchmark with any Python that has torch, triton and transformers; the project need not be installed.

    python benchmarks/run.py gpu.check
    python benchmarks/run.py gpu --minutes 8.5
    python benchmarks/run.py gpu.kernels --sweep
    python benchmarks/run.py hetero

is `python -m hf_paged.benchmarks.gpu.check` and so on of an installed one.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    sys.path[0] = str(HERE.parent)  # instead of this folder
    import hf_paged

    if importlib.util.find_spec("hf_paged.benchmarks") is None:  # its folder lies beside the package's
        spec = importlib.util.spec_from_file_location(
            "hf_paged.benchmarks", HERE / "__init__.py", submodule_search_locations=[str(HERE)]
        )
        sys.modules[spec.name] = hf_paged.benchmarks = importlib.util.module_from_spec(spec)
    name = f"hf_paged.benchmarks.{sys.argv.pop(1)}"
    runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
