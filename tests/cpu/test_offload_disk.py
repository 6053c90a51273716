"""A disk behind host memory: prefixes outlive the engine, whatever is not sound is not there, and no token changes."""

from __future__ import annotations

import concurrent.futures
import copy
import hashlib
import json
import logging
import os
import struct
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy
import peft
import pytest
import torch
from peft_adapters import LAYERS, WARNINGS, shake
from safetensors.numpy import load_file, save_file
from tiny_models import tiny_model

from hf_paged import Engine, EngineConfig, InvalidArgument, Offload, SamplingParams, UnsupportedOption
from hf_paged.engine.offload import HostOffload
from hf_paged.runtime import disk_cache

SLOW = pytest.mark.slow
BLOCK, NEW, LENGTH = 16, 8, 100
GREEDY = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
WHOLE = LENGTH // BLOCK * BLOCK  # tokens of a prompt in whole blocks


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3", vocab_size=320)


@pytest.fixture(autouse=True)
def slow_model(monkeypatch):
    """Reading takes less time than computing, however fast these models are."""
    monkeypatch.setattr(HostOffload, "speed", 1.0)


def prompts(count: int = 6, seed: int = 5) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 190, (count, LENGTH), generator=generator).tolist()


def stock(model, prompt: list[int]) -> list[int]:
    out = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    return out[0, len(prompt) :].tolist()


@cache
def block_bytes(model, kv_dtype: str | None) -> int:
    with Engine(model, config=EngineConfig(block_size=BLOCK, kv_dtype=kv_dtype)) as engine:
        return sum(engine._cache.bytes_per_block(group) for group in range(len(engine._cache.groups)))


def opened(model, folder, *, blocks: int = 10, host_blocks: int = 10, disk_memory="1GiB", **options) -> Engine:
    """An engine with so many blocks, on the device and in host memory, that knows whose its files are."""
    size = block_bytes(model, options.get("kv_dtype"))
    offload = Offload(host_blocks * size, disk=folder, disk_memory=disk_memory)
    limits = dict(block_size=BLOCK, max_batch_tokens=64, max_num_seqs=2, kv_cache_memory=blocks * size)
    engine = Engine(model, config=EngineConfig(offload=offload, **limits, **options))
    engine._offload._disk.wait()
    return engine


def run(engine, jobs, **options) -> list[tuple[list[int], int]]:
    """Tokens and number of cached prompt tokens of every prompt, one after another; checks the books after every step."""
    results = []
    for job in jobs:
        engine.add(job, GREEDY, request_id="one", **options)
        while engine.has_unfinished():
            outputs = engine.step()
            engine.check_integrity()
        results.append((outputs[0].outputs[0].token_ids, outputs[0].metrics.num_cached_tokens))
    return results


def files(folder) -> list[Path]:
    return sorted(Path(folder).glob("*/*.safetensors"))


def stored(model, folder, jobs=None, **options) -> list[list[int]]:
    """Lets an engine compute prompts and close. Returns their tokens."""
    with opened(model, folder, **options) as engine:
        return [tokens for tokens, _ in run(engine, prompts() if jobs is None else jobs)]


def again(model, folder, jobs=None, **options) -> tuple[list[list[int]], list[int], dict]:
    """Tokens, cached tokens and statistics of an engine that begins with what is on disk."""
    with opened(model, folder, **options) as engine:
        results = run(engine, prompts() if jobs is None else jobs)
        stats = engine.stats()
    return [tokens for tokens, _ in results], [cached for _, cached in results], stats


@pytest.mark.parametrize("host_blocks", [10, 100])
def test_another_engine_finds_the_prefixes_and_counts_them_as_cached(model, tmp_path, host_blocks):
    expected = [stock(model, prompt) for prompt in prompts()]
    assert stored(model, tmp_path, host_blocks=host_blocks) == expected
    tokens, cached, stats = again(model, tmp_path)
    assert tokens == expected
    assert cached == [WHOLE] * 6
    assert stats["disk_hit_tokens"] == stats["host_hit_tokens"] == stats["prefix_hit_tokens"] == 6 * WHOLE
    assert stats["disk_files"] == len(files(tmp_path)) and stats["disk_bytes"] == sum(os.path.getsize(f) for f in files(tmp_path))


def test_what_host_memory_evicts_comes_back_in_the_same_engine(model, tmp_path):
    expected = [stock(model, prompt) for prompt in prompts()]
    with opened(model, tmp_path) as engine:
        assert [tokens for tokens, _ in run(engine, prompts())] == expected
        engine._offload._disk.wait()  # everything is written
        results = run(engine, prompts())
        assert [tokens for tokens, _ in results] == expected
        assert sum(cached for _, cached in results) >= 4 * WHOLE
        assert engine.stats()["disk_hit_tokens"] > 0


@pytest.mark.parametrize(("kv_dtype", "overlap"), [("int8", False), ("bfloat16", True)])
def test_caches_of_every_type(model, tmp_path, kv_dtype, overlap):
    options = dict(kv_dtype=kv_dtype, overlap=overlap, host_blocks=100)
    expected = stored(model, tmp_path, **options)
    tokens, cached, _ = again(model, tmp_path, **options)
    assert tokens == expected and cached == [WHOLE] * 6
    assert again(model, tmp_path, prompts()[:1], host_blocks=100)[1] == [0], "another type"


@pytest.mark.parametrize("name", ["gemma3_text", *(pytest.param(name, marks=SLOW) for name in ("llama4_text", "deepseek_v3"))])
def test_layers_of_every_kind(name, tmp_path):
    model = tiny_model(name)
    expected = [stock(model, prompt) for prompt in prompts()]
    options = dict(blocks=24, host_blocks=200)
    assert stored(model, tmp_path, prompts() + prompts(6, seed=9), **options)[:6] == expected
    tokens, cached, stats = again(model, tmp_path, **options)
    assert tokens == expected and stats["disk_hit_tokens"] > 0 and cached[0] == WHOLE


def test_many_at_once_share_what_is_read_and_nobody_else_waits(model, tmp_path):
    job = prompts()[0]
    stored(model, tmp_path, host_blocks=100)
    with opened(model, tmp_path, blocks=60, host_blocks=100) as engine:
        disk = engine._offload._disk
        held, read = disk._readers.submit, []

        class Slow:
            def submit(self, *args):
                read.append(args)
                return held(lambda: (gate.result(), args[0](*args[1:]))[1])

            def shutdown(self, **options):
                disk_readers.shutdown(**options)

        gate: concurrent.futures.Future = concurrent.futures.Future()
        disk_readers, disk._readers = disk._readers, Slow()
        for index in range(2):
            engine.add([*job, index + 3], GREEDY, request_id=f"disk{index}")
        engine.add(prompts(1, seed=8)[0], GREEDY, request_id="other")
        finished = []
        while "other" not in finished:
            finished += [output.request_id for output in engine.step() if output.finished]
            engine.check_integrity()
        assert finished == ["other"] and len(read) == WHOLE // BLOCK
        gate.set_result(None)
        while engine.has_unfinished():
            finished += [output.request_id for output in engine.step() if output.finished]
            engine.check_integrity()
        assert sorted(finished) == ["disk0", "disk1", "other"]
        assert engine.stats()["disk_hit_tokens"] == WHOLE and engine.stats()["prefix_hit_tokens"] == 2 * WHOLE


def test_a_request_that_is_aborted_while_its_blocks_are_read_leaves_nothing(model, tmp_path):
    stored(model, tmp_path, host_blocks=100)
    with opened(model, tmp_path) as engine:
        engine.add(prompts()[0], GREEDY, request_id="gone")
        engine.step()
        engine.abort("gone")
        assert not engine.has_unfinished() and not engine._scheduler.reads_disk
        engine.check_integrity()
        assert run(engine, prompts()[:1])[0] == (stock(model, prompts()[0]), WHOLE)


# What is not sound


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    path.write_bytes(b"\x80\x04\x95 this is no file of tensors" * 99)


def misshapen(path: Path) -> None:
    tensors = load_file(path)
    save_file({**tensors, "block": tensors["block"][:-16].copy()}, path)


def huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")


def lying_header(path: Path) -> None:
    header = json.dumps({"block": {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def sealed_elsewhere(path: Path) -> None:
    block = load_file(path)["block"]
    save_file({"block": block, "seal": numpy.frombuffer(hashlib.sha256(block).digest(), dtype=numpy.uint8)}, path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE = [cut, sealed_elsewhere, misshapen, lying_header, a_folder]
DAMAGE += [pytest.param(damage, marks=SLOW) for damage in (flipped, empty, foreign, huge_header)]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_is_not_sound_is_a_miss(model, tmp_path, damage, caplog):
    expected = stored(model, tmp_path, host_blocks=100)
    for path in files(tmp_path):
        damage(path)
    with caplog.at_level(logging.WARNING, "hf_paged"):
        tokens, cached, stats = again(model, tmp_path, prompts()[:5], host_blocks=100)
    assert tokens == expected[:5]
    assert sum(cached) == stats["disk_hit_tokens"] == 0
    messages = [record.getMessage() for record in caplog.records if "hf_paged" in record.name]
    assert len(messages) == (2 if damage is a_folder else 1)  # nothing can be written there either
    if damage is not a_folder:
        tokens, cached, _ = again(model, tmp_path, prompts()[:5], host_blocks=100)
        assert tokens == expected[:5] and cached == [WHOLE] * 5, "written anew"


def test_a_file_that_vanished_is_a_miss(model, tmp_path):
    expected = stored(model, tmp_path, host_blocks=100)
    with opened(model, tmp_path, host_blocks=100) as engine:
        for path in files(tmp_path)[::2]:
            path.unlink()
        assert [tokens for tokens, _ in run(engine, prompts())] == expected


def test_the_folder_stays_within_its_bound_and_keeps_what_was_used_last(model, tmp_path):
    expected = stored(model, tmp_path, prompts()[:4], host_blocks=100)
    limit = sum(path.stat().st_size for path in files(tmp_path))
    old = time.time() - 1000
    for path in files(tmp_path):
        os.utime(path, (old, old))
    (tmp_path / "notes.txt").write_text("not ours")
    with opened(model, tmp_path, host_blocks=100, disk_memory=limit) as engine:
        assert run(engine, prompts()[:1])[0][1] == WHOLE  # used
        run(engine, prompts(2, seed=9))
    assert sum(path.stat().st_size for path in files(tmp_path)) <= limit
    assert (tmp_path / "notes.txt").exists()
    tokens, cached, _ = again(model, tmp_path, prompts()[:1], host_blocks=100, disk_memory=limit)
    assert tokens == expected[:1] and cached == [WHOLE]


# Whose they are


def test_a_fine_tune_that_changed_one_value_shares_nothing(model, tmp_path):
    stored(model, tmp_path, host_blocks=100)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.weight[3, 4] += 0.5
    _, cached, stats = again(tuned, tmp_path, host_blocks=100)
    assert sum(cached) == stats["disk_hit_tokens"] == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_exact_mode_and_the_other_share_nothing(model, tmp_path):
    stored(model, tmp_path, host_blocks=100)
    exact = copy.deepcopy(model)
    assert sum(again(exact, tmp_path, host_blocks=100, exact=True)[1]) == 0
    assert again(copy.deepcopy(model), tmp_path, prompts()[:1], host_blocks=100)[1] == [WHOLE]


def test_salted_prefixes_never_reach_the_disk(model, tmp_path):
    with opened(model, tmp_path, host_blocks=20) as engine:
        run(engine, prompts(), cache_salt="mine")
        assert engine.stats()["host_bytes_in_use"] > 0
    assert files(tmp_path) == []


@pytest.mark.filterwarnings(*WARNINGS)
def test_prefixes_of_adapters_never_reach_the_disk(model, tmp_path):
    tuned = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, **LAYERS))
    shake(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    folder = tmp_path / "disk"
    with opened(copy.deepcopy(model), folder, host_blocks=20) as engine:
        engine.load_adapter("one", tmp_path / "adapter")
        run(engine, prompts(), adapter="one")
        assert engine.stats()["host_bytes_in_use"] > 0
    assert files(folder) == []


def test_new_weights_end_it(model, tmp_path):
    changed = copy.deepcopy(model)
    stored(changed, tmp_path, host_blocks=100)
    before = files(tmp_path)
    with opened(changed, tmp_path, host_blocks=100) as engine:
        assert run(engine, prompts()[:1])[0][1] == WHOLE
        with torch.no_grad():
            changed.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        results = run(engine, prompts())
        assert [tokens for tokens, _ in results] == [stock(changed, prompt) for prompt in prompts()]
        assert sum(cached for _, cached in results) == 0
    assert files(tmp_path) == before


def test_a_hook_sees_every_token_and_what_it_changes_is_not_written(model, tmp_path):
    changed = copy.deepcopy(model)
    stored(changed, tmp_path, host_blocks=100)
    before = files(tmp_path)
    with opened(changed, tmp_path, host_blocks=100) as engine:
        handle = changed.model.layers[0].register_forward_hook(lambda module, args, output: output * 1.1)
        assert [cached for _, cached in run(engine, prompts()[:2])] == [0, 0]
        handle.remove()
    assert files(tmp_path) == before


def test_a_model_that_is_as_it_was_finds_its_blocks_again(model, tmp_path, monkeypatch):
    changed = copy.deepcopy(model)
    expected = stored(changed, tmp_path, host_blocks=100)
    with opened(changed, tmp_path, host_blocks=100) as engine:
        monkeypatch.setattr(disk_cache, "_SETTLED", 0.0)
        handle = changed.model.layers[0].register_forward_hook(lambda module, args, output: output * 1.1)
        assert run(engine, prompts()[:1])[0][1] == 0
        handle.remove()
        engine.is_hooked()  # a look between steps
        engine._offload._disk.wait()
        assert run(engine, prompts()[:2]) == [(expected[0], WHOLE), (expected[1], WHOLE)]


def test_reset_prefix_cache_deletes_and_begins_anew(model, tmp_path):
    expected = stored(model, tmp_path, host_blocks=100)
    with opened(model, tmp_path, host_blocks=100) as engine:
        engine.reset_prefix_cache()
        engine._offload._disk.wait()
        assert files(tmp_path) == [] and engine.stats()["disk_files"] == 0
        assert run(engine, prompts())[0] == (expected[0], 0)
    assert files(tmp_path)
    assert again(model, tmp_path, prompts()[:1], host_blocks=100)[1] == [WHOLE]


def test_sleep_leaves_the_disk_as_it_is(model, tmp_path):
    expected = stored(model, tmp_path, host_blocks=100)
    with opened(model, tmp_path, host_blocks=100) as engine:
        engine.sleep()
        assert run(engine, prompts()[:1])[0] == (expected[0], WHOLE)


# Several, and none


def test_two_engines_share_a_folder(model, tmp_path):
    other = copy.deepcopy(model)
    expected = [stock(model, prompt) for prompt in prompts()]
    with opened(model, tmp_path) as first, opened(other, tmp_path) as second:
        for _ in range(2):
            for index, prompt in enumerate(prompts()):
                for engine in (first, second):
                    assert run(engine, [prompt])[0][0] == expected[index]
        for engine in (first, second):
            engine._offload._disk._looked = 0.0  # time passes
            engine._offload._disk.holds(0, b"")
            engine._offload._disk.wait()
        assert first.stats()["disk_files"] == second.stats()["disk_files"] > 0


PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from cpu.test_offload_disk import again, model_of, prompts, WHOLE
tokens, cached, _ = again(model_of({saved!r}), {folder!r}, prompts()[:2], host_blocks=100)
assert cached == [WHOLE] * 2, cached
print(tokens)
"""


def model_of(saved: str):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()


def test_another_process_finds_them(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    expected = stored(model_of(str(tmp_path / "model")), tmp_path / "disk", host_blocks=100)
    tests = str(Path(__file__).parents[1])
    program = PROGRAM.format(tests=tests, saved=str(tmp_path / "model"), folder=str(tmp_path / "disk"))
    env = os.environ | {"PYTHONPATH": os.pathsep.join([tests, str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected[:2]


def test_a_folder_that_cannot_be_written_is_an_error_at_once(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument, match="offload: disk .* cannot be written"):
        opened(model, tmp_path / "file" / "below")
    with pytest.raises(InvalidArgument, match="disk_memory must be at least"):
        opened(model, tmp_path, disk_memory=100)
    for wrong in (5, "", b"x"):
        with pytest.raises(InvalidArgument, match="disk must be the path"):
            Offload("1GiB", disk=wrong)
    with pytest.raises(InvalidArgument, match="disk_memory"):
        Offload("1GiB", disk=tmp_path, disk_memory="much")


def test_a_disk_that_is_full_later_is_a_warning(model, tmp_path, caplog, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    with caplog.at_level(logging.WARNING, "hf_paged"), opened(model, tmp_path) as engine:
        monkeypatch.setattr(Path, "write_bytes", full)
        assert [tokens for tokens, _ in run(engine, prompts())] == [stock(model, prompt) for prompt in prompts()]
    assert [record.message for record in caplog.records if "No space left" in record.message]
    assert len(caplog.records) == 1 and files(tmp_path) == []


def test_without_prefixes_there_is_nothing_for_a_disk(model, tmp_path):
    offload = Offload("1MiB", disk=tmp_path)
    with pytest.raises(UnsupportedOption, match="prefix_cache is False"):
        Engine(model, config=EngineConfig(offload=offload, prefix_cache=False))
    with pytest.raises(UnsupportedOption, match="keep a state"):
        Engine(tiny_model("mamba2"), config=EngineConfig(offload=offload))
