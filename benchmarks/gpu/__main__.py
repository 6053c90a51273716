"""Kernels, then the engine beside stock transformers, in eight minutes.

    python -m hf_paged.benchmarks.gpu [--minutes 7.5] [--device cuda] [--tiny]

Every figure is printed and written to benchmarks/results/gpu/gpu.csv as it comes. Run `check` first: a wrong kernel's
speed is of no interest.
"""

from __future__ import annotations

import sys

from . import engine, kernels
from .session import add_models, open_session, option_parser

KERNELS_SHARE = 0.3  # of the time; the engine's part takes what is left


def main(arguments: list[str] | None = None) -> int:
    parser = option_parser(__doc__)
    add_models(parser)
    options = parser.parse_args(arguments)
    session = open_session(options)
    whole = session.clock
    session.clock = whole.part(KERNELS_SHARE * whole.left)
    kernels.run(session)
    session.clock = whole
    engine.run(session, options.models)
    return session.report.close()


if __name__ == "__main__":
    sys.exit(main())
