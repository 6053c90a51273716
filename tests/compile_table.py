"""The compile gate's table, printed at the end of the test run: its lines come as properties of the tests' reports."""

COMPILED = "compiled kernels"


def compiled(terminal) -> list[dict]:
    reports = (report for reports in terminal.stats.values() for report in reports)
    properties = [entry for report in reports for entry in getattr(report, "user_properties", ())]
    return [line for name, lines in properties if name == COMPILED for line in lines]


def print_table(terminal, lines: list[dict]) -> None:
    terminal.section(COMPILED)
    terminal.write_line(f"{'case':<34} {'kernel':<34} {'arch':<7} warps  regs  shared  mma")
    for line in sorted(lines, key=lambda line: (line["case"], line["kernel"])):
        terminal.write_line(
            f"{line['case']:<34} {line['kernel']:<34} {line['arch']:<7} {line['warps']:>5} {line['registers']:>5} "
            f"{line['shared']:>7}  {line['mma'] or '-'}"
        )
