"""Run by torchrun on three ranks: two call generate, the third follows, again and again beside a thread that steps."""

from __future__ import annotations

import sys
import tempfile
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

import hf_paged
from hf_paged import SamplingParams


def main(out: str) -> None:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    dist.init_process_group("gloo")
    holder = [tempfile.mkdtemp(dir=Path(out).parent)]
    dist.broadcast_object_list(holder, 0)
    if dist.get_rank() == 0:
        sizes = dict(vocab_size=201, num_attention_heads=6, num_key_value_heads=3, hidden_size=72, intermediate_size=96)
        tiny_model("llama", **sizes).save_pretrained(holder[0])
    dist.barrier()
    model = AutoModelForCausalLM.from_pretrained(holder[0], distributed_config=DistributedConfig(tp_size=3)).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    hf_paged.patch(model, parallel_timeout=30)
    if dist.get_rank() == 2:
        hf_paged.follow(model)
        hf_paged.unpatch(model)
        return
    ids = torch.arange(3, 40).reshape(1, -1)
    busy, stop = None, threading.Event()
    if dist.get_rank() == 0:
        engine = hf_paged.engine_of(model)

        def work():
            while not stop.is_set():
                engine.generate([[5, 6, 7]], SamplingParams(max_tokens=8, temperature=0.0, detokenize=False))

        busy = threading.Thread(target=work)
        busy.start()
    results = [model.generate(ids, max_new_tokens=4, do_sample=False) for _ in range(5)]
    stop.set()
    if busy is not None:
        busy.join()
    hf_paged.unpatch(model)
    assert all(torch.equal(result, results[0]) for result in results)
    Path(f"{out}.{dist.get_rank()}").write_text(str(results[0].tolist()))


if __name__ == "__main__":
    main(sys.argv[1])
