"""Run by torchrun: a sharded model against the same model in one process, check by check, all ranks together."""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from quantized_checkpoints import awq_layer, eight_bit_layer, gptq_layer, packed_layer_of_ct, save_quantized
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

import hf_paged
from hf_paged import Engine, EngineConfig, SamplingParams
from hf_paged.hf.build import distributed_config

MODELS = {
    "llama": dict(vocab_size=200),
    "qwen3": dict(vocab_size=200),
    "gemma3_text": dict(vocab_size=200),
    "qwen3_moe": dict(vocab_size=200),
    "qwen2": dict(vocab_size=200),
    "mistral": dict(vocab_size=200),
    "llama tied, one layer": dict(vocab_size=200, tie_word_embeddings=True, num_hidden_layers=1),
    "mixtral": dict(vocab_size=200),
    "qwen3_moe by experts": dict(vocab_size=200),
    "mixtral by experts": dict(vocab_size=200),
    "qwen2 with one key head": dict(vocab_size=200, num_key_value_heads=1),
    "gemma3_text with one key head": dict(vocab_size=200, num_key_value_heads=1),
}
SIZES = dict(vocab_size=200, hidden_size=128, head_dim=32, intermediate_size=192, num_hidden_layers=2)
GPTQ = dict(quant_method="gptq", sym=False, desc_act=True)
CT = dict(quant_method="compressed-tensors", format="pack-quantized")
QUANTIZED = {  # family, config, what makes a layer [N, K], other sizes
    "GPTQ 4 bit": ("llama", GPTQ | dict(bits=4, group_size=32), lambda N, K: gptq_layer(N, K, group_size=32)),
    "GPTQ 4 bit, act-order": ("llama", GPTQ | dict(bits=4, group_size=32), lambda N, K: gptq_layer(N, K, group_size=32, act_order=True)),
    "GPTQ 4 bit, a scale a row": ("qwen2", GPTQ | dict(bits=4, group_size=-1), lambda N, K: gptq_layer(N, K, group_size=-1)),
    "GPTQ 4 bit, groups cut": ("qwen3", GPTQ | dict(bits=4, group_size=64), lambda N, K: gptq_layer(N, K, group_size=64)),
    "GPTQ 8 bit, act-order": ("qwen3", GPTQ | dict(bits=8, group_size=16), lambda N, K: gptq_layer(N, K, bits=8, act_order=True)),
    "GPTQ 3 bit, act-order": ("gemma3_text", GPTQ | dict(bits=3, group_size=32), lambda N, K: gptq_layer(N, K, bits=3, group_size=32, act_order=True)),
    "GPTQ 2 bit, act-order": ("mistral", GPTQ | dict(bits=2, group_size=64), lambda N, K: gptq_layer(N, K, bits=2, group_size=64, act_order=True)),
    "GPTQ 4 bit, one key head": (
        "llama", GPTQ | dict(bits=4, group_size=32), lambda N, K: gptq_layer(N, K, group_size=32), dict(num_key_value_heads=1),
    ),
    "AWQ": ("llama", dict(quant_method="awq", bits=4, group_size=32, version="gemm"), lambda N, K: awq_layer(N, K, group_size=32)),
    "FP8, a scale each": (
        "llama", dict(quant_method="fp8"), lambda N, K: eight_bit_layer(N, K, block=(None, None), shape=()),
    ),
    "FP8, blocks": (
        "qwen3", dict(quant_method="fp8", weight_block_size=[32, 32]),
        lambda N, K: eight_bit_layer(N, K, block=(32, 32), name="weight_scale_inv"),
    ),
    "compressed-tensors 4 bit, act-order": (
        "llama", CT | dict(config_groups={"a": dict(targets=["Linear"], weights=dict(num_bits=4, strategy="group", group_size=32, symmetric=False))}),
        lambda N, K: packed_layer_of_ct(N, K, group_size=32, sym=False, act_order=True),
    ),
    "compressed-tensors W8A8": (
        "llama", CT | dict(format="int-quantized", config_groups={"a": dict(
            targets=["Linear"], weights=dict(num_bits=8, strategy="channel"),
            input_activations=dict(num_bits=8, type="int", dynamic=True, strategy="token"),
        )}),
        lambda N, K: eight_bit_layer(N, K, kind="int8"),
    ),
    "compressed-tensors FP8 channels": (
        "qwen2", CT | dict(format="float-quantized", config_groups={"a": dict(
            targets=["Linear"], weights=dict(num_bits=8, type="float", strategy="channel"),
            input_activations=dict(num_bits=8, type="float", dynamic=True, strategy="token"),
        )}),
        lambda N, K: eight_bit_layer(N, K),
    ),
}  # fmt: skip
NEW = 12
CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def rank() -> int:
    return dist.get_rank()


def prompts(rows: int = 3, length: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 190, (rows, length), generator=torch.Generator().manual_seed(seed))


def ragged(rows: int = 3, length: int = 20) -> dict:
    """Rows of several lengths, padded on the left."""
    ids = prompts(rows, length)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 4 * row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


class Pair:
    """A model in one process (on every rank), and its shards."""

    def __init__(self, folder: Path, label: str):
        path = folder / label
        if rank() == 0 and label in QUANTIZED:
            family, config, make, *more = QUANTIZED[label]
            torch.manual_seed(0)
            save_quantized(tiny_model(family, **SIZES, **(more[0] if more else {})), path, config, lambda name, N, K: make(N, K))
        elif rank() == 0:
            tiny_model(label.split()[0], **MODELS[label]).save_pretrained(path)
        dist.barrier()
        self.whole = AutoModelForCausalLM.from_pretrained(path).eval()
        self.shards = AutoModelForCausalLM.from_pretrained(
            path, distributed_config=distributed_config(dist.get_world_size(), "by experts" in label)
        ).eval()
        for model in (self.whole, self.shards):
            model.generation_config.pad_token_id = 0
            model.generation_config.eos_token_id = None

    def led(self, work, config: EngineConfig | None = None, **options):
        """`work(engine)` on rank 0, while the others follow; None there. `options`: of patching."""
        hf_paged.patch(self.shards, config, **options)
        try:
            if rank():
                return hf_paged.follow(self.shards)
            engine = hf_paged.engine_of(self.shards)
            result = work(engine)
            engine.check_integrity()
            return result
        finally:
            hf_paged.unpatch(self.shards)

    def alone(self, work, config: EngineConfig | None = None, **options):
        """`work(engine)` in one process, on rank 0; None elsewhere. Raises on all ranks if it did there."""
        result, problem = None, [None]
        try:
            if rank() == 0:
                with Engine(self.whole, config=config, **options) as engine:
                    result = work(engine)
        except Exception:
            problem = [traceback.format_exc()]
        dist.broadcast_object_list(problem, 0)
        assert problem[0] is None, problem[0]
        return result

    def same(self, work, config: EngineConfig | None = None, **options) -> None:
        """`work(engine)` gives the same on shards as in one process. `options`: what Engine and patch know."""
        expected, actual = self.alone(work, config, **options), self.led(work, config, **options)
        assert actual == expected, f"{actual} != {expected}"


pairs: dict[str, Pair] = {}


def tokens(engine, ids: torch.Tensor, **params) -> list:
    """Token ids of every completion of every prompt."""
    outputs = engine.generate(ids.tolist(), SamplingParams(detokenize=False, **{"max_tokens": NEW, "temperature": 0.0, **params}))
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def refused(kind: type[Exception], name: str, call, *args, **options) -> None:
    try:
        call(*args, **options)
    except kind as error:
        assert name in str(error), f"{name!r} is not in {error}"
    else:
        raise AssertionError(f"{name} was not refused")


def of_every_model(label: str, heads: tuple[int, int] = (2, 1)) -> None:
    """Of every rank `heads` (query, key/value)."""
    pair = pairs[label]
    if attention_is_whole(label):
        heads = (4, 2)
    options = dict(max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True)
    expected = pair.whole.generate(**ragged(), **options)
    hf_paged.patch(pair.shards)
    try:
        layer = pair.shards._hf_paged.adapter.layers[0]
        assert (layer.num_heads, layer.num_kv_heads) == heads
        # made up, each layer has an order of its own, and those are not merged
        assert pair.shards._hf_paged.fusions.counts["qkv"] or "act-order" in label, "nothing was merged"
        plain = pair.shards.generate(**ragged(), max_new_tokens=NEW, do_sample=False)  # by winners
        full = pair.shards.generate(**ragged(), **options)  # by whole logits
    finally:
        hf_paged.unpatch(pair.shards)
    assert torch.equal(plain, expected.sequences)
    assert torch.equal(full.sequences, expected.sequences)
    difference = max(float((a - b).abs().max()) for a, b in zip(full.logits, expected.logits, strict=True))
    assert difference < 1e-4, difference


def attention_is_whole(label: str) -> bool:
    """Older transformers deal out experts alone, or everything but whole experts."""
    return "by experts" in label and not hasattr(DistributedConfig, "ep_size")


def of_every_format(label: str, heads: tuple[int, int] = (2, 1)) -> None:
    pair = pairs.setdefault(label, Pair(Path(FOLDER[0]), label))
    with torch.no_grad():
        whole, shards = (model(**ragged()).logits for model in (pair.whole, pair.shards))
    assert (whole - shards).abs().max() < 1e-4, (whole - shards).abs().max()
    layer = pair.shards.model.layers[0].self_attn
    assert layer.q_proj.out_features == layer.o_proj.in_features == 32 * heads[0]
    of_every_model(label, heads)
    refused(hf_paged.UnsupportedOption, "a part of a quantized layer", pair.shards.save_pretrained, FOLDER[0])
    del pairs[label]


for _label in QUANTIZED:
    CHECKS.append((f"tokens and logits of {_label}", lambda label=_label: of_every_format(label)))

for _label in MODELS:
    CHECKS.append((f"tokens and logits of {_label}", lambda label=_label: of_every_model(label)))


@check
def what_explain_tells():
    for label, expected in (
        ("gemma3_text with one key head", ["rank 0 of 2", "by outputs: q_proj, k_proj, v_proj, gate_proj, up_proj",
                                           "key/value heads: 1, each on 2 ranks, with its cache"]),
        ("GPTQ 4 bit, act-order", ["act-order: 4 layers cut by inputs are filled up with zeros"]),
        ("compressed-tensors W8A8", ["inputs of 4 layers are rounded by scales that the ranks find together"]),
    ):  # fmt: skip
        pair = pairs.get(label) or Pair(Path(FOLDER[0]), label)
        told = pair.led(lambda engine: str(hf_paged.explain(engine.model.module)))
        missing = [line for line in expected if told and f"shards  {line}" not in told]
        assert not missing, f"{missing} in {told}"


@check
def peaks_of_inputs_that_are_rounded():
    def work(engine):
        engine.model.team.traffic.clear()
        tokens(engine, prompts(1), max_tokens=1)
        return dict(engine.model.team.traffic)

    pair = Pair(Path(FOLDER[0]), "compressed-tensors W8A8")
    traffic = pair.led(work)
    if traffic:  # 2 layers of 2 layers, 20 tokens, a float32 each
        assert (traffic["scales"], traffic["calls scales"]) == (4 * 20 * 4, 4), traffic


@check
def shared_heads_outside_of_steps():
    """A head that both ranks have: gradients, stock's own decoding with a cache of fixed size, files that are saved."""
    pair = pairs["gemma3_text with one key head"]
    gradients = []
    for model in (pair.whole, pair.shards):
        model(input_ids=prompts()).logits.square().mean().backward()
        attention = model.model.layers[1].self_attn
        found = [module.weight.grad for module in (attention.k_proj, attention.v_proj, attention.q_proj, attention.k_norm)]
        gradients.append([grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in found])
        model.zero_grad()
    for whole, shards in zip(*gradients):
        assert (whole - shards).abs().max() < 1e-4 * whole.abs().max(), (whole, shards)
    options = dict(max_new_tokens=NEW, do_sample=False, cache_implementation="static", disable_compile=True)
    assert torch.equal(*(model.generate(**ragged(), **options) for model in (pair.whole, pair.shards)))
    pair.shards.save_pretrained(Path(FOLDER[0]) / "saved")
    dist.barrier()
    again = AutoModelForCausalLM.from_pretrained(Path(FOLDER[0]) / "saved").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in pair.whole.state_dict().items())


@check
def beams():
    pair = pairs["llama"]
    options = dict(max_new_tokens=NEW, num_beams=3, num_return_sequences=2, do_sample=False)
    hf_paged.patch(pair.shards)
    try:
        actual = pair.shards.generate(**ragged(), **options)
    finally:
        hf_paged.unpatch(pair.shards)
    assert torch.equal(actual, pair.whole.generate(**ragged(), **options))


@check
def sampled_alike_on_all_ranks():
    pair = pairs["llama"]
    torch.manual_seed(rank())  # rank 0's counts
    hf_paged.patch(pair.shards)
    try:
        actual = pair.shards.generate(prompts(), max_new_tokens=NEW, do_sample=True)
    finally:
        hf_paged.unpatch(pair.shards)
    torch.manual_seed(0)
    hf_paged.patch(pair.whole)
    expected = pair.whole.generate(prompts(), max_new_tokens=NEW, do_sample=True)
    hf_paged.unpatch(pair.whole)
    assert torch.equal(actual, expected)


@check
def completions_and_samples():
    pairs["llama"].same(lambda engine: tokens(engine, prompts(), n=3, temperature=0.9, seed=5))


@check
def greedy_completions():
    pairs["llama"].same(lambda engine: tokens(engine, prompts(), n=2))


@check
def rules_and_logprobs():
    def work(engine):
        params = SamplingParams(max_tokens=6, temperature=0.0, repetition_penalty=1.3, logprobs=2, prompt_logprobs=1, detokenize=False)
        outputs = engine.generate(prompts().tolist(), params)
        return [
            ([*output.outputs[0].token_ids], [[*step] for step in output.outputs[0].logprobs], len(output.prompt_logprobs))
            for output in outputs
        ]

    pairs["llama"].same(work)


@check
def prefix_hits():
    shared = prompts(1, 40)[0].tolist()

    def work(engine):
        first = tokens(engine, torch.tensor([shared + [7, 8]]))
        second = tokens(engine, torch.tensor([shared + [9, 10], shared + [11, 12]]))
        assert engine.stats()["prefix_hit_tokens"] >= 64
        return first, second

    pairs["llama"].same(work)


@check
def preemption():
    def work(engine):
        found = tokens(engine, prompts(6, 30), max_tokens=40)
        assert engine.stats()["preemptions"] > 0
        return found

    pair = pairs["llama"]
    ranks = dist.get_world_size()
    a_block = 16 * 2 * 2 * 12 * 4 * 3  # tokens, keys and values, heads, size, bytes, layers: of the whole model
    expected = pair.alone(work, EngineConfig(kv_cache_memory=14 * a_block))
    actual = pair.led(work, EngineConfig(kv_cache_memory=14 * a_block // ranks))
    assert actual == expected


@check
def chunks_and_overlap():
    pairs["gemma3_text"].same(
        lambda engine: tokens(engine, prompts(4, 50)), EngineConfig(max_batch_tokens=32, overlap=True)
    )


@check
def guesses():
    def work(engine):
        found = tokens(engine, prompts(2, 6).repeat(1, 5), max_tokens=80)
        assert engine.stats()["draft_tokens"] > 0
        return found

    pairs["llama"].same(work, EngineConfig(speculation="ngram"))


@check
def abort_and_another():
    def work(engine):
        lost = engine.add(prompts(1)[0].tolist(), SamplingParams(max_tokens=100, detokenize=False))
        for _ in range(5):
            engine.step()
        assert engine.abort(lost)
        return tokens(engine, prompts(2, seed=1))

    pairs["llama"].same(work)


@check
def hidden_states_for_embeddings():
    pair = pairs["llama"]
    work = lambda engine: [output.embedding for output in engine.embed(prompts().tolist())]  # noqa: E731
    expected, actual = pair.alone(work), pair.led(work)
    if actual is not None:
        assert max(float(abs(a - b).max()) for a, b in zip(actual, expected, strict=True)) < 1e-4


@check
def resize_and_sleep():
    def work(engine):
        first = tokens(engine, prompts())
        engine.resize_kv_cache("1MiB")
        second = tokens(engine, prompts(seed=2))
        engine.sleep()
        assert engine.sleeping
        return first, second, tokens(engine, prompts())

    pairs["llama"].same(work)


@check
def embeddings_for_a_prompt():
    pair = pairs["llama"]
    embeds = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(3)) * 0.3
    expected = pair.whole.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False)
    hf_paged.patch(pair.shards)
    try:
        actual = pair.shards.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False)
    finally:
        hf_paged.unpatch(pair.shards)
    assert torch.equal(actual, expected)


@check
def weights_that_change():
    """A write into the shards reaches the next token, and leaves merged memory as it was."""
    pair = pairs["llama"]
    hf_paged.patch(pair.shards)
    try:
        before = pair.shards.generate(prompts(), max_new_tokens=NEW, do_sample=False)
        with torch.no_grad():
            for model in (pair.whole, pair.shards):
                model.model.layers[0].self_attn.k_proj.weight.mul_(1.7)
                model.model.layers[1].mlp.down_proj.weight.mul_(1.2)
        after = pair.shards.generate(prompts(), max_new_tokens=NEW, do_sample=False)
        assert torch.equal(after, pair.whole.generate(prompts(), max_new_tokens=NEW, do_sample=False))
        assert not torch.equal(after, before)
    finally:
        hf_paged.unpatch(pair.shards)


@check
def unpatched_as_it_was():
    pair = pairs["qwen3"]
    states = {name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
              for name, tensor in pair.shards.state_dict().items()}  # fmt: skip
    with torch.no_grad():
        before = pair.shards(input_ids=prompts()).logits
    hf_paged.patch(pair.shards)
    with torch.no_grad():
        patched = pair.shards(input_ids=prompts()).logits
    hf_paged.unpatch(pair.shards)
    with torch.no_grad():
        after = pair.shards(input_ids=prompts()).logits
    assert torch.equal(before, patched) and torch.equal(before, after)
    for name, tensor in pair.shards.state_dict().items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        assert torch.equal(whole, states[name]), name


@check
def bytes_of_a_step():
    """Two sums a layer and one for the embedding, of the step's tokens, and a number and a token of every row's winner."""
    pair = pairs["llama"]
    size, layers = 48, 3
    embedding_is_split = hasattr(pair.shards.get_input_embeddings().weight, "placements")  # by newer transformers

    def work(engine):
        team = engine.model.team
        found = []
        engine.add(prompts(1)[0].tolist(), SamplingParams(max_tokens=4, temperature=0.0, detokenize=False))
        while engine.has_unfinished():
            team.traffic.clear()
            engine.step()
            found.append(dict(team.traffic))
        return found

    steps = pair.led(work)
    for step, num_tokens in zip(steps or [], [20, 1, 1, 1], strict=bool(steps)):
        assert step["all_reduce"] == 2 * layers * num_tokens * size * 4, step
        assert step["calls all_reduce"] == 2 * layers
        assert step.get("embedding", 0) == embedding_is_split * num_tokens * size * 4
        assert step["winners"] == 16 and "logits" not in step
        assert step["calls orders"] == 1


@check
def whole_experts():
    """Half of the experts on each rank; two sums a layer as ever, or one where attention is whole on every rank."""
    for label in ("qwen3_moe by experts", "mixtral by experts"):
        pair, whole = pairs[label], attention_is_whole(label)

        def work(engine):
            assert "whole experts, then summed" in str(hf_paged.explain(engine.model.module))
            team = engine.model.team
            team.traffic.clear()
            engine.generate(prompts(1).tolist(), SamplingParams(max_tokens=1, temperature=0.0, detokenize=False))
            return dict(team.traffic)

        assert pair.shards.model.layers[0].mlp.experts.num_experts == 2 == pair.whole.config.num_local_experts // 2
        step = pair.led(work)
        if step is not None:
            sums = (1 if whole else 2) * 3
            assert (step["calls all_reduce"], step["all_reduce"]) == (sums, sums * 20 * 48 * 4), step
            assert ("winners" in step) == (not whole) and "logits" not in step
        before = pair.shards.model.layers[0].mlp.experts
        with torch.no_grad():
            assert (pair.shards(**ragged()).logits - pair.whole(**ragged()).logits).abs().max() < 1e-4
        assert type(before) is type(pair.whole.model.layers[0].mlp.experts)


@check
def refusals():
    pair = pairs["llama"]
    refused(hf_paged.UnsupportedOption, "quantization", hf_paged.patch, pair.shards, quantization="int4")
    refused(hf_paged.UnsupportedOption, "cuda_graphs", hf_paged.patch, pair.shards, cuda_graphs=True)
    refused(hf_paged.UnsupportedOption, "offload: a sharded model", hf_paged.patch, pair.shards, offload="1MiB")
    refused(hf_paged.InvalidArgument, "not patched", hf_paged.follow, pair.shards)
    hf_paged.patch(pair.shards)
    try:
        options = dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        refused(
            hf_paged.UnsupportedOption, "output_attentions", pair.shards.generate, prompts(), output_attentions=True, **options
        )
        refused(hf_paged.InvalidArgument, "other inputs", pair.shards.generate, prompts(seed=rank()), **options)
        assert pair.shards.generate(prompts(), **options).past_key_values is None
        if rank():
            refused(hf_paged.InvalidArgument, "rank 0", hf_paged.engine_of, pair.shards)
            refused(hf_paged.InvalidArgument, "rank 0", Engine, pair.shards)
        else:
            refused(hf_paged.InvalidArgument, "leads", hf_paged.follow, pair.shards)
            engine = hf_paged.engine_of(pair.shards)
            hooks = {"model.layers.0": print}
            refused(hf_paged.UnsupportedOption, "forward_hooks", engine.add, [1, 2], forward_hooks=hooks)
            refused(hf_paged.InvalidArgument, "vocabulary", engine.add, [1, 10**6])
        assert torch.equal(
            pair.shards.generate(prompts(), max_new_tokens=NEW, do_sample=False),
            pair.whole.generate(prompts(), max_new_tokens=NEW, do_sample=False),
        )
    finally:
        hf_paged.unpatch(pair.shards)


@check
def checkpoints_that_are_refused():
    folder = Path(FOLDER[0])
    if rank() == 0:
        blocks = dict(quant_method="fp8", weight_block_size=[128, 128])
        make = lambda name, N, K: eight_bit_layer(N, K, block=(128, 128), name="weight_scale_inv")  # noqa: E731
        save_quantized(tiny_model("llama", **SIZES), folder / "blocks", blocks, make)
        save_quantized(
            tiny_model("llama", **SIZES | dict(intermediate_size=32 * 3)), folder / "words", GPTQ | dict(bits=3, group_size=32),
            lambda name, N, K: gptq_layer(N, K, bits=3, group_size=32),
        )  # fmt: skip
        experts = tiny_model("qwen3_moe", hidden_size=64, moe_intermediate_size=32, num_hidden_layers=1)
        make = lambda name, N, K: gptq_layer(N, K) if "experts" in name else None  # noqa: E731
        save_quantized(experts, folder / "experts", GPTQ | dict(bits=4, group_size=16), make)
        tiny_model("llama", vocab_size=200, num_attention_heads=3, num_key_value_heads=1).save_pretrained(folder / "3 heads")
        tiny_model("phi3", vocab_size=200).save_pretrained(folder / "phi3")
    dist.barrier()
    sharded = dict(distributed_config=DistributedConfig(tp_size=2))
    load = AutoModelForCausalLM.from_pretrained
    refused(hf_paged.UnsupportedOption, "q_proj: distributed_config: weight_scale_inv", load, folder / "blocks", **sharded)
    refused(hf_paged.UnsupportedOption, "gate_proj: distributed_config: qweight", load, folder / "words", **sharded)
    refused(hf_paged.UnsupportedOption, "quantized experts are not sharded", load, folder / "experts", **sharded)
    refused(hf_paged.UnsupportedModel, "its 3 heads", hf_paged.patch, load(folder / "3 heads", **sharded))
    refused(hf_paged.UnsupportedModel, "'phi3'", hf_paged.patch, load(folder / "phi3", **sharded))


FOLDER: list[str] = [""]


def main(out: str) -> None:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers' own
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    report: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        FOLDER[0] = folder
        dist.broadcast_object_list(FOLDER, 0)  # rank 0's
        for label in MODELS:
            pairs[label] = Pair(Path(FOLDER[0]), label)
        for entry in CHECKS:
            name, function = entry if isinstance(entry, tuple) else (entry.__name__, entry)
            problem = ""
            try:
                function()
            except Exception:
                problem = f"rank {rank()}: {traceback.format_exc()}"
            problems: list = [None] * dist.get_world_size()
            dist.all_gather_object(problems, problem)
            report[name] = [found for found in problems if found]
        dist.barrier()
    if rank() == 0:
        Path(out).write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
