"""Where the compile gate leaves its table for the end of the test run."""

import pytest

TABLE = pytest.StashKey[list]()


def print_table(terminal, lines: list[dict]) -> None:
    terminal.section("compiled kernels")
    terminal.write_line(f"{'case':<34} {'kernel':<34} {'arch':<7} warps  regs  shared  mma")
    for line in sorted(lines, key=lambda line: (line["case"], line["kernel"])):
        terminal.write_line(
            f"{line['case']:<34} {line['kernel']:<34} {line['arch']:<7} {line['warps']:>5} {line['registers']:>5} "
            f"{line['shared']:>7}  {line['mma'] or '-'}"
        )
