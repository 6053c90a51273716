"""One system of `quant.engine` in a process of its own, so that its memory is its own.

Started by `engine`; see `benchmarks.workers`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

import hf_paged
from hf_paged.benchmarks.engine import systems, workload
from hf_paged.benchmarks.workers import obey
from hf_paged.hf.build import load_model


@dataclass(frozen=True)
class System:
    """A model's dtype, how its linear layers' weights are rounded, and how the cache's keys and values are."""

    dtype: str = "float32"
    quantization: str | None = None
    kv_dtype: str | None = None


SYSTEMS = {
    "fp32": System(),
    "bf16": System(dtype="bfloat16"),
    "int8": System(quantization="int8"),
    "int4": System(quantization="int4"),
    "fp8": System(quantization="fp8"),
    "KV int8": System(kv_dtype="int8"),
    "KV fp8": System(kv_dtype="fp8"),
    "int4 KV int8": System(quantization="int4", kv_dtype="int8"),
}


class Worker:
    """The patched model, and a method for each task."""

    def __init__(self, name: str, model: str | None, threads: int):
        torch.set_num_threads(threads)
        system = SYSTEMS[name]
        self.model, self.tokenizer = load_model(model, dtype=getattr(torch, system.dtype), device="cpu", progress=False)
        weights = {} if system.quantization is None else {"quantization": system.quantization}
        hf_paged.patch(self.model, tokenizer=self.tokenizer, kv_dtype=system.kv_dtype, **weights)
        self.engine = hf_paged.engine_of(self.model)

    def describe(self) -> dict:
        """Bytes of the weights, and of the cache per token."""
        return {
            "weights": systems.weight_bytes(self.model),
            "kv_per_token": self.engine._cache.bytes_per_token,
            "model": str(self.model.config._name_or_path),
        }

    def score(self, windows: int, length: int) -> dict:
        """Log-probabilities of the text's tokens, and whether each was the most likely one there, window by window."""
        params = hf_paged.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        outputs = self.engine.generate(workload.windows(self.tokenizer, windows, length), params)
        logprobs, best = [], []
        for output in outputs:
            for token, place in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:]):
                logprobs.append(place[token].logprob)
                best.append(max(place, key=lambda each: place[each].logprob))
        return {"logprobs": logprobs, "best": best}

    def decode(self, sequences: int, context: int, steps: int) -> dict:
        """Tokens per second of steps in which each of some sequences decodes one token. Their prompts are computed once."""
        params = systems.greedy(steps + 8, ignore_eos=True)
        prompts = workload.windows(self.tokenizer, sequences, context)
        ids = [self.engine.add(prompt, params) for prompt in prompts]
        waiting = set(ids)
        while waiting:
            waiting -= {output.request_id for output in self.engine.step() if output.outputs[0].token_ids}
        start = time.perf_counter()
        for _ in range(steps):
            self.engine.step()
        seconds = time.perf_counter() - start
        for request_id in ids:
            self.engine.abort(request_id)
        return {"rate": sequences * steps / seconds}

    def mixed(self, requests: int, turn: int) -> dict:
        """Output tokens per second of the mixed workload of `benchmarks.engine`, all its requests at once."""
        work = workload.mixed(self.tokenizer, count=requests)
        run = systems.run_paged(self.engine, work.requests, ignore_eos=True, cache_salt=f"mixed-{turn}")
        return {"rate": run.rate, "kv_peak": run.kv_bytes, "fingerprint": work.fingerprint()}

    def memory(self) -> dict:
        """Bytes of the process (Linux): the most that were resident at once, and those of its own now.

        What is mapped from a checkpoint's file counts with the former only: the kernel drops it when memory is short.
        """
        with open("/proc/self/status") as file:
            status = dict(line.split(":") for line in file)
        return {name: int(status[key].split()[0]) * 1024 for name, key in (("peak", "VmHWM"), ("own", "RssAnon"))}


if __name__ == "__main__":
    obey(Worker)
