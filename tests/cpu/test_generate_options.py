"""Every field of transformers' GenerationConfig, one by one: a patched model does what the plain one does."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer
from transformers import GenerationConfig, WatermarkingConfig
from transformers.generation import CompileConfig, ContinuousBatchingConfig

import hf_paged
from hf_paged import UnsupportedOption

NEW = 9
VOCAB = 300
EOS = list(range(3, 40))
SAMPLED = dict(do_sample=True, top_k=50)
SHOWN = dict(return_dict_in_generate=True)
LOOKUP = dict(prompt_lookup_num_tokens=4)
ASSISTED = dict(assistant_model=True)
BEAMS = dict(num_beams=3)

# Field -> calls that set it. Where stock raises (options that are hub code now, or that clash), so does a patched model.
CALLS: dict[str, list[dict]] = {
    "assistant_confidence_threshold": [ASSISTED | dict(assistant_confidence_threshold=0.3)],
    "assistant_early_exit": [dict(assistant_early_exit=2)],
    "assistant_ensemble_weight": [ASSISTED | dict(assistant_ensemble_weight=0.3)],
    "assistant_lookbehind": [ASSISTED | dict(assistant_lookbehind=4)],
    "bad_words_ids": [dict(bad_words_ids=[[7], [9, 4]])],
    "begin_suppress_tokens": [dict(begin_suppress_tokens=list(range(3, 150)))],
    "bos_token_id": [dict(bos_token_id=7)],
    "cache_config": [dict(cache_config={"backend": "quanto"})],
    "cache_implementation": [dict(cache_implementation=name) for name in ("dynamic", "static", "offloaded")],
    "compile_config": [dict(compile_config=CompileConfig())],
    "constraints": [dict(constraints=[1], num_beams=2)],
    "continuous_batching_config": [dict(continuous_batching_config=ContinuousBatchingConfig())],
    "decoder_start_token_id": [dict(decoder_start_token_id=5)],
    "disable_compile": [dict(disable_compile=True)],
    "diversity_penalty": [dict(diversity_penalty=0.5, num_beams=4, num_beam_groups=2)],
    "do_sample": [SAMPLED],
    "dola_layers": [dict(dola_layers="low")],
    "early_stopping": [BEAMS | dict(early_stopping=value, eos_token_id=EOS) for value in (True, False, "never")],
    "encoder_no_repeat_ngram_size": [dict(encoder_no_repeat_ngram_size=2)],
    "encoder_repetition_penalty": [dict(encoder_repetition_penalty=1.5)],
    "eos_token_id": [dict(eos_token_id=EOS), dict(eos_token_id=EOS, num_beams=2), dict(eos_token_id=EOS[0])],
    "epsilon_cutoff": [SAMPLED | dict(epsilon_cutoff=0.01)],
    "eta_cutoff": [SAMPLED | dict(eta_cutoff=0.01)],
    "exponential_decay_length_penalty": [dict(exponential_decay_length_penalty=(3, 1.5), eos_token_id=11)],
    "force_words_ids": [dict(force_words_ids=[[5]], num_beams=2)],
    "forced_bos_token_id": [dict(forced_bos_token_id=9)],
    "forced_eos_token_id": [dict(forced_eos_token_id=11)],
    "guidance_scale": [dict(guidance_scale=1.7), SAMPLED | dict(guidance_scale=0.5)],
    "is_assistant": [dict(is_assistant=True)],
    "length_penalty": [BEAMS | dict(length_penalty=value, eos_token_id=EOS) for value in (-1.0, 3.0)],
    "low_memory": [BEAMS | dict(low_memory=True)],
    "max_cache_len": [dict(max_cache_len=80), dict(max_cache_len=80, cache_implementation="static")],
    "max_length": [dict(max_length=30, max_new_tokens=None)],
    "max_matching_ngram_size": [LOOKUP | dict(max_matching_ngram_size=1)],
    "max_new_tokens": [dict(max_new_tokens=1)],
    "max_time": [dict(max_time=0.0, max_new_tokens=300), dict(max_time=60.0)],
    "min_length": [dict(min_length=30, eos_token_id=EOS)],
    "min_new_tokens": [dict(min_new_tokens=5, eos_token_id=EOS)],
    "min_p": [SAMPLED | dict(min_p=0.1)],
    "no_repeat_ngram_size": [dict(no_repeat_ngram_size=2)],
    "num_assistant_tokens": [ASSISTED | dict(num_assistant_tokens=3)],
    "num_assistant_tokens_schedule": [ASSISTED | dict(num_assistant_tokens_schedule="constant")],
    "num_beam_groups": [dict(num_beams=4, num_beam_groups=2)],
    "num_beams": [dict(num_beams=4), SAMPLED | dict(num_beams=2)],
    "num_return_sequences": [dict(num_beams=3, num_return_sequences=2), dict(num_return_sequences=2)],
    "output_attentions": [SHOWN | dict(output_attentions=True)],
    "output_hidden_states": [SHOWN | dict(output_hidden_states=True)],
    "output_logits": [SHOWN | dict(output_logits=True)],
    "output_scores": [SHOWN | dict(output_scores=True), SHOWN | BEAMS | dict(output_scores=True)],
    "pad_token_id": [dict(pad_token_id=77, eos_token_id=EOS), dict(pad_token_id=None, eos_token_id=EOS)],
    "penalty_alpha": [dict(penalty_alpha=0.6, top_k=4)],
    "prefill_chunk_size": [dict(prefill_chunk_size=5), BEAMS | dict(prefill_chunk_size=5)],
    "prompt_lookup_num_tokens": [LOOKUP, LOOKUP | SAMPLED],
    "remove_invalid_values": [dict(remove_invalid_values=True)],
    "renormalize_logits": [SHOWN | dict(renormalize_logits=True, output_scores=True)],
    "repetition_penalty": [dict(repetition_penalty=1.4)],
    "return_dict_in_generate": [SHOWN],
    "sequence_bias": [dict(sequence_bias={(17,): 5.0, (20, 21): -4.0})],
    "speculation_type": [ASSISTED | dict(speculation_type="assistant"), dict(speculation_type="mtp")],
    "stop_strings": [dict(stop_strings=["a"], tokenizer=True), BEAMS | dict(stop_strings=["a"], tokenizer=True)],
    "suppress_tokens": [dict(suppress_tokens=list(range(3, 100)))],
    "target_lookbehind": [ASSISTED | dict(target_lookbehind=4)],
    "temperature": [SAMPLED | dict(temperature=0.6), SAMPLED | BEAMS | dict(temperature=0.6)],
    "token_healing": [dict(token_healing=True, tokenizer=True, text="an apple a da")],
    "top_h": [SAMPLED | dict(top_h=0.4)],
    "top_k": [SAMPLED | dict(top_k=3)],
    "top_p": [SAMPLED | dict(top_p=0.7)],
    "transformers_version": [dict()],
    "typical_p": [SAMPLED | dict(typical_p=0.7)],
    "use_cache": [dict(use_cache=False), SHOWN | dict(use_cache=False), BEAMS | dict(use_cache=False)],
    "use_mtp": [dict(use_mtp=True)],
    "watermarking_config": [dict(watermarking_config=WatermarkingConfig(bias=3.0))],
}


@functools.cache
def models():
    plain = tiny_model("llama", attn_implementation="eager", vocab_size=VOCAB)
    return plain, hf_paged.patch(copy.deepcopy(plain), block_size=16)


@functools.cache
def assistant():
    return tiny_model("llama", seed=3, num_hidden_layers=1, vocab_size=VOCAB)


def outcome(model, rows: int, options: dict):
    """What `generate` returns, or the error it raises."""
    ids = torch.randint(3, VOCAB, (2, 17), generator=torch.Generator().manual_seed(3))[:rows]
    arguments = dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    if rows > 1:
        arguments["attention_mask"][1, :6] = 0
    arguments |= copy.deepcopy(options)
    if "text" in options:
        ids = torch.tensor([tiny_tokenizer(VOCAB)(arguments.pop("text"))["input_ids"]] * rows)
        arguments |= dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    if "assistant_model" in options:
        arguments["assistant_model"] = assistant()
    if "tokenizer" in options:
        arguments["tokenizer"] = tiny_tokenizer(VOCAB)
    torch.manual_seed(11)
    try:
        return model.generate(**arguments)
    except UnsupportedOption:
        raise
    except Exception as error:
        return error


@pytest.mark.filterwarnings("ignore")  # stock's own, and those that tell what runs on stock's path
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("field", CALLS)
def test_option(field, rows):
    plain, patched = models()
    for options in CALLS[field]:
        if rows == 2 and (options.get("do_sample") and "num_beams" not in options and "guidance_scale" not in options):
            continue  # rows draw from seeds of their own; test_generate.py compares distributions
        expected, actual = outcome(plain, rows, options), outcome(patched, rows, options)
        if isinstance(expected, Exception):
            assert type(actual) is type(expected) and str(actual) == str(expected)
            continue
        if isinstance(actual, Exception):
            raise actual
        if isinstance(expected, torch.Tensor):
            assert torch.equal(expected, actual)
            continue
        assert type(actual) is type(expected) and set(actual) == set(expected)
        assert torch.equal(expected.sequences, actual.sequences)
        for name in ("scores", "logits"):
            for a, b in zip(expected.get(name) or (), actual.get(name) or (), strict=True):
                torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-4)
    engine = hf_paged.engine_of(patched)
    engine.step()
    engine.check_integrity()
    assert engine.stats()["kv_bytes_in_use"] == 0


def test_the_list_is_complete():
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields <= set(CALLS)
