"""The gradient of an exact forward is that of the forward that gave the values, and stock's to rounding."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model

import hf_paged
from hf_paged import SamplingParams

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

FAMILIES = ["llama", "gemma3_text", "qwen3_moe", "deepseek_v3", "gpt2"]
MORE = ["qwen3", "mixtral", "gemma2", "gemma4_text", "opt", "falcon", "bloom", "phi3", "olmo2", "glm4", "cohere2"]
FAMILIES += [pytest.param(name, marks=pytest.mark.slow) for name in MORE]


def a_batch():
    """Rows of which two share 37 tokens and one is another's beginning; padded on both sides."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randint(3, 90, (count,), generator=generator).tolist()  # noqa: E731
    shared = draw(37)
    rows = [(shared, draw(9)), (shared, draw(4)), (shared[:32], []), (draw(5), draw(6))]
    before, after = (max(len(row[part]) for row in rows) for part in (0, 1))
    ids, mask = torch.ones(len(rows), before + after, dtype=torch.int64), torch.zeros(len(rows), before + after)
    for row, (prompt, completion) in enumerate(rows):
        place = slice(before - len(prompt), before + len(completion))
        ids[row, place], mask[row, place] = torch.tensor(prompt + completion), 1
    return ids, mask.long()


def gradients(model, ids, mask, **options):
    """(logits, gradients by name) of a loss that weighs every logit of every token."""
    model.zero_grad()
    output = model(ids, attention_mask=mask, use_cache=False, **options)
    weights = torch.rand(output.logits.shape, generator=torch.Generator().manual_seed(1)).to(output.logits)
    (output.logits.log_softmax(-1) * weights)[mask == 1].sum().backward()
    return output.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def positions(mask):
    return {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}


def same(mine: dict, stock: dict, limit: float = 1e-4):
    """Rounding apart. Gradients that are rounding and no more (of biases of keys) are measured by the others."""
    usual = torch.stack([gradient.norm() for gradient in stock.values()]).median()
    assert mine.keys() == stock.keys()
    for name, gradient in stock.items():
        assert (mine[name] - gradient).norm() <= limit * max(gradient.norm(), usual), name


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_stocks(name):
    model, (ids, mask) = tiny_model(name), a_batch()
    told = {} if name == "bloom" else positions(mask)
    logits, stock = gradients(model, ids, mask, **told)
    hf_paged.patch(model, exact=True)
    assert hf_paged.explain(model).second_forward is None
    exact, mine = gradients(model, ids, mask)
    torch.testing.assert_close(exact[mask == 1], logits[mask == 1], rtol=1e-3, atol=1e-4)
    same(mine, stock, 1e-3 if "moe" in name else 1e-4)
    with torch.no_grad():
        assert torch.equal(model(ids, attention_mask=mask).logits, exact)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_in_bfloat16_it_is_as_near_to_float32_as_stocks(name):
    model, (ids, mask) = tiny_model(name).bfloat16(), a_batch()
    _, stock = gradients(model, ids, mask, **positions(mask))
    _, truth = gradients(model.float(), ids, mask, **positions(mask))
    hf_paged.patch(model.bfloat16(), exact=True)
    _, mine = gradients(model, ids, mask)
    off, off_by = (sum((g[n].float() - truth[n]).square().sum() for n in truth).sqrt() for g in (mine, stock))
    assert off <= 1.2 * off_by


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_with_gradient_checkpointing_it_is_the_same(name, reentrant):
    model, (ids, mask) = hf_paged.patch(tiny_model(name), exact=True).train(), a_batch()
    logits, plain = gradients(model, ids, mask)
    calls = []
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.model.layers[0].self_attn.register_forward_hook(lambda *args: calls.append(torch.is_grad_enabled()))
    again, mine = gradients(model, ids, mask)
    assert calls == [not reentrant, True] and torch.equal(again, logits)
    same(mine, plain, 1e-6)
    assert all(module.training for module in model.modules())


def test_of_adapters_on_a_frozen_model():
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    ids, mask = a_batch()
    _, stock = gradients(model, ids, mask, **positions(mask))
    hf_paged.patch(model, exact=True)
    _, mine = gradients(model, ids, mask)
    assert all("lora" in name for name in mine)
    same(mine, stock)
    model.train().gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    _, mine = gradients(model, ids, mask)
    same(mine, stock)


def test_of_some_parameters_only():
    model, (ids, mask) = tiny_model("llama"), a_batch()
    trained = ["model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    _, stock = gradients(model, ids, mask, **positions(mask))
    hf_paged.patch(model, exact=True)
    _, mine = gradients(model, ids, mask)
    assert set(mine) == set(trained)
    same(mine, stock)


def test_it_is_accumulated_over_batches_and_calls():
    model, (ids, mask) = hf_paged.patch(tiny_model("llama"), exact=True), a_batch()

    def loss(rows):
        return model(ids[rows], attention_mask=mask[rows], use_cache=False).logits.logsumexp(-1).sum()

    (loss(slice(0, 2)) + loss(slice(2, 4))).backward()  # two forwards before one backward pass
    together = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss(slice(0, 2)).backward()
    loss(slice(2, 4)).backward()
    same({name: parameter.grad for name, parameter in model.named_parameters()}, together, 1e-5)


def test_one_forward_computes_shared_beginnings_once_and_nothing_twice():
    model, (ids, mask) = hf_paged.patch(tiny_model("llama"), exact=True), a_batch()
    seen = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(hf_paged.current_batch()))
    gradients(model, ids, mask)
    assert len(seen) == 1 and seen[0].num_tokens == 46 + (41 - 32) + 0 + 11  # blocks of 16
    assert [segment.row for segment in seen[0].segments] == [0, 1, 3]
    assert [segment.positions for segment in seen[0].segments] == [range(46), range(32, 41), range(11)]


def test_what_else_was_asked_for_knows_its_gradient():
    model, (ids, mask) = tiny_model("qwen3_moe"), a_batch()
    options = dict(output_hidden_states=True, output_router_logits=True)

    def run(**more):
        model.zero_grad()
        labels = ids.masked_fill((mask == 0) | (mask.roll(1, 1) == 0), -100)
        output = model(ids, attention_mask=mask, labels=labels, **options, **more)
        (output.loss + output.hidden_states[1][mask == 1].square().mean()).backward()
        return output.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    loss, stock = run(**positions(mask))
    hf_paged.patch(model, exact=True)
    actual, mine = run()
    torch.testing.assert_close(actual, loss, rtol=1e-4, atol=1e-4)
    same(mine, stock, 1e-3)


def test_weights_written_to_before_the_backward_pass_are_noticed():
    model, (ids, mask) = hf_paged.patch(tiny_model("llama"), exact=True), a_batch()
    loss = model(ids, attention_mask=mask).logits.sum()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_cache_comes_with_the_output_if_it_is_asked_for():
    model = hf_paged.patch(tiny_model("llama"), exact=True)
    ids = torch.tensor([[5, 6, 7]])
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 3
    logits = model(ids, return_dict=False)[0]
    assert torch.equal(logits, model(ids).logits)


def test_under_autocast_the_values_are_those_that_were_sampled():
    model = hf_paged.patch(tiny_model("llama"), exact=True)
    completion = hf_paged.engine_of(model).generate([[5, 6, 7]], SamplingParams(max_tokens=6, logprobs=0, seed=1))[0].outputs[0]
    ids = torch.tensor([[5, 6, 7, *completion.token_ids]])
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids).logits[0, 2:-1]
    assert logits.dtype == torch.float32 and logits.requires_grad
    logprobs = logits.log_softmax(-1).gather(1, ids[0, 3:, None])[:, 0]
    assert logprobs.tolist() == [entry[t].logprob for entry, t in zip(completion.logprobs, completion.token_ids)]


def test_a_model_whose_kernels_hide_their_gradient_runs_twice(monkeypatch):
    """As one would that calls a kernel of which autograd knows nothing."""
    from hf_paged_kernels import fused

    act_and_mul = fused.act_and_mul

    def hiding(*args, **kwargs):
        with torch.no_grad():
            return act_and_mul(*args, **kwargs)

    model, (ids, mask) = tiny_model("llama"), a_batch()
    _, stock = gradients(model, ids, mask, **positions(mask))
    monkeypatch.setattr(fused, "act_and_mul", hiding)
    hf_paged.patch(model, exact=True)
    assert "the gradient does not reach" in hf_paged.explain(model).second_forward
    assert "the gradient does not reach" in str(hf_paged.explain(model))
    logits, mine = gradients(model, ids, mask)
    same(mine, stock)
    with torch.no_grad():
        assert torch.equal(model(ids, attention_mask=mask).logits, logits)
