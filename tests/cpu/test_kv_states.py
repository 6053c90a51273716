"""Keys and values as an object: saved, loaded elsewhere, and as good there as if they had been computed there."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from tiny_processors import tiny_pair
from tiny_tokenizer import tiny_tokenizer

import hf_paged
from hf_paged import (
    AsyncEngine,
    CacheFull,
    EmbedParams,
    Engine,
    EngineConfig,
    InvalidArgument,
    KVState,
    SamplingParams,
    UnsupportedOption,
)

BLOCK = 16
WANTED = SamplingParams(max_tokens=8, temperature=0, logprobs=2, ignore_eos=True, detokenize=False)


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 198, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


DOCUMENT = tokens(100)


def engine_of(name: str = "llama", seed: int = 0, **config) -> Engine:
    return Engine(tiny_model(name, seed=seed), config=EngineConfig(**{"block_size": BLOCK, **config}))


def run(engine, prompt, images=None):
    """(the output, how many tokens came from the cache)"""
    (output,) = engine.generate([prompt], WANTED, images=images and [images])
    engine.check_integrity()
    return output.outputs, output.metrics.num_cached_tokens


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "document.kv"


@pytest.mark.parametrize("kv_dtype", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2", "deepseek_v3"])
def test_a_saved_document_costs_nothing_elsewhere(name, kv_dtype, path):
    prompt = DOCUMENT + tokens(9, seed=1)
    with engine_of(name, kv_dtype=kv_dtype) as engine:
        (scratch,), _ = run(engine, prompt)
        engine.reset_prefix_cache()
        state = engine.save_kv(DOCUMENT)
        expected, cached = run(engine, prompt)
        assert cached == 96 and expected[0].token_ids == scratch.token_ids
        assert state.token_ids == DOCUMENT[:96] and len(state) == 96
        state.save(path)
        assert engine.stats()["kv_bytes_in_use"] == 0
    with engine_of(name, kv_dtype=kv_dtype) as engine:
        loaded = engine.load_kv(path)
        assert engine.load_kv(str(path)) != loaded  # they share the blocks
        assert run(engine, prompt) == (expected, 96)
        engine.drop_kv(loaded)
        assert run(engine, prompt) == (expected, 96)
    assert list(path.parent.iterdir()) == [path]


def test_another_process_goes_on_from_it(path):
    with engine_of() as engine:
        engine.save_kv(DOCUMENT).save(path)
        expected = [one.token_ids for one in run(engine, DOCUMENT + [7])[0]]
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
import torch; torch.set_num_threads({torch.get_num_threads()})
from test_kv_states import DOCUMENT, engine_of, run
with engine_of() as engine:
    engine.load_kv({str(path)!r})
    outputs, cached = run(engine, DOCUMENT + [7])
    print([one.token_ids for one in outputs], cached)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.stdout.split("\n")[-2:] == [f"{expected} 96", ""], done.stderr


def test_exact_mode(path):
    """Bit for bit, as everything there."""
    model = tiny_model("llama")
    hf_paged.patch(model, exact=True, block_size=BLOCK)
    engine = hf_paged.engine_of(model)
    expected, _ = run(engine, DOCUMENT + [7])
    engine.save_kv(DOCUMENT).save(path)
    engine.reset_prefix_cache()
    engine.load_kv(path)
    assert run(engine, DOCUMENT + [7]) == (expected, 96)
    hf_paged.unpatch(model)
    with engine_of() as other, pytest.raises(InvalidArgument, match="another exact: True"):
        other.load_kv(path)


def test_generate_of_the_patched_model_finds_it(path):
    model = tiny_model("llama")
    prompt = torch.tensor([DOCUMENT + [7, 8]])
    stock = model.generate(prompt, max_new_tokens=8, do_sample=False)
    with engine_of() as engine:
        engine.save_kv(DOCUMENT).save(path)
    hf_paged.patch(model, block_size=BLOCK)
    engine = hf_paged.engine_of(model)
    engine.load_kv(path)
    assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), stock)
    assert engine.stats()["prefix_hit_tokens"] == 96
    hf_paged.unpatch(model)


def test_requests_that_run_or_have_ended():
    with engine_of() as engine:
        outputs = []
        longer = replace(WANTED, max_tokens=40)
        request_id = engine.add(DOCUMENT[:20], longer, on_output=outputs.append)
        for _ in range(20):
            engine.step()
        running = engine.save_kv(engine.fork(request_id))
        while engine.has_unfinished():
            engine.step()
        (whole,) = outputs[-1].outputs
        ended = engine.save_kv(outputs[-1])
        assert ended.token_ids == (DOCUMENT[:20] + whole.token_ids)[: len(ended)] and len(ended) == 48
        assert ended.token_ids[: len(running)] == running.token_ids and len(running) == 32
        assert torch.equal(ended.blocks[0][:2], running.blocks[0])
        engine.reset_prefix_cache()
        engine.load_kv(ended)
        (again,) = engine.generate(engine.fork(outputs[-1], 20 + 35))
        assert again.outputs[0] == whole and again.metrics.num_cached_tokens == 48


def test_shorter_states():
    with engine_of() as engine:
        state = engine.save_kv(DOCUMENT)
        expected, _ = run(engine, DOCUMENT[:70])
        engine.reset_prefix_cache()
        engine.load_kv(state.truncate(70))
        assert run(engine, DOCUMENT[:70]) == (expected, 64)
        assert len(state.truncate(96)) == 96 and len(state.truncate(16)) == 16
        for position in (0, 15, 97, 16.0, True, None):
            with pytest.raises(InvalidArgument, match="^position"):
                state.truncate(position)
    with engine_of("mistral-window") as engine:  # 8 tokens
        state = engine.save_kv(DOCUMENT)
        assert len(state.truncate(81)) == 80
        with pytest.raises(InvalidArgument, match="position 79: layers with a window"):
            state.truncate(79)
        engine.reset_prefix_cache()
        engine.load_kv(state.truncate(95))
        assert run(engine, DOCUMENT)[1] == 80


def test_salts():
    with engine_of() as engine:
        expected, _ = run(engine, DOCUMENT)
        state = engine.save_kv(DOCUMENT, cache_salt="mine")
        engine.reset_prefix_cache()
        with pytest.raises(InvalidArgument, match="^cache_salt"):
            engine.load_kv(state)
        engine.load_kv(state, cache_salt="yours")
        assert run(engine, DOCUMENT) == (expected, 0)
        for salt, cached in (("yours", 96), ("mine", 0)):
            outputs = []
            engine.add(DOCUMENT, WANTED, cache_salt=salt, on_output=outputs.append)
            while engine.has_unfinished():
                engine.step()
            assert (outputs[-1].outputs, outputs[-1].metrics.num_cached_tokens) == (expected, cached)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
def test_images(family, path):
    """The file holds no image, only its name; prompts bring the image itself, and another finds nothing."""
    photos = [Image.effect_mandelbrot((20, 12), (-2, -1, 1, at), 50).convert("RGB") for at in (1, 2)]
    model, processor, placeholder = tiny_pair(family)
    text = f"a b {placeholder} " + "what is this " * 20
    config = EngineConfig(block_size=BLOCK)
    with Engine(model, processor, config) as engine:
        expected, _ = run(engine, text + "x", images=photos[:1])
        other, _ = run(engine, text + "x", images=photos[1:])
        state = engine.save_kv(text, images=photos[:1])
        assert state.media
        state.save(path)
        outputs = []
        request_id = engine.add(text, WANTED, images=photos[:1], on_output=outputs.append)
        while not outputs:
            engine.step()
        assert engine.save_kv(engine.fork(request_id)).token_ids[: len(state)] == state.token_ids
    with Engine(tiny_pair(family)[0], processor, config) as engine:
        engine.load_kv(path)
        assert run(engine, text + "x", images=photos[:1]) == (expected, len(state))
        assert engine.stats()["encoded_tokens"] == 0
        outputs, cached = run(engine, text + "x", images=photos[1:])
        assert outputs == other and cached < len(state)


SMALL = dict(kv_cache_memory=10 * BLOCK * 3 * 2 * 2 * 12 * 4)  # 10 blocks


def test_it_stays_until_a_request_could_not_run_beside_it():
    with engine_of(**SMALL) as engine:
        state = engine.save_kv(DOCUMENT)  # 6 blocks
        name = engine.load_kv(state)
        for seed in range(1, 6):
            assert run(engine, tokens(40, seed))[1] == 0
        assert run(engine, DOCUMENT)[1] == 96
        engine.drop_kv(name)
        for seed in range(6, 12):
            run(engine, tokens(40, seed))
        assert run(engine, DOCUMENT)[1] == 0

        engine.load_kv(state)
        expected = run(engine, tokens(140, 1))[0]  # takes all
        engine.reset_prefix_cache()
        assert run(engine, tokens(140, 1)) == (expected, 0)
        assert engine.stats()["kv_bytes_in_use"] == 0


def test_it_makes_room_among_requests():
    """Those that run give way while it is loaded, and go on; what nobody can give up stays."""
    with engine_of(**SMALL) as engine:
        state = engine.save_kv(DOCUMENT)
        alone = [run(engine, tokens(40, seed))[0] for seed in (1, 2)]
        engine.reset_prefix_cache()
        outputs = {}
        keep = lambda output: outputs.__setitem__(output.request_id, output)  # noqa: E731
        ids = [engine.add(tokens(40, seed), WANTED, on_output=keep) for seed in (1, 2)]
        for _ in range(3):
            engine.step()
        engine.load_kv(state)
        engine.check_integrity()
        while engine.has_unfinished():
            engine.step()
            engine.check_integrity()
        assert [outputs[request_id].outputs for request_id in ids] == alone and engine.stats()["preemptions"] > 0
        assert run(engine, DOCUMENT)[1] == 96

        engine.reset_prefix_cache()
        rows = engine.hold(1)
        rows.forward([tokens(90, 3)])
        with pytest.raises(CacheFull, match="kv_cache_memory"):
            engine.load_kv(state)
        engine.check_integrity()
        rows.close()
        engine.load_kv(state)
        rows = engine.hold(1)
        rows.forward([tokens(150, 3)])  # it gives way to rows, too
        rows.close()
        engine.load_kv(state)
        engine.resize_kv_cache(SMALL["kv_cache_memory"] // 2)
        engine.check_integrity()
        assert engine.stats()["kv_bytes_in_use"] == 0
        with pytest.raises(CacheFull):
            engine.load_kv(state)


def test_host_memory_gets_what_it_drives_out():
    with engine_of(offload="1MiB", **SMALL) as engine:
        state = engine.save_kv(DOCUMENT)
        others = [tokens(60, seed) for seed in (1, 2)]
        expected = [run(engine, other)[0] for other in others]
        engine.load_kv(state)
        assert [run(engine, other) for other in others] == [(one, 48) for one in expected]
        assert run(engine, DOCUMENT)[1] == 96


def test_what_makes_it_useless():
    model = tiny_model("llama")
    with Engine(model, config=EngineConfig(block_size=BLOCK)) as engine:
        state = engine.save_kv(DOCUMENT)
        for forget in (engine.reset_prefix_cache, engine.sleep):
            name = engine.load_kv(state)
            forget()
            assert engine.stats()["kv_bytes_in_use"] == 0 and run(engine, DOCUMENT)[1] == 0
            engine.check_integrity()
            engine.drop_kv(name)
        for unknown in (name, "kv", None):
            with pytest.raises(InvalidArgument, match="load_kv"):
                engine.drop_kv(unknown)
        name = engine.load_kv(state)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
        expected, cached = run(engine, DOCUMENT)
        assert cached == 0
        with pytest.raises(InvalidArgument, match="other weights"):
            engine.load_kv(state)
        engine.reset_prefix_cache()
        engine.load_kv(engine.save_kv(DOCUMENT))
        assert run(engine, DOCUMENT) == (expected, 96)


def test_states_of_something_else(path):
    with engine_of() as engine:
        engine.save_kv(DOCUMENT).save(path)
    others = {
        "block_size: 16; here it is 32": dict(block_size=32),
        "dtype: torch.float32; here it is torch.bfloat16": dict(kv_dtype="bfloat16"),
        "layout": dict(attention_backend="reference"),
        "other weights": dict(seed=1),
        "layers": dict(name="gemma2"),
    }
    for message, other in others.items():
        with engine_of(**other) as engine:
            before, _ = run(engine, DOCUMENT)
            with pytest.raises(InvalidArgument, match=message):
                engine.load_kv(path)
            assert run(engine, DOCUMENT) == (before, 96 // engine.config.block_size * engine.config.block_size)


def test_files_that_are_none(path, tmp_path):
    with engine_of() as engine:
        state = engine.save_kv(DOCUMENT)
        state.save(path)
        good = path.read_bytes()
        size = len(good)
        for place in (3, 9, 200, size // 2, size - 1):
            path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            with pytest.raises(InvalidArgument, match="^path"):
                engine.load_kv(path)
        for length in (0, 7, 8, 100, size - 1):
            path.write_bytes(good[:length])
            with pytest.raises(InvalidArgument, match="^path"):
                engine.load_kv(path)
        torch.save(dict(token_ids=[1]), path)
        with pytest.raises(InvalidArgument, match="^path"):
            KVState.load(path)
        save_file({"token_ids": torch.arange(16)}, path)
        with pytest.raises(InvalidArgument, match="is no KV state"):
            KVState.load(path)
        for missing in (tmp_path / "nothing", tmp_path, tmp_path / "no folder" / "it"):
            with pytest.raises(OSError):
                engine.load_kv(missing)
        with pytest.raises(OSError):
            state.save(tmp_path / "no folder" / "it")
        with pytest.raises(InvalidArgument, match="^state must"):
            engine.load_kv(b"x")
        engine.load_kv(state)
        assert run(engine, DOCUMENT)[1] == 96


@pytest.mark.parametrize(
    "change",
    [
        lambda about, tensors: about.pop("groups"),
        lambda about, tensors: about.update(format="another"),
        lambda about, tensors: about.update(block_size=0),
        lambda about, tensors: about.update(block_size=7),
        lambda about, tensors: about.update(first_blocks=[5]),
        lambda about, tensors: about.update(groups=[[None, None], [None, None]]),
        lambda about, tensors: about.update(media=[[0, 4, "zz", False, 0]]),
        lambda about, tensors: about.update(media=[[90, -4, "00", False, 0]]),
        lambda about, tensors: about.update(media="x"),
        lambda about, tensors: tensors.update({"blocks.0": tensors["blocks.0"][:2]}),
        lambda about, tensors: tensors.update({"blocks.0": tensors["blocks.0"][:, :8]}),
        lambda about, tensors: tensors.update({"blocks.0": tensors["blocks.0"].view(torch.int8)}),
        lambda about, tensors: tensors.update(token_ids=tensors["token_ids"] + 500),
        lambda about, tensors: tensors.update(token_ids=tensors["token_ids"] - 500),
        lambda about, tensors: tensors.update(token_ids=tensors["token_ids"][:0]),
        lambda about, tensors: tensors.update(token_ids=tensors["token_ids"].float()),
        lambda about, tensors: tensors.pop("token_ids"),
    ],
)
def test_well_formed_files_of_nonsense(change, path):
    """Written by somebody who computes checksums: they harm nothing either."""
    from safetensors import safe_open

    from hf_paged.runtime.kv_state import _checksum

    with engine_of() as engine:
        engine.save_kv(DOCUMENT).save(path)
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
        change(about, tensors)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        text = json.dumps(about)
        save_file(tensors, path, metadata={"about": text, "sha256": _checksum(text, tensors)})
        with pytest.raises(InvalidArgument):
            engine.load_kv(path)
        engine.check_integrity()
        assert engine.stats()["kv_bytes_in_use"] == 0


def test_where_it_cannot_be(tmp_path):
    with engine_of() as engine:
        with pytest.raises(InvalidArgument, match="fewer tokens than a block"):
            engine.save_kv(DOCUMENT[:15])
        with pytest.raises(InvalidArgument, match="prompt"):
            engine.save_kv([])
        with pytest.raises(InvalidArgument, match="tokenizer"):
            engine.save_kv("text")
        with pytest.raises(UnsupportedOption, match="adapter 'legal'"):
            engine.save_kv(DOCUMENT, adapter="legal")
        with pytest.raises(UnsupportedOption, match="brings no tokens"):
            engine.save_kv(_ended(engine, DOCUMENT, EmbedParams()))
        state = engine.save_kv(DOCUMENT)
        handle = engine.model.module.model.layers[0].register_forward_hook(lambda *_: None)
        with pytest.raises(UnsupportedOption, match="hooks"):
            engine.save_kv(DOCUMENT)
        handle.remove()
        engine.save_kv(DOCUMENT)
    for refusing in (engine_of(prefix_cache=False), engine_of("jamba"), engine_of("mamba2")):
        with refusing as engine:
            for call in (lambda: engine.save_kv(DOCUMENT), lambda: engine.load_kv(state)):
                with pytest.raises(UnsupportedOption, match="prefix_cache|running state"):
                    call()


def _ended(engine, prompt, params):
    outputs = []
    engine.add(prompt, params, on_output=outputs.append)
    while engine.has_unfinished():
        engine.step()
    return outputs[-1]


def test_asyncio_and_text(path):
    tokenizer = tiny_tokenizer(320)

    def opened():
        return AsyncEngine(Engine(tiny_model("llama", vocab_size=320), tokenizer, EngineConfig(block_size=BLOCK)))

    async def work():
        async with opened() as engine:
            others = asyncio.create_task(engine.complete("something else", replace(WANTED, max_tokens=60)))
            state = await engine.save_kv("You are helpful. " * 8)
            state.save(path)
            expected = await engine.complete("You are helpful. " * 8 + "Are you?", WANTED)
            assert (await others).finished
        async with opened() as engine:
            name = await engine.load_kv(path)
            output = await engine.complete("You are helpful. " * 8 + "Are you?", WANTED)
            assert output.outputs == expected.outputs and output.metrics.num_cached_tokens == len(state)
            await engine.drop_kv(name)

    asyncio.run(work())
