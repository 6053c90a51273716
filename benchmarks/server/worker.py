"""The engine alone, in a process like the server's: its speed is the measure, its tokens are what the server must bring.

Started by `process.EngineAlone`; see `benchmarks.workers`.
"""

from __future__ import annotations

import gc

import torch

import hf_paged
from hf_paged.benchmarks.engine import systems, workload
from hf_paged.benchmarks.workers import obey
from hf_paged.hf.build import load_model

WORDS = 6  # tokens of text in a prompt, before the template's own


class Worker:
    """The patched model, and a method for each task."""

    def __init__(self, model: str | None, threads: int | None, max_num_seqs: int):
        if threads is not None:
            torch.set_num_threads(threads)
        self.model, self.tokenizer = load_model(model, device="cpu", progress=False)
        hf_paged.patch(self.model, tokenizer=self.tokenizer, max_num_seqs=max_num_seqs)
        self.engine = hf_paged.engine_of(self.model)
        self.engine.generate("Hello", hf_paged.SamplingParams(max_tokens=2))
        gc.collect()
        gc.freeze()  # as the server does

    def describe(self) -> dict:
        return {
            "model": str(self.model.config._name_or_path),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        }

    def questions(self, count: int) -> dict:
        """`count` different texts, out of the Python reference."""
        texts: dict[str, None] = {}
        for number in range(8):
            for window in workload.windows(self.tokenizer, count, WORDS + number):
                texts[self.tokenizer.decode(window).strip()] = None
        return {"texts": list(texts)[:count]}

    def generate(self, texts: list[str], max_tokens: int, salt: str) -> dict:
        """Each text as a conversation's question, all at once, greedy."""
        requests = [workload.Request(tuple(self._prompt(text)), max_tokens) for text in texts]
        run = systems.run_paged(self.engine, requests, cache_salt=salt)
        return {
            "seconds": run.seconds,
            "tokens": run.tokens,
            "texts": [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in run.tokens],
            "prompt_tokens": sum(len(request.prompt) for request in requests),
        }

    def _prompt(self, text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


if __name__ == "__main__":
    obey(Worker)
