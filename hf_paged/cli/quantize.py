"""`hf-paged quantize`: a model quantized with calibration text and written as a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .common import UserError, check_alone, load

MIB = 2**20


def run_quantize(out: Path, calibration: Path, sequences: int, length: int, options: dict, loading: dict) -> None:
    """Load, quantize, save, and print what came of it."""
    from hf_paged.hf.build import DEFAULT_NAME
    from hf_paged.hf.quantize.calibration import read_texts, split, to_sequences
    from hf_paged.hf.quantize.run import Recipe, quantize_model, save

    recipe = Recipe(**options)  # a mistake shows before the weights are read
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty")
    calibration.open("rb").close()  # an OSError names it
    check_alone("quantize")
    model, tokenizer = load(**loading | {"model": None if loading["model"] == DEFAULT_NAME else loading["model"]})
    texts = read_texts(calibration, tokenizer)
    chosen, held_out = split(to_sequences(texts, tokenizer, length), sequences)
    with _bars(loading["progress"]) as progress:
        report = quantize_model(model, recipe, chosen, held_out, progress=progress)
    save(model, tokenizer, out)
    for line in _lines(report, recipe, len(chosen), len(held_out), length):
        print(line)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(f"saved       {out}: {size / MIB:.0f} MiB of weights")


@contextmanager
def _bars(show: bool) -> Iterator[Callable[[str, int], Callable[[str], None]]]:
    """Yields what starts a progress bar, in place of the one before, and returns what moves it on."""
    from tqdm import tqdm

    bars: list[tqdm] = []

    def start(what: str, steps: int) -> Callable[[str], None]:
        while bars:
            bars.pop().close()
        bar = tqdm(total=steps, desc=what, disable=not show, file=sys.stderr)
        bars.append(bar)

        def done(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        return done

    try:
        yield start
    finally:
        while bars:
            bars.pop().close()


def _lines(report, recipe, calibrated: int, held_out: int, length: int) -> Iterator[str]:
    scheme, how = report.scheme, "e4m3, rows"
    if scheme is not None:
        groups = "rows" if scheme.group_size == -1 else f"groups of {scheme.group_size}"
        points = "symmetric" if scheme.symmetric else "with zero points"
        how = f"{scheme.bits} bits, {groups}, {points}, on {calibrated} sequences of {length} tokens"
    yield f"quantized   {report.layers} linear layers to {recipe.method}, {how}, in {report.seconds:.0f} s"
    if scheme is not None and scheme.group_size != recipe.largest_group:
        yield f"note        groups of {recipe.largest_group} do not divide the input features of every layer"
    for name, reason in report.kept.items():
        yield f"plain       {name}: {reason}"
    for name in report.unscaled:
        yield f"not scaled  {name}: nothing before it can take scales; only its ranges were searched"
    before, after = report.perplexity
    yield f"perplexity  {before:.3f} before, {after:.3f} after, on {held_out} held-out sequences"
    before, after = (size / MIB for size in report.num_bytes)
    yield f"size        {before:.0f} MiB before, {after:.0f} MiB after (all parameters)"
