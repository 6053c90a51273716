"""Host memory behind the KV cache: what is evicted or preempted goes there and comes back, and no token changes."""

from __future__ import annotations

import peft
import pytest
import torch
from peft_adapters import LAYERS, WARNINGS, shake
from tiny_models import tiny_model

import hf_paged
from hf_paged import Engine, EngineConfig, InvalidArgument, Offload, SamplingParams
from hf_paged.runtime.host_cache import CopyTime

BLOCK = 16
NEW = 40
GREEDY = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3", vocab_size=320)


def prompts(vocab_size: int = 199, count: int = 6) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, vocab_size - 3, (12 + 9 * i,), generator=generator).tolist() for i in range(count)]


def stock(model, prompt: list[int], count: int = NEW) -> list[int]:
    out = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None)
    return out[0, len(prompt) :].tolist()


def block_bytes(model, **options) -> list[int]:
    """Bytes of a block, by group."""
    with Engine(model, config=EngineConfig(block_size=BLOCK, **options)) as engine:
        return [engine._cache.bytes_per_block(group) for group in range(len(engine._cache.groups))]


def config(model, num_blocks: int, offload="64MiB", **options) -> EngineConfig:
    """An engine with about `num_blocks` blocks."""
    options = {"kv_dtype": None, **options}
    memory = num_blocks * sum(block_bytes(model, kv_dtype=options["kv_dtype"]))
    limits = dict(block_size=BLOCK, max_batch_tokens=64, max_num_seqs=6)
    return EngineConfig(kv_cache_memory=memory, offload=offload, **limits, **options)


def run(engine, jobs, params=GREEDY, between=lambda step: None) -> dict[str, hf_paged.RequestOutput]:
    """The outputs by id, which is the place among the jobs; checks the engine's books after every step."""
    finished = {}
    for index, job in enumerate(jobs):
        engine.add(job, params, request_id=str(index))
    step = 0
    while engine.has_unfinished():
        finished |= {output.request_id: output for output in engine.step() if output.finished}
        engine.check_integrity()
        step += 1
        between(step)
    return finished


def tokens(outputs) -> list[list[int]]:
    return [outputs[str(index)].outputs[0].token_ids for index in range(len(outputs))]


# Preempted sequences


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("speculation", [None, "ngram"])
def test_preempted_requests_go_on_from_host_memory_with_stocks_tokens(model, overlap, speculation):
    expected = [stock(model, prompt) for prompt in prompts()]
    with Engine(model, config=config(model, 16, overlap=overlap, speculation=speculation)) as engine:
        outputs = run(engine, prompts())
        stats = engine.stats()
    assert tokens(outputs) == expected
    assert stats["swaps_out"] == stats["swaps_in"] == stats["preemptions"] > 0
    assert sum(output.metrics.num_preemptions for output in outputs.values()) == stats["preemptions"]
    assert stats["tokens"] <= sum(len(prompt) + NEW for prompt in prompts()) + stats["draft_tokens"], "something twice"


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8", "bfloat16"])
def test_caches_of_every_type_come_back_as_they_were(model, kv_dtype):
    """Rounded keys and values, and their scales: the tokens are those of a large cache of that type."""
    with Engine(model, config=EngineConfig(block_size=BLOCK, max_batch_tokens=64, kv_dtype=kv_dtype)) as engine:
        expected = tokens(run(engine, prompts()))
    with Engine(model, config=config(model, 16, kv_dtype=kv_dtype)) as engine:
        assert tokens(run(engine, prompts())) == expected
        assert engine.stats()["swaps_in"] > 0


FAMILIES = {
    "gemma3_text": 8,  # sliding and full layers, a group each
    "llama4_text": 8,  # chunks
    "deepseek_v3": 10,  # latents
    "qwen3_next": 8,  # states beside attention
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_layer_comes_back(name):
    model, jobs = tiny_model(name), prompts(count=4)
    expected = [stock(model, prompt) for prompt in jobs]
    limits = dict(block_size=BLOCK, max_batch_tokens=64, max_num_seqs=6)
    with Engine(model, config=EngineConfig(**limits)) as engine:
        memory = FAMILIES[name] * int(BLOCK * engine._cache.bytes_per_token)
        memory += max(memory, 4 * engine._cache.states.bytes_per_slot) if engine.has_state else 0
    with Engine(model, config=EngineConfig(kv_cache_memory=memory, offload="64MiB", **limits)) as engine:
        assert tokens(run(engine, jobs)) == expected
        assert engine.stats()["swaps_in"] > 0


def test_states_alone_come_back_too():
    model = tiny_model("mamba2")
    options = dict(max_num_seqs=1, policy="priority", offload="64MiB")
    with Engine(model, config=EngineConfig(**options)) as engine:
        engine.add(prompts()[0], GREEDY, request_id="0", priority=1000)
        for _ in range(10):
            engine.step()
        engine.add(prompts()[1], GREEDY, request_id="1")
        outputs = run(engine, [])
        stats = engine.stats()
    assert tokens(outputs) == [stock(model, prompt) for prompt in prompts()[:2]]
    assert stats["swaps_in"] == stats["preemptions"] == 1
    assert stats["tokens"] == sum(map(len, prompts()[:2])) + 2 * (NEW - 1)


def test_what_is_computed_faster_than_copied_is_computed(model):
    """Both are measured; here the measurements are set."""
    with Engine(model, config=config(model, 16)) as engine:
        run(engine, prompts(count=1))
        assert engine._offload.copying.overhead >= 0 and engine._offload.copying.per_byte > 0
        engine._offload.copying = CopyTime(overhead=0.0, per_byte=1.0)
        engine._offload.computed(10**12, 1.0, num_running=1)
        assert tokens(run(engine, prompts())) == [stock(model, prompt) for prompt in prompts()]
        stats = engine.stats()
    assert stats["preemptions"] > 0 and stats["swaps_out"] == 0


def test_a_request_that_is_aborted_in_host_memory_leaves_nothing_there(model):
    with Engine(model, config=config(model, 16, prefix_cache=False)) as engine:

        def abort(step: int) -> None:
            stats = engine.stats()
            if stats["swaps_out"] > stats["swaps_in"] + len(aborted):
                for index in reversed(range(6)):  # the last come is the first to be preempted
                    if index not in aborted and engine.abort(str(index)):
                        return aborted.append(index)

        aborted: list[int] = []
        outputs = run(engine, prompts(), between=abort)
        assert aborted and engine.stats()["host_bytes_in_use"] == 0
    for index, prompt in enumerate(prompts()):
        if index not in aborted:
            assert outputs[str(index)].outputs[0].token_ids == stock(model, prompt)


# Evicted prefixes

LONG = prompts(count=9)[-1] + prompts(count=8)[-1]  # of 9 whole blocks


def evict(engine) -> None:
    """Let other prompts have every block."""
    generator = torch.Generator().manual_seed(8)
    for _ in range(6):
        run(engine, [torch.randint(3, 190, (120,), generator=generator).tolist()], SamplingParams(max_tokens=8))


def cached(engine, prompt: list[int], **options) -> tuple[int, list[int]]:
    """(prompt tokens from the prefix cache, the tokens put out)."""
    engine.add(prompt, GREEDY, request_id="again", **options)
    output = run(engine, [])["again"]
    return output.metrics.num_cached_tokens, output.outputs[0].token_ids


def test_an_evicted_prefix_comes_back_from_host_memory(model):
    expected = stock(model, LONG)
    with Engine(model, config=config(model, 20, offload=None)) as engine:
        cached(engine, LONG)
        evict(engine)
        assert cached(engine, LONG) == (0, expected)
    with Engine(model, config=config(model, 20)) as engine:
        assert cached(engine, LONG) == (0, expected)
        evict(engine)
        whole = len(LONG) // BLOCK * BLOCK
        assert cached(engine, LONG) == (whole, expected)
        assert engine.stats()["host_hit_tokens"] == whole
        evict(engine)
        engine.reset_prefix_cache()
        assert engine.stats()["host_bytes_in_use"] == 0
        assert cached(engine, LONG) == (0, expected)


def test_of_a_prefix_in_host_memory_only_what_is_copied_faster_comes_back(model):
    expected, whole = stock(model, LONG), len(LONG) // BLOCK * BLOCK
    begun = LONG[: 4 * BLOCK] + [7]
    with Engine(model, config=config(model, 20)) as engine:
        cached(engine, LONG)
        evict(engine)
        cached(engine, begun)  # its blocks come back, the five after them stay there
        measured = engine._offload.copying
        engine._offload.copying = CopyTime(overhead=1.0, per_byte=measured.per_byte)
        engine._offload.computed(10**12, 1.0, num_running=1)
        assert cached(engine, LONG) == (4 * BLOCK, expected)
        evict(engine)
        assert cached(engine, LONG) == (0, expected)
        evict(engine)
        engine._offload.copying = CopyTime(overhead=0.0, per_byte=0.0)
        assert cached(engine, LONG) == (whole, expected)


def test_host_memory_is_bounded_and_keeps_what_was_used_last(model):
    memory = 30 * block_bytes(model)[0]
    with Engine(model, config=config(model, 20, offload=memory)) as engine:
        for _ in range(3):
            evict(engine)
            cached(engine, LONG)
            stats = engine.stats()
            assert stats["host_bytes_in_use"] <= stats["host_bytes_allocated"] <= stats["host_bytes_limit"]
            assert stats["host_bytes_limit"] == memory
            assert cached(engine, LONG)[0] == len(LONG) // BLOCK * BLOCK


def test_salts_keep_prefixes_apart_in_host_memory_too(model):
    with Engine(model, config=config(model, 20)) as engine:
        cached(engine, LONG, cache_salt="mine")
        evict(engine)
        assert cached(engine, LONG)[0] == 0
        evict(engine)
        assert cached(engine, LONG, cache_salt="yours")[0] == 0
        evict(engine)
        assert cached(engine, LONG, cache_salt="mine")[0] > 0


@pytest.mark.filterwarnings(*WARNINGS)
def test_adapters_keep_prefixes_apart_in_host_memory_too(tmp_path):
    tuned = peft.get_peft_model(tiny_model("qwen3", vocab_size=320), peft.LoraConfig(r=4, **LAYERS))
    shake(tuned)
    tuned.eval().save_pretrained(tmp_path)
    expected, plain = stock(tuned, LONG), tiny_model("qwen3", vocab_size=320)
    base = stock(plain, LONG)
    assert expected != base
    with Engine(plain, config=config(plain, 20)) as engine:
        engine.load_adapter("tuned", tmp_path)
        for name, count, wanted in [("tuned", 0, expected), (None, 0, base), ("tuned", 1, expected), (None, 1, base)]:
            hits, out = cached(engine, LONG, adapter=name)
            assert (hits > 0, out) == (bool(count), wanted)
            evict(engine)


def test_new_weights_find_nothing_in_host_memory():
    model = tiny_model("qwen3", vocab_size=320)
    with Engine(model, config=config(model, 20)) as engine:
        cached(engine, LONG)
        evict(engine)
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.weight.mul_(-1.0)
        hits, out = cached(engine, LONG)
    assert (hits, out) == (0, stock(model, LONG))


def test_sleep_gives_host_memory_back(model):
    with Engine(model, config=config(model, 20)) as engine:
        cached(engine, LONG)
        evict(engine)
        assert engine.stats()["host_bytes_allocated"] > 0
        engine.sleep()
        assert engine.stats()["host_bytes_allocated"] == engine.stats()["host_bytes_in_use"] == 0
        assert cached(engine, LONG) == (0, stock(model, LONG))


# What is said


def test_sizes_are_checked_by_name():
    assert EngineConfig(offload="1KiB").offload == Offload(1024) == EngineConfig(offload=Offload("1KiB")).offload
    for wrong in ("many", 0, -1, 1.5, True, {"memory": 5}):
        with pytest.raises(InvalidArgument, match="offload must be"):
            EngineConfig(offload=wrong)


def test_explain_and_stats_tell_of_it(model):
    with Engine(model, config=config(model, 20)) as engine:
        assert "offload up to 64.0 MiB of host memory" in str(hf_paged.explain(model))
        assert engine.stats()["host_bytes_limit"] <= 64 << 20
    with Engine(model, config=EngineConfig()) as engine:
        assert "offload" not in str(hf_paged.explain(model))
        assert "host_bytes_limit" not in engine.stats()


def test_a_draft_model_has_none(model):
    draft = tiny_model("qwen3", vocab_size=320, seed=1)
    settings = config(model, 16, speculation="draft")
    with Engine(model, config=settings, draft_model=draft) as engine:
        assert engine._draft_engine.config.offload is None
        assert tokens(run(engine, prompts())) == [stock(model, prompt) for prompt in prompts()]
        assert engine.stats()["swaps_in"] > 0
