"""Embedding, scoring and classifying in the engine's steps: stock transformers' own numbers, beside whatever else runs."""

from __future__ import annotations

import asyncio
import json
import time

import numpy
import pytest
import torch
from tiny_models import tiny_config, tiny_model
from tiny_tokenizer import tiny_tokenizer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import hf_paged
from hf_paged import (
    AsyncEngine,
    ClassifyParams,
    DeadlineExceeded,
    EmbeddingOutput,
    EmbedParams,
    Engine,
    EngineConfig,
    InvalidArgument,
    QueueFull,
    RequestFailed,
    RequestTooLarge,
    SamplingParams,
    ScoreParams,
    UnsupportedModel,
    UnsupportedOption,
)
from hf_paged.hf.build import load_model

PROMPTS = [[5, 9, 11, 40, 7, 8], [3], list(range(20, 75)), [7] * 33, [5, 9, 11, 40, 7, 8, 1, 1]]
FAMILIES = ["llama", "gemma3_text", "opt", "mixtral", "gpt2", "mistral-window"]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def randomized(model):
    """Weights wide enough that texts differ."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.2 / parameter.shape[-1] ** 0.5)
    return model.eval()


def classifier(label="llama", **overrides):
    settings = dict(vocab_size=320, num_labels=3, pad_token_id=1)
    config = tiny_config(label, **{"vocab_size": 320})
    for name, value in {**settings, **overrides}.items():
        setattr(config, name, value)
    return randomized(AutoModelForSequenceClassification.from_config(config))


def engine_of(model, **options):
    defaults = dict(max_batch_tokens=16, max_num_seqs=8)
    return Engine(model, tiny_tokenizer(320), EngineConfig(**{**defaults, **options}))


@pytest.fixture
def model():
    return tiny_model("llama", vocab_size=320)


@pytest.fixture
def engine(model):
    with engine_of(model) as engine:
        yield engine
        assert not engine.has_unfinished() and engine.stats()["kv_bytes_in_use"] == 0
        engine.check_integrity()


@torch.no_grad()
def stock_hidden(model, prompts=PROMPTS):
    """Stock's last hidden states of a padded batch, and its attention mask."""
    length = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (length - len(prompt)) for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (length - len(prompt)) for prompt in prompts])
    return model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1], mask


def pooled(hidden, mask, pooling):
    if pooling == "mean":
        return (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    if pooling == "cls":
        return hidden[:, 0]
    return hidden[torch.arange(len(hidden)), mask.sum(1) - 1]


@torch.no_grad()
def stock_logprobs(model, prompt, continuation):
    logits = model(input_ids=torch.tensor([prompt + continuation])).logits[0].log_softmax(-1)
    return [logits[len(prompt) - 1 + place, token].item() for place, token in enumerate(continuation)]


# -- embed


@pytest.mark.parametrize("label", FAMILIES)
def test_embeddings_are_stocks_pooled_hidden_states(label):
    model = tiny_model(label)
    expected = stock_hidden(model)
    with engine_of(model) as engine:  # 16 tokens a step: long prompts come in pieces
        for pooling in ("mean", "last", "cls"):
            found = numpy.stack([output.embedding for output in engine.embed(PROMPTS, pooling, normalize=False)])
            assert found.dtype == numpy.float32
            numpy.testing.assert_allclose(found, pooled(*expected, pooling), atol=1e-5)


@pytest.mark.parametrize("label", ["llama", "qwen3", "mamba2", "falcon_h1"])
def test_models_without_a_head_embed(label):
    model = randomized(AutoModel.from_config(tiny_config(label)))
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([prompt])).last_hidden_state[0].mean(0) for prompt in PROMPTS]
    with engine_of(model) as engine:
        found = numpy.stack([output.embedding for output in engine.embed(PROMPTS, normalize=False)])
    numpy.testing.assert_allclose(found, torch.stack(expected), atol=1e-5)


def test_embeddings_are_cut_before_they_are_normalised(engine, model):
    full = pooled(*stock_hidden(model), "mean")
    for dimensions in (None, 5):
        expected = torch.nn.functional.normalize(full[:, :dimensions], dim=-1)
        found = numpy.stack([output.embedding for output in engine.embed(PROMPTS, dimensions=dimensions)])
        numpy.testing.assert_allclose(found, expected, atol=1e-5)


def test_text_is_embedded_as_the_tokenizer_reads_it(engine):
    (by_text,), (by_ids,) = engine.embed("the cat sat"), engine.embed(engine.tokenizer("the cat sat").input_ids)
    assert by_text.prompt_token_ids == by_ids.prompt_token_ids
    assert by_text.embedding.tolist() == by_ids.embedding.tolist()


def test_a_mean_is_that_of_all_tokens_though_the_cache_has_some(engine, model):
    prompt = PROMPTS[2]
    expected = pooled(*stock_hidden(model, [prompt]), "mean")[0]
    for cached in (False, True):
        for pooling, hit in (("mean", 0), ("cls", 0), ("last", 48)):
            (output,) = engine.embed(prompt, pooling, normalize=False)
            if pooling == "mean":
                numpy.testing.assert_allclose(output.embedding, expected, atol=1e-5)
            if cached:
                assert output.metrics.num_cached_tokens == hit


def test_a_prompt_may_be_as_long_as_a_sequence(model):
    with engine_of(model, max_model_len=20) as engine:
        assert len(engine.embed([[5] * 20])) == 1
        assert engine.score([5] * 19, [[7, 8]])[0].num_tokens == 2  # nobody computes what comes after the last
        with pytest.raises(RequestTooLarge, match="prompt has 21 tokens.*at most 20"):
            engine.embed([[5] * 21])


# -- score


@pytest.mark.parametrize("label", [*FAMILIES, "mamba2"])
def test_scores_are_stocks_log_softmax(label):
    model = tiny_model(label)
    prompts, lists = [PROMPTS[2], PROMPTS[0]], [[[40, 7, 8], [9], list(range(30, 60))], [[4, 4]]]
    expected = [[stock_logprobs(model, prompt, one) for one in given] for prompt, given in zip(prompts, lists)]
    with engine_of(model) as engine:
        for _ in range(2):  # with an empty cache, and with one that has the prompts
            found = engine.score(prompts, lists)
            for scores, given, wanted in zip(found, lists, expected, strict=True):
                for score, continuation, logprobs in zip(scores, given, wanted, strict=True):
                    assert score.token_ids == continuation
                    assert score.token_logprobs == pytest.approx(logprobs, abs=1e-4)
                    assert score.logprob == pytest.approx(sum(logprobs), abs=1e-4)
                    assert score.num_tokens == len(continuation)


def test_what_greedy_decoding_says_scores_as_greedy(engine):
    (said,) = engine.generate([PROMPTS[0]], GREEDY)
    tokens = said.outputs[0].token_ids
    greedy, other = engine.score(PROMPTS[0], [tokens, [*tokens[:-1], (tokens[-1] + 1) % 320]])
    assert greedy.is_greedy and greedy.ranks == [1] * len(tokens)
    assert not other.is_greedy and other.token_logprobs[:-1] == pytest.approx(greedy.token_logprobs[:-1])


def test_continuations_cost_their_prompt_once(model):
    prompt, block = list(range(3, 303)), 16
    continuations = [[5 + place, 9, 11] for place in range(100)]
    with engine_of(model, max_batch_tokens=512, max_num_seqs=64, block_size=block) as engine:
        scores = engine.score(prompt, continuations)
        tail = len(prompt) % block + len(continuations[0]) - 1
        assert engine.stats()["tokens"] == len(prompt) - len(prompt) % block + len(continuations) * tail
        assert engine.stats()["steps"] <= 5
        engine.reset_stats()
        engine.score(prompt, continuations[:10], cache_salt="somebody else")
        assert engine.stats()["tokens"] == len(prompt) - len(prompt) % block + 10 * tail
    for score, continuation in list(zip(scores, continuations))[::33]:
        assert score.token_logprobs == pytest.approx(stock_logprobs(model, prompt, continuation), abs=1e-4)


def test_a_text_continues_the_text_before_it(engine):
    tokenizer = engine.tokenizer
    prompt, continuation = "the cat", " sat on the mat"
    whole = tokenizer(prompt + continuation).input_ids
    (score,) = engine.score(prompt, [continuation])
    assert score.prompt_token_ids == tokenizer(prompt).input_ids
    assert score.prompt_token_ids + score.token_ids == whole
    assert engine.score(tokenizer(prompt).input_ids, [score.token_ids])[0].token_logprobs == score.token_logprobs


# -- classify


@pytest.mark.parametrize("label", FAMILIES)
def test_classes_are_stocks(label):
    model = classifier(label)
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([prompt])).logits[0] for prompt in PROMPTS]
    with engine_of(model) as engine:
        found = engine.classify(PROMPTS)
    for output, logits, prompt in zip(found, expected, PROMPTS, strict=True):
        numpy.testing.assert_allclose(output.logits, logits, atol=1e-5)
        numpy.testing.assert_allclose(output.scores, logits.softmax(-1), atol=1e-5)
        assert output.label == model.config.id2label[int(logits.argmax())]
    assert found[4].prompt_token_ids == PROMPTS[0]  # stock passes over what it takes for padding


@pytest.mark.parametrize(
    "settings, activation, expected",
    [
        (dict(), None, "softmax"),
        (dict(problem_type="multi_label_classification"), None, "sigmoid"),
        (dict(problem_type="regression"), None, "none"),
        (dict(num_labels=1), None, "sigmoid"),
        (dict(), "none", "none"),
        (dict(num_labels=1), "softmax", "softmax"),
    ],
)
def test_scores_are_what_the_config_says_or_the_caller(settings, activation, expected):
    functions = {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid, "none": lambda x: x}
    model = classifier(**settings)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0]
    with engine_of(model) as engine:
        (output,) = engine.classify(PROMPTS[0], activation)
    numpy.testing.assert_allclose(output.scores, functions[expected](logits), atol=1e-5)


def test_pairs_are_tokenized_as_pairs():
    model, pair = classifier(num_labels=1), ("the cat", "sat on the mat")
    with engine_of(model) as engine:
        ids = engine.tokenizer(*pair).input_ids
        by_pair, by_ids = engine.classify([pair, ids])
        assert by_pair.prompt_token_ids == ids and by_pair.logits.tolist() == by_ids.logits.tolist()
        assert engine.classify(pair)[0].logits.tolist() == by_pair.logits.tolist()
        with pytest.raises(InvalidArgument, match="prompt must be a pair of texts, got a tuple of 3"):
            engine.classify([("a", "b", "c")])


def test_a_classifier_is_patched_and_unpatched():
    model = classifier()
    ids, before = torch.tensor([PROMPTS[0]]), type(model)
    with torch.no_grad():
        stock = model(input_ids=ids).logits
        hf_paged.patch(model)
        assert isinstance(model, before) and torch.equal(model(input_ids=ids).logits, stock)
        assert "LlamaForSequenceClassification" in str(hf_paged.explain(model))
        hf_paged.unpatch(model)
    assert type(model) is before and torch.equal(model(input_ids=ids).logits, stock)


# -- checkpoints


@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, AutoModel, AutoModelForCausalLM])
def test_checkpoints_are_loaded_as_what_they_were_saved_as(kind, tmp_path):
    saved = kind.from_config(tiny_config("llama", vocab_size=320))
    saved.save_pretrained(tmp_path)
    tiny_tokenizer(320).save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), progress=False)
    assert type(model) is type(saved)


@pytest.mark.parametrize(
    "note, pooling",
    [
        (None, "mean"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 48}, "mean"),
        ({"pooling_mode": "lasttoken", "embedding_dimension": 48, "include_prompt": True}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode_max_tokens": True}, None),
    ],
)
def test_a_checkpoint_says_how_it_pools(note, pooling, tmp_path):
    AutoModel.from_config(tiny_config("qwen3", vocab_size=320)).save_pretrained(tmp_path)
    if note is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(note))
    with engine_of(AutoModel.from_pretrained(tmp_path).eval()) as engine:
        if pooling is None:
            with pytest.raises(UnsupportedOption, match="pooling: the checkpoint pools by 'max_tokens'"):
                engine.embed(PROMPTS[0])
            pooling = "mean"
        else:
            by_default = engine.embed(PROMPTS[0])[0].embedding
            assert by_default.tolist() == engine.embed(PROMPTS[0], pooling)[0].embedding.tolist()
        assert engine.embed(PROMPTS[0], pooling)[0].embedding.shape == (48,)


# -- what cannot be done


def test_what_a_model_has_no_head_for_is_refused_by_name(model):
    with engine_of(model) as engine:
        with pytest.raises(UnsupportedOption, match="model: LlamaForCausalLM has no head for classifying"):
            engine.classify([PROMPTS[0]])
    with engine_of(classifier()) as engine:
        for call in (lambda: engine.generate([PROMPTS[0]]), lambda: engine.score(PROMPTS[0], [[3]])):
            with pytest.raises(UnsupportedOption, match="LlamaForSequenceClassification has no language model head"):
                call()
        assert engine.embed([PROMPTS[0]])[0].embedding.shape == (engine.model.hidden_size,)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: AutoModel.from_config(tiny_config("bert", is_decoder=False)), "BertSelfAttention attends in both"),
        (
            lambda: AutoModel.from_config(tiny_config("gemma3_text", use_bidirectional_attention=True)),
            "Gemma3Attention attends in both directions",
        ),
        (
            lambda: AutoModelForTokenClassification.from_config(tiny_config("llama")),
            "LlamaForTokenClassification has a head that hf_paged does not run",
        ),
    ],
)
def test_models_that_cannot_be_run_are_refused_by_name(make, message):
    model = make().eval()
    with pytest.raises(UnsupportedModel, match=message):
        hf_paged.patch(model)
    assert not hasattr(model, "_hf_paged")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda engine: engine.embed([[3]], "max"), "pooling must be one of mean, last, cls, got 'max'"),
        (lambda engine: engine.embed([[3]], normalize=1), "normalize must be True or False, got 1"),
        (lambda engine: engine.embed([[3]], dimensions=0), "dimensions must be a positive integer, got 0"),
        (lambda engine: engine.embed([[3]], dimensions=10**6), "dimensions must be at most"),
        (lambda engine: engine.embed([[3], []]), "prompt is empty"),
        (lambda engine: engine.embed([[3, 999]]), "prompt has token id 999 at 1"),
        (lambda engine: engine.embed([("a", "b")]), "prompt must be a flat list of token ids, got 'a' at 0"),
        (lambda engine: engine.embed([[3]], priority=1), "priority has no effect"),
        (lambda engine: engine.score([3], [[]]), "continuation is empty"),
        (lambda engine: engine.score([3], [[999]]), "continuation has token id 999 at 0"),
        (lambda engine: engine.score([3], [[0.5]]), "continuation must be a flat list of token ids"),
        (lambda engine: engine.score([3], "ab"), "continuations must be a list for each prompt, got str at 0"),
        (lambda engine: engine.score([[3]], [[[4]], [[5]]]), "continuations has 2 lists for 1 prompts"),
        (lambda engine: engine.classify([[3]], "relu"), "activation must be"),
        (lambda engine: engine.add([3], EmbedParams(), logits_processors=[print]), "logits_processors have nothing"),
        (lambda engine: engine.add([3], "embed"), "params must be SamplingParams, EmbedParams"),
    ],
)
def test_bad_input_is_refused_by_name(engine, call, message):
    with pytest.raises(InvalidArgument, match=message):
        call(engine)


# -- beside others


def kinds(engine):
    """Requests of every kind, and how to look at what came of them."""
    sampled = SamplingParams(temperature=1.0, seed=7, max_tokens=9, ignore_eos=True)
    work = [
        *((prompt, GREEDY) for prompt in PROMPTS),
        *((prompt, EmbedParams()) for prompt in PROMPTS),
        *((prompt, ScoreParams(continuation=[40, 7, 8])) for prompt in PROMPTS),
        *((prompt, sampled) for prompt in PROMPTS),
        *((prompt, EmbedParams(pooling="last")) for prompt in PROMPTS),
    ]
    states = [engine.submit(prompt, params) for prompt, params in work]
    while engine.has_unfinished():
        engine.step()
        engine.check_integrity()
    return [numbers(state.output) for state in states]


def numbers(output):
    if output.result is None:
        return output.outputs[0].token_ids
    is_embedding = isinstance(output.result, EmbeddingOutput)
    return output.result.embedding if is_embedding else output.result.token_logprobs


def assert_same(found, expected):
    """Tokens exactly, numbers up to rounding."""
    for some, others in zip(found, expected, strict=True):
        numpy.testing.assert_allclose(some, others, rtol=0, atol=0 if isinstance(some[0], int) else 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        dict(overlap=True),
        dict(overlap=True, max_batch_tokens=64, prefix_cache=False),
        dict(overlap=False, speculation="ngram"),
        dict(overlap=False, max_num_seqs=3),
    ],
)
def test_all_kinds_run_in_the_same_steps(model, options):
    with engine_of(model, max_batch_tokens=512, max_num_seqs=1, overlap=False) as engine:
        alone = kinds(engine)
    with engine_of(model, **options) as engine:
        assert_same(kinds(engine), alone)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_preempted_request_begins_its_sum_anew(model, overlap):
    with engine_of(model, max_num_seqs=1) as engine:
        alone = kinds(engine)
    bytes_per_block = int(16 * engine._cache.bytes_per_token)
    with engine_of(model, overlap=overlap, policy="priority", kv_cache_memory=5 * bytes_per_block) as engine:
        pushed = [
            engine.submit(PROMPTS[2], params, priority=1)
            for params in (EmbedParams(), ScoreParams(continuation=[40, 7, 8]))
        ]
        engine.step()
        engine.step()
        assert engine.stats()["preemptions"] == 0
        assert_same(kinds(engine), alone)  # of a higher class
        assert engine.stats()["preemptions"] > 0
    assert_same([numbers(state.output) for state in pushed], [alone[7], alone[12]])


def test_what_runs_first_goes_by_priority(model):
    with engine_of(model, policy="priority", max_num_seqs=1) as engine:
        ended = []
        told = lambda output: ended.append(output.request_id) if output.finished else None  # noqa: E731
        for name, priority in (("late", 5), ("soon", 1), ("now", 0)):
            engine.add(PROMPTS[2], EmbedParams(), request_id=name, priority=priority, on_output=told)
        while engine.has_unfinished():
            engine.step()
    assert ended == ["now", "soon", "late"]


def test_deadlines_and_aborts_end_a_task(engine):
    with pytest.raises(DeadlineExceeded):
        engine.embed([PROMPTS[2]], deadline=1e-9)
    name = engine.add(PROMPTS[2], EmbedParams())
    engine.step()
    assert engine.abort(name)
    (output,) = engine.step() if engine.has_unfinished() else [None]
    assert output is None or (output.outputs[0].finish_reason == "abort" and output.result is None)


def test_the_queue_is_bounded_for_tasks_too(model):
    with engine_of(model, max_queue=2) as engine:
        for _ in range(2):
            engine.add([5, 6], EmbedParams())
        with pytest.raises(QueueFull):
            engine.add([5, 6], EmbedParams())
        assert len(engine.embed([[5, 6]] * 20)) == 20


def test_a_task_whose_numbers_are_none_ends_by_itself(engine, model):
    poison = lambda hidden, positions: hidden * float("nan")  # noqa: E731
    good = engine.submit(PROMPTS[0], GREEDY)
    hooks = {"model.layers.0": poison}
    with pytest.raises(RequestFailed, match="FloatingPointError: the hidden states contain NaN"):
        engine.embed([PROMPTS[2]], forward_hooks=hooks)
    with pytest.raises(RequestFailed, match="FloatingPointError: the logits contain NaN"):
        engine.score(PROMPTS[0], [[3, 4]], forward_hooks=hooks)
    while engine.has_unfinished():
        engine.step()
    assert good.output.outputs[0].token_ids == engine.generate([PROMPTS[0]], GREEDY)[0].outputs[0].token_ids


def test_hooks_on_activations_change_what_is_embedded(engine, model):
    handle = model.model.layers[1].register_forward_hook(
        lambda module, args, output: (output[0] + 1, *output[1:]) if isinstance(output, tuple) else output + 1
    )
    expected = pooled(*stock_hidden(model), "mean")
    handle.remove()
    hooks = {"model.layers.1": lambda hidden, positions: hidden + 1}
    plain, hooked = engine.embed(PROMPTS, normalize=False), engine.embed(PROMPTS, normalize=False, forward_hooks=hooks)
    numpy.testing.assert_allclose(numpy.stack([output.embedding for output in hooked]), expected, atol=1e-5)
    assert not numpy.allclose(plain[0].embedding, hooked[0].embedding, atol=1e-2)


def test_the_head_sees_only_the_rows_that_need_it(engine, model):
    rows = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[-2]))
    engine.embed([PROMPTS[2], PROMPTS[3]])
    assert sum(rows) == 0
    engine.score(PROMPTS[2], [[3, 4]])
    assert sum(rows) == 2
    engine.generate([PROMPTS[2]], SamplingParams(temperature=0, max_tokens=1))
    handle.remove()
    assert sum(rows) == 3


def test_what_weights_become_counts_for_the_next_embedding(engine, model):
    before = engine.embed([PROMPTS[0]])[0].embedding
    with torch.no_grad():
        model.model.norm.weight.mul_(torch.linspace(0.5, 2, len(model.model.norm.weight)))
    (after,) = engine.embed([PROMPTS[0]], normalize=False)
    numpy.testing.assert_allclose(after.embedding, pooled(*stock_hidden(model), "mean")[0], atol=1e-5)
    assert not numpy.allclose(before, after.embedding)


# -- asyncio


def test_coroutines_embed_score_and_classify(model):
    async def run():
        async with AsyncEngine(engine_of(model)) as engine:
            embeddings, scores, said = await asyncio.gather(
                engine.embed(PROMPTS, "last", normalize=False),
                engine.score(PROMPTS[:2], [[[40, 7], [9]], [[4]]]),
                engine.complete(PROMPTS[0], GREEDY),
            )
            with pytest.raises(UnsupportedOption):
                await engine.classify([PROMPTS[0]])
            with pytest.raises(DeadlineExceeded):
                await engine.embed([[5] * 200] * 30, deadline=1e-6)
            long = asyncio.ensure_future(engine.embed([[5] * 200] * 30))
            await asyncio.sleep(0.01)
            long.cancel()
            until = time.monotonic() + 20
            while engine.engine.has_unfinished() and time.monotonic() < until:
                await asyncio.sleep(0.01)
            assert not engine.engine.has_unfinished()
            return embeddings, scores, said

    expected = pooled(*stock_hidden(model), "last")
    embeddings, scores, said = asyncio.run(run())
    numpy.testing.assert_allclose(numpy.stack([output.embedding for output in embeddings]), expected, atol=1e-5)
    assert [len(of_prompt) for of_prompt in scores] == [2, 1]
    assert scores[0][0].token_logprobs == pytest.approx(stock_logprobs(model, PROMPTS[0], [40, 7]), abs=1e-4)
    assert len(said.outputs[0].token_ids) == GREEDY.max_tokens


def test_coroutines_need_no_longer_queue_than_there_is(model):
    async def run():
        async with AsyncEngine(engine_of(model, max_queue=2)) as engine:
            return await engine.embed(PROMPTS * 6, "last", normalize=False)

    outputs = asyncio.run(run())
    expected = pooled(*stock_hidden(model), "last")
    numpy.testing.assert_allclose(outputs[-1].embedding, expected[-1], atol=1e-5)
    assert len(outputs) == 6 * len(PROMPTS)


def test_prompts_may_come_as_a_tuple(engine):
    assert len(engine.generate(tuple(PROMPTS[:2]), GREEDY)) == len(engine.embed(("the cat", "sat"))) == 2
    assert [len(scores) for scores in engine.score(("the cat", "a dog"), [[" sat"], [" ran", " sat"]])] == [1, 2]


def test_parameters_are_values():
    assert ClassifyParams() == ClassifyParams(activation=None) and EmbedParams().pooling is None
    assert ScoreParams(continuation=torch.tensor([3, 4])).continuation == (3, 4)
