"""Engines whose decode steps are recorded: on a GPU as CUDA graphs, else by a stand-in (recording.py)."""

from __future__ import annotations

import pytest
import torch
from recording import Recorder, counting
from tiny_models import tiny_model

from hf_paged import EngineConfig, SamplingParams
from hf_paged.engine import build
from hf_paged.hf import patch as patching
from hf_paged.runtime import graphs
from hf_paged.runtime.inputs import StagedInputs


@pytest.fixture
def recorders(device, monkeypatch) -> list[Recorder]:
    """Those that recorded, or were to record, anything in this test, in order."""
    made = counting(graphs.CudaCapture if device.type == "cuda" else Recorder)
    monkeypatch.setattr(build, "cuda_capture", made)
    return made.used


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Between two steps the buffers hold nonsense: a token that does not exist, others' slots and lengths."""
    prepare = StagedInputs.prepare

    def poison_first(self, *args, **kwargs):
        if self._buffers is not None:
            self._buffers.input_ids.fill_(1 << 30)
            for name in ("positions", "rows", "block_table", "slot_mapping"):
                getattr(self._buffers, name).zero_()
            self._buffers.seq_lens.fill_(9)
            self._buffers.cu_seqlens.fill_(3)
            if self._rope_positions is not None:
                self._rope_positions.fill_(77)
        return prepare(self, *args, **kwargs)

    monkeypatch.setattr(StagedInputs, "prepare", poison_first)


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """That patched models are right is shown elsewhere, and takes the interpreter seconds."""
    monkeypatch.setattr(patching, "check_forward", lambda *args: (None, None))


def small(family: str, device, **options) -> torch.nn.Module:
    """One layer, but two where they differ: the interpreter is slow."""
    layers = 1 if family == "llama" else 2
    return tiny_model(family, vocab_size=320, num_hidden_layers=layers, **options).to(device)


def config(**options) -> EngineConfig:
    defaults = dict(attention_backend="triton", cuda_graphs=True, fuse=False, block_size=16, max_model_len=96,
                    max_batch_tokens=64, max_num_seqs=4, kv_cache_memory="1MiB")  # fmt: skip
    return EngineConfig(**{**defaults, **options})


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (length,), generator=generator).tolist() for length in lengths]


def stock(model, prompt: list[int], count: int) -> list[int]:
    assert not patching.is_patched(model)
    ids = torch.tensor([prompt], device=model.device)
    return model.generate(ids, max_new_tokens=count, do_sample=False)[0, len(prompt) :].tolist()


def greedy(count: int, **options) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **options)


def tokens(outputs) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]
