"""`hf-paged lm-eval`: the command of lm-evaluation-harness, in a process that has hf_paged."""

from __future__ import annotations

import sys

from .common import UserError


def run_lm_eval(arguments: list[str]) -> None:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise UserError(f"hf-paged lm-eval needs {error.name}: pip install hf_paged[lm-eval]") from None
    sys.argv = ["hf-paged lm-eval", *arguments]  # its parser reads them there
    cli_evaluate()
