"""Four ranks, forked from this process, which has the imports: fewer key/value heads than ranks."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from functools import partial

import checks

checks.MODELS = {
    "llama": dict(vocab_size=200, num_attention_heads=8, num_key_value_heads=2, head_dim=8),
    "qwen3": dict(vocab_size=200, num_attention_heads=4, num_key_value_heads=1),
}
_family, _config, _make = checks.QUANTIZED["FP8, a scale each"]
checks.QUANTIZED = {"FP8": (_family, _config, _make, dict(num_attention_heads=8, num_key_value_heads=2))}
checks.CHECKS = [
    (f"tokens and logits of {label}", partial(of, label, heads=(heads, 1)))
    for label, of, heads in (("llama", checks.of_every_model, 2), ("qwen3", checks.of_every_model, 1), ("FP8", checks.of_every_format, 2))
]  # fmt: skip


def run(rank: int, port: int, out: str) -> None:
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    checks.main(out)


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [multiprocessing.get_context("fork").Process(target=run, args=(rank, port, sys.argv[1])) for rank in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode) for process in processes))
