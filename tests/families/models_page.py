"""docs/models.md from what coverage.py found with each version of transformers."""

from __future__ import annotations

import json
from pathlib import Path

INTRO = """# Models

Every name of transformers' `MODEL_FOR_CAUSAL_LM_MAPPING`, and those of its `MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING` that
run, written by `make models` (tests/families/coverage.py). Of each a tiny random model is built in fp32 and run stock and
patched on ragged prompts, with chunked prefill, prefix hits and preemption, and so are variants of it that change its masks
or layers. [vision.md](vision.md) tells which of them take images on pages. **Right**: the same greedy tokens, and logits
within 1e-4 of the largest one. **Refused**: `hf_paged.patch` raises UnsupportedModel with the reason given here. **Not
built**: there is no tiny model that stock transformers itself generates text with. Nothing may be wrong.

"""
WORDS = {"right": "right", "refused": "refused", "unbuilt": "not built", "wrong": "**wrong**"}


def write(root: Path, status_of) -> None:
    """Write the page from build/coverage-*.json; `status_of` makes one status and note of a name's variants."""
    found = {path.stem.removeprefix("coverage-"): json.loads(path.read_text())
             for path in sorted((root / "build").glob("coverage-*.json"))}  # fmt: skip
    versions = sorted(found, key=_version, reverse=True)
    lines = [INTRO.rstrip("\n"), ""]
    for version in versions:
        counts: dict[str, int] = {}
        for results in found[version].values():
            status, _ = status_of(results)
            counts[status] = counts.get(status, 0) + 1
        numbers = ", ".join(f"{counts[status]} {word}" for status, word in WORDS.items() if status in counts)
        lines.append(f"- transformers {version}: {len(found[version])} names: {numbers}")
    lines += ["", f"| name | model type | {' | '.join(versions)} | |", f"|---|---{'|---' * len(versions)}|---|"]
    for name in sorted(set().union(*found.values())):
        cells, notes, model_type = [], [], ""
        for version in versions:
            if name not in found[version]:
                cells.append("")
                continue
            status, note = status_of(found[version][name])
            model_type = model_type or found[version][name][name].get("model_type", "")
            cells.append(WORDS[status])
            if note and note not in notes:
                notes.append(note)
        lines.append(f"| {name} | {model_type} | {' | '.join(cells)} | {_cell('; '.join(notes))} |")
    page = root / "docs" / "models.md"
    page.parent.mkdir(exist_ok=True)
    page.write_text("\n".join(lines) + "\n")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
