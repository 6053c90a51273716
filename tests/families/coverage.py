"""Every causal language model of this transformers against hf_paged: right, refused, or wrong.

    python tests/families/coverage.py [--only NAME ...] [--write] [--resume] [--unlisted]

builds a tiny random model (fp32, CPU) of every name in transformers' MODEL_FOR_CAUSAL_LM_MAPPING, of those in its
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING that are supported, and of every variant in tests/tiny_configs.py, runs it stock and patched on ragged prompts with chunked prefill, prefix hits and preemption
(tests/family_checks.py), and prints one line a name. With --write, docs/models.md is written from the results of all
versions of transformers this was run with (kept in build/coverage-VERSION.json, which --resume continues).

Exit status 1 if any name is wrong, or if a family is listed as supported of which no name is right.

To add a family: see that `--only NAME --unlisted` calls it right (sizes it needs, and variants that change its masks or
layers, go into tests/tiny_configs.py), add it to SUPPORTED in hf_paged/hf/supported.py, run `make models`.
Each name runs in a forked process of its own, so none can hurt another.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import traceback
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import transformers  # noqa: E402
from family_checks import Comparison  # noqa: E402
from tiny_configs import FAMILIES, UNBUILT  # noqa: E402
from tiny_models import tiny_model  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # noqa: E402
from transformers.models.auto.modeling_auto import (  # noqa: E402
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import hf_paged  # noqa: E402
from hf_paged.base.errors import UnsupportedModel  # noqa: E402
from hf_paged.hf import supported  # noqa: E402

TIME_LIMIT = 240  # seconds for all variants of one name
MEMORY_LIMIT = 8 << 30  # bytes of address space
STATE = ROOT / "build" / f"coverage-{transformers.__version__}.json"


def all_names() -> list[str]:
    with_images = supported.SUPPORTED.intersection(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    return sorted(with_images.union(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def labels_of(name: str) -> list[str]:
    """The name itself and its variants."""
    return [name, *(label for label, (family, _) in FAMILIES.items() if family == name and label != name)]


def examine(label: str) -> dict:
    """{"status", "model_type", "detail"} of one model, or a variant of it."""
    if label in UNBUILT:
        return {"status": "unbuilt", "detail": UNBUILT[label]}
    try:
        model = tiny_model(label)
        comparison = Comparison(model)
    except Exception as error:
        return {"status": "unbuilt", "detail": _line(error)}
    result = {"model_type": model.config.model_type}
    try:
        hf_paged.unpatch(hf_paged.patch(model))
    except UnsupportedModel as error:
        return {**result, "status": "refused", "detail": _reason(error)}
    except Exception as error:
        return {**result, "status": "wrong", "detail": _line(error)}
    for check in (
        comparison.check_is_telling,
        comparison.check_generate,
        comparison.check_chunks_and_prefix_hits,
        comparison.check_preemption,
    ):
        try:
            check()
        except Exception as error:
            return {**result, "status": "wrong", "detail": f"{check.__name__}: {_line(error)}"}
    return {**result, "status": "right", "detail": ""}


def _reason(error: UnsupportedModel) -> str:
    """What the refusal says, without what every refusal says."""
    text = str(error).removeprefix("model: ")
    return text.partition(" is not supported: ")[2].partition(". hf_paged")[0] or text


def _line(error: Exception) -> str:
    """The error in one line, with where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]} ({Path(frame.filename).name}:{frame.lineno})"


def _work(name: str, pipe) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    for stream in (1, 2):  # the warnings and prints of 200 models
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    pipe.send({label: examine(label) for label in labels_of(name)})


def run(name: str) -> dict[str, dict]:
    """`examine` of a name and its variants, in a process of its own."""
    fork = multiprocessing.get_context("fork")
    reader, writer = fork.Pipe(duplex=False)
    process = fork.Process(target=_work, args=(name, writer))
    process.start()
    writer.close()
    try:
        if reader.poll(TIME_LIMIT):
            return reader.recv()
        failed = f"took more than {TIME_LIMIT} s"
    except EOFError:
        process.join()
        failed = f"the process died (exit status {process.exitcode})"
    finally:
        process.kill()
        process.join()
    return {name: {"status": "wrong", "detail": failed}}


def status_of(results: dict[str, dict]) -> tuple[str, str]:
    """A name's (status, note) from those of its variants; the first entry is the name itself."""
    for label, result in results.items():
        if result["status"] == "wrong":
            return "wrong", f"{label}: {result['detail']}"
    (name, base), *variants = results.items()
    if base["status"] != "right":
        return base["status"], base["detail"]
    notes = [f"{label}: {result['status']}: {result['detail']}" for label, result in variants
             if result["status"] != "right"]  # fmt: skip
    return "right", "; ".join(notes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=None, help="these names only")
    parser.add_argument("--write", action="store_true", help="write docs/models.md")
    parser.add_argument("--resume", action="store_true", help="leave out what the last run has done")
    parser.add_argument("--unlisted", action="store_true", help="try families that are not listed as supported too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    _warm_up()
    names = args.only or all_names()
    if args.unlisted:
        supported.SUPPORTED = _Everything(supported.SUPPORTED)
    known = json.loads(STATE.read_text()) if STATE.exists() and (args.only or args.resume) else {}
    for name in names:
        if args.resume and name in known:
            continue
        known[name] = run(name)
        status, note = status_of(known[name])
        print(f"{status:<8} {name:<28} {note}", flush=True)
        STATE.parent.mkdir(exist_ok=True)
        STATE.write_text(json.dumps(known, indent=1))
    counts = {}
    for name in known:
        counts.setdefault(status_of(known[name])[0], []).append(name)
    print(", ".join(f"{len(found)} {status}" for status, found in sorted(counts.items())))
    unproven = set() if args.only else _unproven(known)
    if unproven:
        print(f"listed as supported, and not found right: {', '.join(sorted(unproven))}")
    if args.write:
        import models_page

        models_page.write(ROOT, status_of)
    return 1 if "wrong" in counts or unproven else 0


def _unproven(results: dict[str, dict]) -> set[str]:
    """Model types that are listed, exist in this transformers, and are neither right nor refused by name under it."""
    proven = {results[name][name].get("model_type") for name in results if status_of(results[name])[0] != "wrong"}
    return {name for name in supported.SUPPORTED if name in CONFIG_MAPPING_NAMES} - proven


def _warm_up() -> None:
    """Import once, before forking, what every name needs."""
    Comparison(tiny_model("llama")).check_generate()


class _Everything(frozenset):
    def __contains__(self, item) -> bool:
        return True


if __name__ == "__main__":
    sys.exit(main())
