"""All benchmarks of mixed batches, one after another: about six minutes on two cores.

    python benchmarks/run.py hetero [--model MODEL] [--threads 2] [--rounds 3]
"""

from __future__ import annotations

import sys

from . import adapters, grouped, mixed, score

PARTS = {"mixed": mixed, "score": score, "grouped": grouped, "adapters": adapters}


def main(arguments: list[str] | None = None) -> None:
    """Options are those that all of them have."""
    for name, part in PARTS.items():
        print(f"hetero.{name}", flush=True)
        part.main(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
