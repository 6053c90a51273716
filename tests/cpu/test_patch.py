"""What patching leaves alone, what follows the live weights, and that unpatching gives everything back."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from tiny_models import tiny_model

import hf_paged
from hf_paged import EngineConfig, InvalidArgument, SamplingParams, UnsupportedModel

PROMPT = torch.tensor([[5, 9, 11, 40, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]])


@pytest.fixture
def model():
    model = tiny_model("llama-tied-llama3-rope")
    yield model
    if hf_paged.hf.patch.is_patched(model):
        hf_paged.unpatch(model)


def greedy(model, new=8):
    return model.generate(PROMPT, max_new_tokens=new, do_sample=False)


def is_plain(model) -> bool:
    return all("_hf_paged" not in module.__dict__ for module in model.modules())


def test_forward_and_gradients_are_stock_s_own_bits(model):
    def run():
        model.zero_grad()
        output = model(PROMPT, labels=PROMPT)
        output.loss.backward()
        return output.logits.detach().clone(), [p.grad.clone() for p in model.parameters()]

    logits, gradients = run()
    hf_paged.patch(model)
    greedy(model)
    patched_logits, patched_gradients = run()
    assert torch.equal(logits, patched_logits)
    assert all(torch.equal(a, b) for a, b in zip(gradients, patched_gradients))


def test_train_mode_is_left_as_found_and_generates(model):
    model.train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    expected = greedy(copy.deepcopy(model).eval())
    hf_paged.patch(model)
    assert torch.equal(greedy(model), expected)
    assert [module.training for module in model.modules()] == before


def test_an_optimizer_step_reaches_the_next_token(model):
    hf_paged.patch(model)
    before = greedy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(PROMPT, labels=PROMPT).loss.backward()
    optimizer.step()
    after = greedy(model)
    assert torch.equal(after, greedy(copy.deepcopy(model)))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("way", [{}, {"output_scores": True, "return_dict_in_generate": True}], ids=["rows", "pages"])
@pytest.mark.parametrize("write", ["data", "load_state_dict", "assign", "new_parameter"])
def test_every_way_of_writing_weights_reaches_the_next_token(model, write, way):
    def greedy(model) -> torch.Tensor:
        result = model.generate(PROMPT, max_new_tokens=8, do_sample=False, **way)
        return result if torch.is_tensor(result) else result.sequences

    hf_paged.patch(model)
    greedy(model)
    other = tiny_model("llama-tied-llama3-rope", seed=9)
    if write == "data":
        for mine, theirs in zip(model.parameters(), other.parameters()):
            mine.data.copy_(theirs.data)
    elif write == "new_parameter":
        for name in ("q_proj", "k_proj"):
            layer = model.model.layers[0].self_attn.get_submodule(name)
            layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.7)
        other = copy.deepcopy(model)
    else:
        model.load_state_dict(other.state_dict(), assign=write == "assign")
        model.tie_weights()
    assert torch.equal(greedy(model), greedy(other))


def test_a_write_while_a_request_runs_drops_the_prefix_cache(model):
    with hf_paged.Engine(model) as engine:
        prompt = PROMPT[0].tolist() * 2
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        engine.add(prompt, params)
        engine.step()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        while engine.has_unfinished():
            engine.step()
        expected = copy.deepcopy(model).generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        assert engine.generate([prompt], params)[0].outputs[0].token_ids == expected[0, len(prompt) :].tolist()


def test_copies_and_pickles_are_plain_models(model):
    expected = greedy(model)
    hf_paged.patch(model)
    greedy(model)
    copied = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copied, pickled, torch.load(buffer, weights_only=False)):
        assert is_plain(other) and type(other).__mro__[0] is not type(model)
        assert torch.equal(greedy(other), expected)
        assert other.lm_head.weight is other.model.embed_tokens.weight
    with torch.no_grad():
        copied.model.layers[0].self_attn.q_proj.weight.zero_()
    assert torch.equal(greedy(model), expected)


def test_saved_files_hold_plain_tensors(model, tmp_path):
    expected = greedy(model)
    model.save_pretrained(tmp_path / "stock")
    hf_paged.patch(model)
    model.save_pretrained(tmp_path / "patched")
    names = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert sorted(path.name for path in (tmp_path / "patched").iterdir()) == names
    for name in names:
        assert (tmp_path / "stock" / name).read_bytes() == (tmp_path / "patched" / name).read_bytes()
    assert torch.equal(greedy(type(copy.deepcopy(model)).from_pretrained(tmp_path / "patched")), expected)


def test_hooks_fire_and_see_the_packed_batch(model):
    hf_paged.patch(model)
    shapes = {}
    for name in ("q_proj", "v_proj"):
        module = model.model.layers[0].self_attn.get_submodule(name)
        module.register_forward_hook(lambda _, args, output, name=name: shapes.update({name: output.shape}))
    gate = []
    model.model.layers[1].mlp.gate_proj.register_forward_hook(lambda _, args, output: gate.append(output.shape))
    greedy(model, new=1)
    assert shapes["q_proj"] == (1, PROMPT.shape[1], 48) and shapes["v_proj"] == (1, PROMPT.shape[1], 24)
    assert gate[0] == (1, PROMPT.shape[1], 64)


def test_a_hook_that_changes_activations_changes_tokens_as_in_stock(model):
    def bend(module, args, output):
        return output * 1.5

    handle = model.model.layers[1].mlp.up_proj.register_forward_hook(bend)
    expected = greedy(model)
    hf_paged.patch(model)
    assert torch.equal(greedy(model), expected)
    handle.remove()
    plain = greedy(copy.deepcopy(model))
    assert torch.equal(greedy(model), plain) and not torch.equal(plain, expected)


def test_a_write_to_a_single_row_while_idle_reaches_the_next_token(model):
    hf_paged.patch(model)
    before = greedy(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[7] += 3.0
    after = greedy(model)
    assert torch.equal(after, greedy(copy.deepcopy(model))) and not torch.equal(after, before)


def test_inference_mode_and_autocast(model):
    expected = greedy(model, new=40)
    hf_paged.patch(model, block_size=16, kv_cache_memory="1MiB")
    with torch.inference_mode():
        assert torch.equal(greedy(model, new=40), expected)
    assert torch.equal(greedy(model, new=40), expected)
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="autocast"):
        greedy(model)


def test_unpatch_frees_the_engine_and_the_merged_storage(model):
    storages = {name: p.untyped_storage().nbytes() for name, p in model.named_parameters()}
    hf_paged.patch(model)
    engine = weakref.ref(hf_paged.engine_of(model))
    cache = weakref.ref(engine()._cache)
    greedy(model)
    hf_paged.unpatch(model)
    gc.collect()
    assert engine() is None and cache() is None
    assert is_plain(model)
    assert {name: p.untyped_storage().nbytes() for name, p in model.named_parameters()} == storages


def test_dropping_a_patched_model_frees_it(model):
    other = tiny_model("qwen3")
    hf_paged.patch(other)
    other.generate(PROMPT, max_new_tokens=2, do_sample=False)
    weight = weakref.ref(other.lm_head.weight)
    del other
    gc.collect()
    assert weight() is None


def test_patching_again_replaces_the_configuration(model):
    hf_paged.patch(model)
    first = hf_paged.engine_of(model)
    hf_paged.patch(model, block_size=32)
    assert first.closed
    assert hf_paged.engine_of(model).config.block_size == 32
    hf_paged.unpatch(model)
    with pytest.raises(InvalidArgument, match="not patched"):
        hf_paged.unpatch(model)


def test_two_patched_models_at_once(model):
    other = tiny_model("qwen2", seed=4)
    expected = greedy(model), greedy(other)
    hf_paged.patch(model)
    hf_paged.patch(other)
    assert torch.equal(greedy(model), expected[0]) and torch.equal(greedy(other), expected[1])
    hf_paged.unpatch(other)
    assert torch.equal(greedy(model), expected[0])


def test_a_model_that_changes_dtype_is_patched_anew(model):
    hf_paged.patch(model)
    greedy(model)
    model.to(torch.bfloat16)
    expected = greedy(copy.deepcopy(model))
    assert torch.equal(greedy(model)[:, : PROMPT.shape[1] + 1], expected[:, : PROMPT.shape[1] + 1])
    assert hf_paged.engine_of(model)._cache.dtype == torch.bfloat16


def test_models_that_share_a_config_step_in_several_threads(model):
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    twin.generation_config = copy.deepcopy(model.generation_config)
    expected = greedy(model, new=20)
    implementation = model.config._attn_implementation
    hf_paged.patch(model)
    hf_paged.patch(twin)
    wrong = []

    def work(one):
        for _ in range(6):
            hf_paged.engine_of(one).reset_prefix_cache()
            if not torch.equal(greedy(one, new=20), expected):
                wrong.append(one)

    threads = [threading.Thread(target=work, args=(one,)) for one in (model, twin)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    hf_paged.unpatch(twin)
    assert not wrong and model.config._attn_implementation == implementation


def test_a_window_that_the_model_s_layers_do_not_read_is_refused():
    model = tiny_model("llama", sliding_window=5)
    with pytest.raises(UnsupportedModel, match="sliding_window"):
        hf_paged.patch(model)
    assert is_plain(model)


def test_bidirectional_attention_is_refused():
    model = tiny_model("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(UnsupportedModel, match="both directions"):
        hf_paged.patch(model)
    assert is_plain(model)


def test_explain_tells_what_runs(model):
    hf_paged.patch(model)
    report = hf_paged.explain(model)
    assert len(report.layers) == model.config.num_hidden_layers
    assert "llama" in str(report).lower() and "full" in str(report)
    hf_paged.patch(model, attention_backend="reference")
    assert "asked for" in str(hf_paged.explain(model))
    with pytest.raises(hf_paged.KernelUnavailable, match="strict"):
        hf_paged.patch(model, attention_backend="reference", strict=True)
    assert is_plain(model)


def test_a_call_s_own_slower_path_is_told_and_refused_where_that_is_strict(model):
    options = dict(max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_attentions=True)
    model.set_attn_implementation("eager")
    expected = model.generate(PROMPT, **options)
    hf_paged.patch(model)
    with pytest.warns(UserWarning, match="output_attentions: runs on transformers' own path"):
        result = model.generate(PROMPT, **options)
    assert torch.equal(result.attentions[0][0], expected.attentions[0][0])
    model.generate(PROMPT, **options)  # it warns once
    report = hf_paged.explain(model)
    assert "output_attentions" in report.calls and "slower  output_attentions" in str(report)
    hf_paged.engine_of(model).close()
    with hf_paged.Engine(model, config=EngineConfig(strict=True)):  # past calls do not count
        with pytest.raises(hf_paged.KernelUnavailable, match="strict: output_attentions takes a slower path"):
            model.generate(PROMPT, **options)
        assert torch.equal(greedy(model, new=4), expected.sequences)


def test_models_that_cannot_be_right_are_refused_with_the_reason():
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    rwkv = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("rwkv", vocab_size=64, hidden_size=16, num_hidden_layers=2, context_length=64)
    )
    with pytest.raises(UnsupportedModel, match="keep a state outside the cache"):
        hf_paged.patch(rwkv)
    t5 = AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model("t5", vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        hf_paged.patch(t5)
    with pytest.raises(UnsupportedModel, match="not a transformers model"):
        hf_paged.patch(torch.nn.Linear(2, 2))
    assert is_plain(rwkv) and is_plain(t5)


def test_wrong_configuration_names_the_field(model):
    for options, name in [
        (dict(block_size=20), "block_size"),
        (dict(max_num_seqs=0), "max_num_seqs"),
        (dict(kv_cache_memory="lots"), "kv_cache_memory"),
        (dict(kv_cache_memory=1.5), "kv_cache_memory"),
        (dict(kv_cache_memory=float("nan")), "kv_cache_memory"),
        (dict(kv_cache_memory=0), "kv_cache_memory"),
        (dict(policy="lifo"), "policy"),
        (dict(blocksize=16), "blocksize"),
        (dict(attention_backend="magic"), "magic"),
    ]:
        with pytest.raises((InvalidArgument, ValueError), match=name):
            hf_paged.patch(model, **options)
        assert is_plain(model)
    with pytest.raises(InvalidArgument, match="config"):
        hf_paged.patch(model, {"block_size": 16})
    assert EngineConfig(kv_cache_memory="2MiB").kv_cache_memory == 2 << 20


def test_the_cache_takes_a_share_of_the_memory_that_is_free(model, monkeypatch):
    monkeypatch.setattr("hf_paged.engine.build.free_memory", lambda: 32 << 20)
    blocks = []
    for share in (0.5, "0.25", "8MiB"):
        with hf_paged.Engine(model, config=EngineConfig(kv_cache_memory=share, block_size=16)) as engine:
            blocks.append(engine.stats()["kv_bytes_limit"])
    assert blocks[0] > 1.9 * blocks[1] and blocks[1] == blocks[2]
