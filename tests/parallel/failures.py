"""What becomes of two ranks when one fails: each case in a pair of processes forked from this one, which has the imports."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

import hf_paged
from hf_paged import ParallelError, SamplingParams

TIMEOUT = 3.0  # seconds a rank waits for another
DEADLINE = 40.0  # for both to end


def load(folder: Path):
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2)).eval()
    return hf_paged.patch(model, parallel_timeout=TIMEOUT)


def after(steps: int, module: torch.nn.Module, action) -> None:
    """Call `action` in the middle of a forward, that many forwards from now."""
    left = [steps]

    def hook(*_):
        left[0] -= 1
        if not left[0]:
            action()

    module.register_forward_hook(hook)


def lead(model, report: Path) -> None:
    """Rank 0: two long requests; reports how they ended."""
    engine, ends = hf_paged.engine_of(model), {}

    def note(output):
        if output.finished:
            ends[output.request_id] = str(output.error)

    for name in ("a", "b"):
        engine.add([5, 6, 7], SamplingParams(max_tokens=200, detokenize=False), request_id=name, on_output=note)
    raised = None
    try:
        while engine.has_unfinished():
            engine.step()
    except (ParallelError, KeyboardInterrupt) as error:
        raised = str(error) or type(error).__name__
    try:
        engine.add([1], SamplingParams(max_tokens=2, detokenize=False))
        engine.step()
        again = "ran"
    except ParallelError:
        again = "refused"
    report.write_text(json.dumps({"ends": ends, "raised": raised, "again": again}))
    if raised:
        raise SystemExit(7)


def die(model):
    os.kill(os.getpid(), signal.SIGKILL)


def hang(model):
    os.kill(os.getpid(), signal.SIGSTOP)


def fail(model):
    raise ValueError("a bad day")


def disagree(model):
    model._hf_paged.team._number = 99


def interrupt(model):
    os.kill(os.getpid(), signal.SIGINT)


def in_the_middle(culprit: int, action, forwards: int = 5):
    """A case: rank `culprit` does that in the middle of a forward, the first of which is the prompts'."""

    def case(rank, model, report):
        after(forwards, model.model.layers[1], lambda: rank == culprit and action(model))
        if rank:
            hf_paged.follow(model)
        lead(model, report)

    return case


def hooks_on_rank_0(rank, model, report):
    if rank:
        hf_paged.follow(model)
    model.model.layers[1].register_forward_hook(lambda *_: None)
    lead(model, report)


def rank_0_just_ends(rank, model, report):
    if rank:
        hf_paged.follow(model)
        report.write_text("{}")
    else:
        hf_paged.engine_of(model).generate([[5, 6]], SamplingParams(max_tokens=2, detokenize=False))


CASES = {
    "rank_1_dies": in_the_middle(1, die),
    "rank_1_dies_in_prefill": in_the_middle(1, die, forwards=1),
    "rank_1_hangs": in_the_middle(1, hang),
    "rank_1_fails": in_the_middle(1, fail),
    "rank_1_disagrees": in_the_middle(1, disagree),
    "hooks_on_rank_0": hooks_on_rank_0,
    "rank_0_dies": in_the_middle(0, die),
    "rank_0_hangs": in_the_middle(0, hang),
    "rank_0_interrupted": in_the_middle(0, interrupt),
    "rank_0_just_ends": rank_0_just_ends,
}


def child(case, rank: int, port: int, folder: Path, report: Path, output: Path) -> int:
    """Forks a rank and returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    code = 0
    try:
        case(rank, load(folder), report)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    import atexit

    atexit._run_exitfuncs()  # as an interpreter that ends does, but for what was forked with it
    os._exit(code)


def wait(pids: list[int], deadline: float) -> list[int | None]:
    """Exit codes, negative for signals, of those that ended in time."""
    codes: list[int | None] = [None] * len(pids)
    while None in codes and time.monotonic() < deadline:
        for place, pid in enumerate(pids):
            if codes[place] is None:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[place] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return codes


def run(name: str, folder: Path, scratch: Path) -> dict:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    report, outputs = scratch / f"{name}.json", [scratch / f"{name}.{rank}" for rank in (0, 1)]
    began = time.monotonic()
    pids = [child(CASES[name], rank, port, folder, report, outputs[rank]) for rank in (0, 1)]
    hung = {"rank_1_hangs": 1, "rank_0_hangs": 0}.get(name)
    if hung is None:
        codes = wait(pids, began + DEADLINE)
    else:  # the other ends by itself; this one when it can
        codes = [None, None]
        [codes[1 - hung]] = wait([pids[1 - hung]], began + DEADLINE)
        os.kill(pids[hung], signal.SIGCONT)
        [codes[hung]] = wait([pids[hung]], time.monotonic() + DEADLINE)
    seconds = time.monotonic() - began
    for pid, code in zip(pids, codes):
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))  # raises if something still listens there
    said = [output.read_text() for output in outputs]
    return {"codes": codes, "seconds": seconds, "said": said, "report": json.loads(report.read_text() if report.exists() else "{}")}


def main(out: str, *names: str) -> None:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    assert dist.is_available()
    scratch = Path(out).parent
    tiny_model("llama", vocab_size=200).save_pretrained(scratch / "model")
    results = {name: run(name, scratch / "model", scratch) for name in CASES if not names or name in names}
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
