"""Exact mode: a generated token's log-probability is, bit for bit, that of one forward over the finished sequence."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model

import hf_paged
from hf_paged import Engine, EngineConfig, InvalidArgument, SamplingParams, UnsupportedModel, UnsupportedOption
from hf_paged.hf.fusion.torch_ops import _length

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's own

CASES = [("llama", torch.float32), ("gemma3_text", torch.float32), ("llama", torch.bfloat16), ("qwen3_moe", torch.bfloat16)]
MORE = [(name, torch.float32) for name in ("qwen3", "mixtral", "deepseek_v3", "gpt2", "gemma4_text", "opt", "falcon", "bloom")]
MORE += [(name, torch.bfloat16) for name in ("gemma2", "mixtral", "phi3", "olmo2", "glm4", "cohere2")]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]


def padded(sequences, *, right: int = 0):
    """(ids, mask) of (prompt, completion) pairs: prompts padded on the left, completions on the right, as TRL does."""
    before = max(len(prompt) for prompt, _ in sequences)
    after = max(len(tokens) for _, tokens in sequences) + right
    ids = torch.full((len(sequences), before + after), 1)
    mask = torch.zeros_like(ids)
    for row, (prompt, tokens) in enumerate(sequences):
        begin = before - len(prompt)
        ids[row, begin : before + len(tokens)] = torch.tensor(prompt + tokens)
        mask[row, begin : before + len(tokens)] = 1
    return ids, mask, after


def differences(model, outputs, prompts):
    """By how much the engine's log-probabilities are off those of one forward over all finished sequences."""
    pairs = [(list(prompt), c) for prompt, output in zip(prompts, outputs) for c in output.outputs]
    ids, mask, after = padded([(prompt, c.token_ids) for prompt, c in pairs], right=3)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, logits_to_keep=after + 1, use_cache=False).logits
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    off = []
    for row, (_, completion) in enumerate(pairs):
        for place, (token, entry) in enumerate(zip(completion.token_ids, completion.logprobs)):
            off.append(abs(entry[token].logprob - float(logprobs[row, place, token])))
    return off


@pytest.mark.parametrize("name, dtype", CASES, ids=str)
def test_logprobs_of_random_mixtures_are_those_of_one_forward(name, dtype):
    model = tiny_model(name).to(dtype)
    hf_paged.patch(model, exact=True)

    @settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(
        lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 40), st.integers(1, 3)), min_size=1, max_size=5),
        budget=st.sampled_from([7, 24, 512]),
        tokens_of_memory=st.sampled_from([160, 4000]),
        overlap=st.booleans(),
        speculation=st.sampled_from([None, "ngram"]),
        seed=st.integers(0, 1000),
    )
    def check(lengths, budget, tokens_of_memory, overlap, speculation, seed):
        generator = torch.Generator().manual_seed(seed)
        shared = torch.randint(3, 90, (40,), generator=generator).tolist()
        prompts = [shared[:from_shared] + torch.randint(3, 90, (own,), generator=generator).tolist()
                   for own, from_shared, _ in lengths]  # fmt: skip
        params = [SamplingParams(n=n, max_tokens=9 + n, temperature=1.0, logprobs=0, ignore_eos=True, seed=seed + n)
                  for _, _, n in lengths]  # fmt: skip
        probe = hf_paged.engine_of(model)
        memory = tokens_of_memory * probe._cache.bytes_per_token
        probe.close()
        config = EngineConfig(exact=True, block_size=16, max_batch_tokens=budget, max_num_seqs=4, overlap=overlap,
                              speculation=speculation, kv_cache_memory=int(memory))  # fmt: skip
        with Engine(model, config=config) as engine:
            off = differences(model, engine.generate(prompts, params), prompts)
        assert off and max(off) == 0.0

    check()


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_a_quantized_cache_is_exact_too(kv_dtype):
    model = hf_paged.patch(tiny_model("llama"), exact=True, kv_dtype=kv_dtype, max_batch_tokens=16)
    prompts = [list(range(5, 45)), list(range(5, 30)), [7, 8]]
    outputs = hf_paged.engine_of(model).generate(prompts, SamplingParams(max_tokens=12, logprobs=0, seed=1))
    assert max(differences(model, outputs, prompts)) == 0.0


def test_without_it_they_are_not_always():
    """The test above can fail."""
    model = hf_paged.patch(tiny_model("llama").bfloat16())
    prompts = [list(range(5, 45)), list(range(5, 30)), [7, 8]]
    outputs = hf_paged.engine_of(model).generate(prompts, SamplingParams(max_tokens=12, logprobs=0, seed=1))
    assert max(differences(model, outputs, prompts)) > 0.0


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "opt"])
def test_a_forward_gives_stocks_loss_and_gradients(name):
    model = tiny_model(name)
    sequences = [([5, 9, 11], [40, 7, 8, 12]), ([6, 6, 30, 31, 32, 33], [2, 3])]
    ids, mask, _ = padded(sequences)
    labels = ids.masked_fill((mask == 0) | (mask.roll(1, 1) == 0), -100)  # none for what padding would predict
    positions = (mask.cumsum(-1) - 1).clamp_min(0)

    def gradients(**options):
        model.zero_grad()
        output = model(ids, attention_mask=mask, labels=labels, **options)
        output.loss.backward()
        return output, {key: parameter.grad.clone() for key, parameter in model.named_parameters()}

    expected, stock = gradients(position_ids=positions)
    hf_paged.patch(model, exact=True)
    actual, own = gradients()
    torch.testing.assert_close(actual.logits[mask == 1], expected.logits[mask == 1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-5, atol=1e-5)
    for key, gradient in stock.items():
        torch.testing.assert_close(own[key], gradient, rtol=1e-3, atol=2e-5, msg=key)
    with torch.no_grad():
        alone = model(ids[1:, mask[1] == 1], use_cache=False).logits[0]
    assert torch.equal(alone, actual.logits[1, mask[1] == 1])


def test_logits_after_a_step_of_the_optimizer_are_of_the_new_weights():
    model = hf_paged.patch(tiny_model("llama"), exact=True)
    ids = torch.tensor([[5, 9, 11, 40, 7, 8]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = model(ids, labels=ids)
    before.loss.backward()
    optimizer.step()
    after = model(ids, labels=ids)
    hf_paged.unpatch(model)
    assert after.loss < before.loss - 0.01
    torch.testing.assert_close(after.logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_policy_with_lora_is_exact():
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    hf_paged.patch(model, exact=True)
    prompts = [list(range(5, 45)), list(range(5, 30))]
    outputs = hf_paged.engine_of(model).generate(prompts, SamplingParams(n=2, max_tokens=8, logprobs=0, seed=1))
    assert max(differences(model, outputs, prompts)) == 0.0


def test_requests_with_adapters_get_the_same_bits_alone_and_together(tmp_path):
    wrapped = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    wrapped.save_pretrained(tmp_path)
    prompts = [list(range(5, 45)), list(range(5, 30)), [7, 8]]
    params = SamplingParams(max_tokens=8, logprobs=0, temperature=1.0, seed=1)
    with Engine(tiny_model("llama"), config=EngineConfig(exact=True, max_batch_tokens=16, prefix_cache=False)) as engine:
        engine.load_adapter("a", tmp_path)
        names = ["a", None, "a"]
        together = engine.generate(prompts, params, adapter=names)
        alone = [engine.generate([prompt], params, adapter=name)[0] for prompt, name in zip(prompts, names)]
    assert [o.outputs[0].logprobs for o in together] == [o.outputs[0].logprobs for o in alone]


def test_adapters_that_come_later_are_refused_until_it_is_patched_again():
    model = hf_paged.patch(tiny_model("llama"), exact=True)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(UnsupportedOption, match="exact .*patch it again"):
        wrapped(torch.tensor([[5, 6, 7]]), use_cache=False)
    hf_paged.patch(wrapped)
    hf_paged.patch(wrapped, exact=True)
    assert wrapped(torch.tensor([[5, 6, 7]]), use_cache=False).logits.shape[1] == 3


@pytest.mark.parametrize(
    "options, named",
    [
        (dict(attention_mask=torch.tensor([[1, 0, 1]])), "attention_mask"),
        (dict(attention_mask=torch.ones(1, 2)), "attention_mask"),
        (dict(attention_mask=torch.zeros(1, 3)), "attention_mask"),
        (dict(position_ids=torch.tensor([[0, 1, 2]])), "position_ids"),
        (dict(logits_to_keep=torch.tensor([0])), "logits_to_keep"),
        (dict(inputs_embeds=torch.zeros(1, 3, 48)), "inputs_embeds"),
    ],
)
def test_inputs_that_the_engine_would_not_see_so_are_refused(options, named):
    model = hf_paged.patch(tiny_model("llama"), exact=True)
    with pytest.raises((InvalidArgument, UnsupportedOption), match=named):
        model(torch.tensor([[5, 6, 7]]), **options)


def test_dropout_is_refused_in_training_mode():
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1))
    hf_paged.patch(model, exact=True)
    with pytest.raises(UnsupportedOption, match="exact: .*lora_dropout"):
        model.train()(torch.tensor([[5, 6, 7]]))
    assert model.eval()(torch.tensor([[5, 6, 7]])).logits.shape[1] == 3


def test_what_is_not_exact_is_refused_by_name():
    with pytest.raises(UnsupportedModel, match="exact: GptOss.* calls matmul"):
        hf_paged.patch(tiny_model("gpt_oss"), exact=True)
    with pytest.raises(UnsupportedModel, match="exact: GPT2.* calls"):
        hf_paged.patch(tiny_model("gpt2").bfloat16(), exact=True)
    with pytest.raises(UnsupportedOption, match="exact: .*float16"):
        hf_paged.patch(tiny_model("llama").half(), exact=True)
    with pytest.raises(UnsupportedOption, match="exact: .*state"):
        hf_paged.patch(tiny_model("mamba2"), exact=True)
    for options in (dict(fuse=False), dict(attention_backend="reference"), dict(exact=1)):
        with pytest.raises(InvalidArgument, match="^exact"):
            EngineConfig(**{"exact": True, **options})
    model = hf_paged.patch(tiny_model("llama"))
    with pytest.raises(InvalidArgument, match="^exact is decided when the model is patched"):
        Engine(model, config=EngineConfig(exact=True))


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 16, 96])
def test_every_threads_share_is_whole_vectors(threads):
    for count in (0, 1, 63, 64, 65, 32768, 32769, 100_003, 1_000_001, 40_000_064):
        length = _length(count, threads)
        shares = max(1, min(threads, -(-length // 32768)))
        assert count <= length < count + 64 * shares and length % (64 * shares) == 0


# -- rollouts


def test_a_training_loop_with_rollouts_learns_from_its_own_weights():
    """The reward is an even token: after some steps there are more of them, and training is as it was."""
    torch.manual_seed(0)
    model = tiny_model("llama").train()
    seen = []
    handle = model.model.layers[0].register_forward_hook(lambda *args: seen.append(torch.is_grad_enabled()))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    prompts = [[5, 9, 11], [7, 8, 9, 10]]
    rewards = []
    with hf_paged.rollout(model, exact=True) as rollout:
        for step in range(8):
            outputs = rollout.generate(prompts, SamplingParams(n=8, max_tokens=8, logprobs=0, seed=step, ignore_eos=True))
            assert hf_paged.engine_of(model).sleeping and model.training
            pairs = [(prompt, c) for prompt, output in zip(prompts, outputs) for c in output.outputs]
            ids, mask, after = padded([(prompt, c.token_ids) for prompt, c in pairs])
            reward = torch.tensor([sum(t % 2 == 0 for t in c.token_ids) / len(c.token_ids) for _, c in pairs])
            rewards.append(float(reward.mean()))
            logits = model(ids, attention_mask=mask, logits_to_keep=after + 1).logits[:, :-1]
            chosen = torch.log_softmax(logits, -1).gather(2, ids[:, -after:, None])[..., 0]
            sampled = torch.tensor([[e[t].logprob for e, t in zip(c.logprobs, c.token_ids)] for _, c in pairs])
            assert torch.equal(chosen, sampled)  # the importance ratio is 1
            assert torch.equal(rollout.logprobs(ids, mask, count=after), sampled)
            (-(reward - reward.mean())[:, None] * chosen).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    handle.remove()
    assert rewards[-1] > rewards[0] + 0.15
    assert seen.count(True) == 8 and False in seen and not hf_paged.hf.patch.is_patched(model)


def test_logprobs_of_padded_rows_at_a_temperature():
    model = tiny_model("llama")
    ids, mask, _ = padded([([5, 9, 11], [40, 7, 8, 12]), ([6, 6, 30, 31, 32, 33], [2, 3])])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits / 0.7
    expected = torch.log_softmax(logits[:, :-1], -1).gather(2, ids[:, 1:, None])[..., 0]
    expected = (expected * mask[:, 1:] * mask[:, :-1]).detach()
    for exact in (False, True):
        with hf_paged.rollout(model, exact=exact) as rollout:
            torch.testing.assert_close(rollout.logprobs(ids, mask, temperature=0.7), expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(
                rollout.logprobs(ids, mask, count=3, temperature=0.7), expected[:, -3:], rtol=1e-4, atol=1e-4
            )
            for wrong in (dict(count=0), dict(count=ids.shape[1]), dict(temperature=0)):
                with pytest.raises(InvalidArgument, match=next(iter(wrong))):
                    rollout.logprobs(ids, mask, **wrong)


def test_a_rollout_of_a_patched_model_leaves_it_patched():
    model = hf_paged.patch(tiny_model("llama"))
    with pytest.raises(InvalidArgument, match="config: the model is patched already"):
        hf_paged.rollout(model, exact=True)
    with warnings.catch_warnings(), hf_paged.rollout(model) as rollout:
        assert not rollout.exact and len(rollout.generate([[5, 6]])[0].outputs[0].token_ids) == 16
    assert hf_paged.hf.patch.is_patched(model)
