"""Two ranks, forked from this process, which has the imports: how much memory each takes to load its part, and to patch it."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import warnings
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from quantized_checkpoints import gptq_layer, save_quantized
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

import hf_paged

SIZES = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=8, num_key_value_heads=8, head_dim=128, vocab_size=512)
GPTQ = dict(quant_method="gptq", bits=4, group_size=128, sym=False, desc_act=True)


def resident(which: str) -> int:
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(which)) * 1024


def save(folder: Path, layers: int, quantized: bool) -> None:
    config = tiny_config("llama", **SIZES, num_hidden_layers=layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    if not quantized:
        return model.save_pretrained(folder)
    make = cache(lambda N, K: gptq_layer(N, K, group_size=128, act_order=True))

    def copied(name, N, K):
        tensors, weight = make(N, K)
        return {key: tensor.clone() for key, tensor in tensors.items()}, weight

    save_quantized(model, folder, GPTQ, copied)


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2)).eval()


def run(rank: int, port: int, scratch: Path) -> None:
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    report = {}
    for case in ("bfloat16", "gptq"):
        hf_paged.unpatch(hf_paged.patch(load(scratch / f"small {case}"), kv_cache_memory="1MiB"))  # libraries do not count
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        model = load(scratch / f"large {case}")
        loaded = resident("VmHWM") - before
        hf_paged.patch(model, kv_cache_memory="1MiB")
        patched = resident("VmHWM") - before
        shares = [getattr(tensor, "_local_tensor", tensor) for tensor in (*model.parameters(), *model.buffers())]
        share = sum(tensor.nbytes for tensor in shares)
        report[case] = dict(share=share, loaded=loaded, patched=patched, file=(scratch / f"large {case}/model.safetensors").stat().st_size)
        hf_paged.unpatch(model)
    (scratch / f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


def main(scratch: Path) -> int:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for case in ("bfloat16", "gptq"):
        for name, layers in (("small", 1), ("large", 6 if case == "bfloat16" else 10)):
            save(scratch / f"{name} {case}", layers, case == "gptq")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [multiprocessing.get_context("fork").Process(target=run, args=(rank, port, scratch)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return max(abs(process.exitcode) for process in ranks)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
