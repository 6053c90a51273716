"""Training a patched model: forward, backward and weights are the unpatched model's, bit for bit."""

from __future__ import annotations

import copy
import threading
from contextlib import nullcontext

import peft
import pytest
import torch
from tiny_models import tiny_model

import hf_paged

pytestmark = pytest.mark.filterwarnings(
    # New names from transformers 5.24 on.
    "ignore:.(is_)?gradient_checkpointing(_enable)?. is deprecated:FutureWarning",
)

IDS = torch.randint(3, 190, (2, 24), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0


def dropping(name: str, adapters: bool = False) -> torch.nn.Module:
    """A model with dropout, in its attention and, with `adapters`, before its LoRA layers."""
    model = tiny_model(name, attention_dropout=0.2)
    if not adapters:
        return model
    targets = ["q_proj", "v_proj", "down_proj"]
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.2, target_modules=targets)
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    return wrapped


def step(model, autocast: bool) -> tuple:
    """Logits, loss and every gradient of one training step, and the generator's state after it."""
    model.train()
    model.zero_grad()
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        output = model(input_ids=IDS, attention_mask=MASK, labels=IDS)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach().clone(), output.loss.item(), gradients, torch.get_rng_state()


def assert_same(one: tuple, other: tuple) -> None:
    assert torch.equal(one[0], other[0]) and one[1] == other[1] and torch.equal(one[3], other[3])
    assert one[2].keys() == other[2].keys() and one[2]
    for name, gradient in one[2].items():
        assert torch.equal(gradient, other[2][name]), name


def greedy(model, new: int = 6) -> torch.Tensor:
    model.eval()
    return model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=new, do_sample=False)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "not-reentrant"])
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_a_training_step_is_the_unpatched_model_s(adapters, checkpointing, autocast):
    model = dropping("llama", adapters)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        if adapters:
            model.enable_input_require_grads()
    expected = step(copy.deepcopy(model), autocast)
    hf_paged.patch(model)
    greedy(model)
    assert_same(step(model, autocast), expected)
    greedy(model)
    hf_paged.unpatch(model)
    assert_same(step(model, autocast), expected)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "qwen3_moe", "mistral-window", "phi3-window", "olmo2"])
def test_other_families_train_alike(name):
    model = dropping(name)
    expected = step(copy.deepcopy(model), False)
    hf_paged.patch(model)
    greedy(model)
    assert_same(step(model, False), expected)


def test_odd_sizes_keep_every_bit():
    """Weights that one merged storage cannot hold as aligned as torch does; a single row shows it."""
    heads = dict(num_attention_heads=3, num_key_value_heads=1, head_dim=14)
    model = tiny_model("llama", hidden_size=42, intermediate_size=61, **heads)
    expected, row = step(copy.deepcopy(model), False), model.eval()(IDS[:1, :1]).logits
    hf_paged.patch(model)
    assert torch.equal(model(IDS[:1, :1]).logits, row)
    assert_same(step(model, False), expected)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_generating_and_training_in_turns_goes_as_unpatched(adapters, checkpointing):
    """Generated tokens are trained on, with dropout: tokens, losses and weights stay equal to the last bit."""

    def loop(model) -> tuple[list, list, dict]:
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        tokens, losses = [], []
        torch.manual_seed(3)
        for _ in range(4):
            tokens.append(greedy(model, new=10))
            model.train()
            mask = torch.cat([MASK, torch.ones(2, 10, dtype=MASK.dtype)], 1)
            loss = model(input_ids=tokens[-1], attention_mask=mask, labels=tokens[-1]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return tokens, losses, {name: p.detach().clone() for name, p in model.named_parameters()}

    model = dropping("llama", adapters)
    expected = loop(copy.deepcopy(model))
    hf_paged.patch(model)
    tokens, losses, weights = loop(model)
    assert len({tuple(step.flatten().tolist()) for step in tokens}) == 4  # the weights' changes show
    assert all(torch.equal(a, b) for a, b in zip(tokens, expected[0], strict=True)) and losses == expected[1]
    assert all(torch.equal(weight, expected[2][name]) for name, weight in weights.items())
    assert hf_paged.engine_of(model).stats()["steps"] > 0


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_patching_and_greedy_search_leave_torch_s_generator_alone(adapters):
    model = dropping("llama", adapters)
    model.train()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    hf_paged.patch(model, verify=True)
    hf_paged.patch(model)
    model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, num_beams=2)
    hf_paged.explain(model)
    hf_paged.unpatch(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_in_train_mode_generate_drops_nothing():
    model = dropping("llama", adapters=True)
    expected = greedy(model)
    hf_paged.patch(model)
    model.train()
    assert torch.equal(model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False), expected)
    assert all(module.training for module in model.modules())


def test_a_forward_under_autograd_while_another_thread_generates():
    """Its attention is the model's own, also where gradient checkpointing runs layers again."""
    model = tiny_model("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    twin = copy.deepcopy(model)
    twin.config = model.config
    for module in twin.modules():
        if hasattr(module, "config"):
            module.config = model.config
    expected = step(copy.deepcopy(model), False)
    hf_paged.patch(twin)
    stop = threading.Event()

    def generate():
        while not stop.is_set():
            hf_paged.engine_of(twin).reset_prefix_cache()
            twin.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False)

    thread = threading.Thread(target=generate)
    thread.start()
    try:
        hf_paged.patch(model)
        for _ in range(5):
            assert_same(step(model, False), expected)
    finally:
        stop.set()
        thread.join(60)
