"""The command line under torchrun."""

from __future__ import annotations

import csv
import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from launch import python, torchrun
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

import hf_paged
from hf_paged import Engine, SamplingParams
from hf_paged.hf.build import load_model


def saved(name: str, folder):
    tiny_model(name, vocab_size=300).save_pretrained(folder)
    tiny_tokenizer(300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved("qwen3", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return saved("qwen3_moe", tmp_path_factory.mktemp("experts"))


@pytest.mark.parametrize("kind", ["folder", "experts"])
def test_generate(kind, request):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = request.getfixturevalue(kind)
    prompts = ["the rain", "a hat and a tent"]
    options = [part for prompt in prompts for part in ("--prompt", prompt)]
    options += ["--expert-parallel"] if kind == "experts" else []
    done = torchrun("-m", "hf_paged", "generate", str(folder), *options, "--max-tokens", "12", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    model = AutoModelForCausalLM.from_pretrained(folder)
    with Engine(model, AutoTokenizer.from_pretrained(folder)) as engine:
        outputs = engine.generate(prompts, SamplingParams(max_tokens=12, temperature=0.0))
    assert [line["text"] for line in lines] == [output.outputs[0].text for output in outputs]
    assert not hf_paged.hf.patch.is_patched(model)


def test_experts_are_dealt_out_to_several_ranks(experts):
    with pytest.raises(ValueError, match="expert_parallel: .* this process is alone"):
        load_model(str(experts), expert_parallel=True)


def test_bench(folder, tmp_path):
    """Stock on both ranks against hf_paged on both: the same tokens; rank 0 alone prints and writes."""
    few = ["--workload", "shared", "--requests", "2", "--rounds", "1", "--system", "paged", "--system", "one", "--threads", "1"]
    done = torchrun("-m", "hf_paged", "bench", str(folder), *few, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("rows appended") == 1 and done.stdout.count("hf_paged is faster by") == 1
    with (tmp_path / "engine.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    rates = {row["system"]: json.loads(row["detail"]) for row in rows if row["metric"] == "output_tokens"}
    assert set(rates) == {"hf_paged", "stock, one at a time"} and all(detail["ranks"] == 2 for detail in rates.values())
    assert (rates["hf_paged"]["compared"], rates["hf_paged"]["different"]) == (4, 0)
    [speedup] = [row for row in rows if row["metric"] == "speedup"]
    assert float(speedup["p50"]) > 0


def test_what_runs_in_one_process_says_so(folder):
    done = torchrun("-m", "hf_paged", "demo", str(folder))
    assert done.returncode and "demo runs in one process" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun on two machines", "mpirun"])
def test_one_command_for_each_rank(launcher, folder):
    """Two commands at once: torchrun's own rendezvous, and what mpirun sets for its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = ["-m", "hf_paged", "generate", str(folder), "--prompt", "the rain", "--max-tokens", "12", "--json"]
    calls = [(command, dict(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK=rank, OMPI_COMM_WORLD_LOCAL_RANK=rank,
                            MASTER_ADDR="127.0.0.1", MASTER_PORT=port)) for rank in ("0", "1")]  # fmt: skip
    if launcher != "mpirun":
        rendezvous = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
        calls = [(["-m", "torch.distributed.run", *rendezvous, *command], {})] * 2
    with ThreadPoolExecutor() as pool:
        ended = list(pool.map(lambda call: python(*call[0], **call[1]), calls))
    assert [done.returncode for done in ended] == [0, 0], ended
    [line] = [json.loads(line) for done in ended for line in done.stdout.splitlines() if line.startswith("{")]
    alone = python(*command)
    assert line["text"] == json.loads(alone.stdout)["text"]
