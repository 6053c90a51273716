"""Families whose attention modules hold their own softmax (ALiBi among them) against stock transformers in fp32."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from family_checks import Comparison
from tiny_models import CACHE, tiny_model
from transformers import DynamicCache

import hf_paged
import hf_paged_kernels as kernels
from hf_paged import EngineConfig, InvalidArgument, RequestTooLarge, SamplingParams, UnsupportedModel
from hf_paged.hf.swap import Swapped

LABELS = ["bloom-6-heads", "mpt-6-heads", "falcon-7b", "falcon-40b", "falcon-rw", "gpt_neo", "gptj", "openai-gpt",
          "xglm"]  # fmt: skip
needs_kernels = pytest.mark.skipif(not kernels.supports("cpu", "cpu"), reason="no compiled kernels")
ALIBI = ["bloom-6-heads", "mpt-6-heads", "falcon-rw", "falcon-alibi-mqa"]


@pytest.fixture(scope="module", params=LABELS)
def family(request):
    return Comparison(tiny_model(request.param))


def test_tokens_vary(family):
    family.check_is_telling()


def test_chunked_prefill_mixed_with_decodes_and_prefix_hits(family):
    family.check_chunks_and_prefix_hits()


def test_preemption(family):
    family.check_preemption()


@pytest.mark.filterwarnings("ignore:use_cache")  # OpenAI GPT knows no cache: what shows logits runs on stock
def test_generate_returns_stock_tokens_and_logits(family):
    family.check_generate()


@pytest.mark.parametrize("label", ["bart", "trocr"])
def test_families_that_count_padding_as_positions(label):
    family = Comparison(tiny_model(label))
    family.check_chunks_and_prefix_hits()
    family.check_generate()
    family.check_caches()


@pytest.mark.parametrize("label", ["bloom-6-heads", "falcon-40b", "falcon-rw", "falcon-alibi-mqa", "xglm"])
def test_caches_given_and_returned_are_stock_s(label):
    Comparison(tiny_model(label)).check_caches()


@pytest.mark.filterwarnings("ignore:past_key_values")
def test_a_cache_of_all_positions_is_filled_by_stock_where_pages_have_a_window():
    model = tiny_model("gpt_neo")
    ids = torch.randint(3, 199, (1, 40))
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    stock = model.generate(ids, max_new_tokens=5, do_sample=False, **{CACHE: caches[0]})
    with hf_paged.Engine(model):
        paged = model.generate(ids, max_new_tokens=5, do_sample=False, **{CACHE: caches[1]})
    assert torch.equal(stock, paged)
    for a, b in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


def test_completions_of_one_prompt_share_it(family):
    prompt, (tokens, _) = family.jobs[-1], family.expected[-1]
    with hf_paged.Engine(family.model) as engine:
        params = SamplingParams(n=3, temperature=0, max_tokens=len(tokens), ignore_eos=True)
        [output] = engine.generate([prompt], params)
        assert [completion.token_ids for completion in output.outputs] == [tokens] * 3


def test_outside_a_step_the_model_is_stock_s_own_bits(family):
    model, ids = family.model, torch.tensor([family.jobs[-1]])

    def run(of):
        of.zero_grad()
        output = of(ids, labels=ids)
        output.loss.backward()
        return [output.logits.detach().clone(), *(p.grad.clone() for p in of.parameters() if p.grad is not None)]

    expected, state = run(model), copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    hf_paged.patch(model)
    model.generate(ids, max_new_tokens=3, do_sample=False)
    for patched in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a, b) for a, b in zip(run(patched), expected, strict=True))
    assert not any(isinstance(module, Swapped) for module in copy.deepcopy(model).modules())
    hf_paged.unpatch(model)
    assert all(torch.equal(a, b) for a, b in zip(run(model), expected, strict=True))
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("label", ALIBI)
def test_the_bias_of_a_long_context_is_stock_s(label):
    """Falcon's is rounded to 8 bits, which shows beyond 256 positions."""
    model = tiny_model(label)
    ids = torch.randint(3, 199, (1, 430))
    options = dict(max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
    stock = model.generate(ids, **options)
    with hf_paged.Engine(model, config=EngineConfig(max_batch_tokens=96)):
        paged = model.generate(ids, **options)
    assert torch.equal(stock.sequences, paged.sequences)
    for mine, theirs in zip(paged.logits, stock.logits):
        assert (mine - theirs).abs().max() <= 1e-4 * max(1.0, theirs.abs().max().item())


def silence_queries(model) -> None:
    """Leave nothing of the scores but the bias."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "query_key_value" in name:  # per head: query, key, value
                parameter.unflatten(0, (model.config.num_attention_heads, 3, -1))[:, 0] = 0
            elif "Wqkv" in name:
                parameter[: len(parameter) // 3] = 0


@pytest.mark.parametrize("label", ["bloom-6-heads", "mpt-6-heads", "falcon-rw"])
def test_in_bfloat16_the_bias_is_rounded_as_stock_s(label):
    model = tiny_model(label, dtype=torch.bfloat16)
    silence_queries(model)
    options = dict(max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True)
    ids = torch.randint(3, 199, (1, 430))
    stock = model.generate(ids, **options).logits[0]
    with hf_paged.Engine(model):
        paged = model.generate(ids, **options).logits[0]
    assert (paged - stock).abs().max() <= 0.02 * stock.abs().max()


@needs_kernels
@pytest.mark.parametrize("label", ["falcon-7b", "openai-gpt"])
def test_rows_have_the_same_bits_in_every_batch(label):
    """Falcon's linear layers are a class of their own, OpenAI GPT's are Conv1D."""
    Comparison(tiny_model(label)).check_bits()


@needs_kernels
def test_falcon_s_own_kind_of_linear_layer_gets_the_linear_kernel():
    model = tiny_model("falcon-7b")
    count = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    fused = hf_paged.explain(hf_paged.patch(model)).fused
    assert fused["linear"] == count


def test_explain_names_the_bias_and_the_window():
    for label, kinds in (("bloom", {"full, ALiBi"}), ("gpt_neo", {"full", "sliding window 20"})):
        model = hf_paged.patch(tiny_model(label))
        assert {layer.kind for layer in hf_paged.explain(model).layers} == kinds


@pytest.mark.parametrize("label", ["gpt_neo", "openai-gpt", "xglm", "mpt", "bart", "gptj"])
def test_a_table_of_positions_ends_where_it_ends(label):
    sizes = {"max_seq_len": 64} if label == "mpt" else {"max_position_embeddings": 64}
    model = tiny_model(label, **sizes)
    with pytest.raises(InvalidArgument, match="table of positions ends at 64"):
        hf_paged.Engine(model, config=EngineConfig(max_model_len=65))
    with hf_paged.Engine(model) as engine:
        with pytest.raises(RequestTooLarge):
            engine.add(list(range(3, 67)))
        [output] = engine.generate([list(range(3, 63))], SamplingParams(temperature=0, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 4


def test_a_hook_that_the_paged_kernel_would_bypass_is_refused_by_name():
    model = hf_paged.patch(tiny_model("bloom"))
    attention = model.transformer.h[1].self_attention
    handle = attention.attention_dropout.register_forward_hook(lambda *_: None)
    with pytest.raises(Exception, match="BloomAttention.attention_dropout has a forward hook"):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)
    handle.remove()
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("label", ["rembert", "roformer-rotary-value"])
def test_bert_like_decoders_are_right_or_refused_where_stock_attends_in_both_directions(label):
    model = tiny_model(label)
    ids = torch.randint(3, 199, (1, 12))
    with torch.no_grad():
        causal = torch.allclose(model(ids).logits[:, :5], model(ids[:, :5]).logits, atol=1e-4)
    if causal:
        family = Comparison(model)
        family.check_chunks_and_prefix_hits()
        family.check_generate()
    else:
        with pytest.raises(UnsupportedModel, match="attends in both directions, even as a decoder"):
            hf_paged.patch(model)
    with pytest.raises(UnsupportedModel, match="is_decoder=True"):
        hf_paged.patch(tiny_model(label, is_decoder=False))


def test_what_cannot_be_adapted_is_refused_by_name():
    with pytest.raises(UnsupportedModel, match="slow_but_exact"):
        hf_paged.patch(tiny_model("bloom", pretraining_tp=2, slow_but_exact=True))
    with pytest.raises(UnsupportedModel, match="attn_implementation='sdpa'"):
        hf_paged.patch(tiny_model("falcon-rw", attn_implementation="eager"))
    model = tiny_model("xglm")
    attention = model.model.layers[0].self_attn
    attention.forward = attention.forward
    with pytest.raises(UnsupportedModel, match="XGLMAttention was replaced"):
        hf_paged.patch(model)
    assert not any(isinstance(module, Swapped) for module in model.modules())
