"""Run by torchrun in Triton's interpreter: recorded decode steps of two ranks, on the stand-in for CUDA graphs (recording.py)."""

from __future__ import annotations

import sys

import checks
import triton_interpreter  # noqa: F401  (applies the interpreter's repairs)
from checks import EngineConfig, pairs, prompts, rank
from recording import Recorder, counting

from hf_paged.engine import build
from hf_paged.runtime import graphs

checks.MODELS = {"llama": dict(vocab_size=200, num_hidden_layers=1)}
checks.CHECKS = []
check = checks.check
CONFIG = EngineConfig(
    attention_backend="triton", cuda_graphs=True, fuse=False, block_size=16, max_model_len=96, max_batch_tokens=64,
    max_num_seqs=4, kv_cache_memory="1MiB",
)  # fmt: skip


Counting = counting(Recorder)
build.cuda_capture = Counting


def run(work) -> None:
    """`work(engine)`, with graphs on two ranks and without on one, gives the same."""
    Counting.used.clear()
    pair = pairs["llama"]
    expected = pair.alone(work, CONFIG.replace(cuda_graphs=False))
    actual = pair.led(work, CONFIG)
    assert actual is None if rank() else actual == expected, (actual, expected)


def counts() -> tuple[int, int]:
    """(recordings, replays) of this rank in the last `run`."""
    return sum(one.num_records for one in Counting.used), sum(one.num_replays for one in Counting.used)


def greedy(engine, count: int = 2, **params) -> list:
    return checks.tokens(engine, prompts(count, 6), max_tokens=5, **params)


@check
def the_same_tokens_from_replays():
    """Greedy by winners, sampled by gathered logits: one graph serves both."""
    run(lambda engine: (greedy(engine), greedy(engine, temperature=0.8, seed=3)))
    assert counts()[0] == 1 and counts()[1] >= 7


@check
def a_rank_that_cannot_record_keeps_all_from_it():
    """On either rank; rank 0 says which, and the steps run as they are."""
    for culprit in (0, 1):
        record, reason = Counting.record, []

        def broken(self, run, record=record, culprit=culprit):
            replay = record(self, run)
            if rank() == culprit:
                raise MemoryError("no room")
            return replay

        def work(engine):
            found = greedy(engine)
            if engine.graphs is not None:
                reason.append(engine.graphs.problem)
                assert engine.stats()["cuda_graphs"] == 0
            return found

        Counting.record = broken
        try:
            run(work)
        finally:
            Counting.record = record
        assert counts() == (1, 0)
        said = ["MemoryError: no room", "failed on rank 1"][culprit]
        assert rank() or said in reason[0], reason


@check
def other_logits_on_a_rank():
    """A replay of which one rank's part is wrong is used by none."""
    wrong, check_alike = [], graphs._check_alike

    def doubting(logits, expected):
        check_alike(logits + rank(), expected)

    def work(engine):
        found = greedy(engine)
        if engine.graphs is not None:
            wrong.append(engine.graphs.problem)
        return found

    graphs._check_alike = doubting
    try:
        run(work)
    finally:
        graphs._check_alike = check_alike
    assert counts()[1] == 1 and (rank() or "failed on rank 1" in wrong[0])


if __name__ == "__main__":
    checks.main(sys.argv[1])
