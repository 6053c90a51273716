"""`pipeline("text-generation", ..., backend="paged")` against the same calls of transformers' own pipeline."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import subprocess
import sys
from threading import Thread

import pytest
import torch
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextGenerationPipeline,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.pt_utils import KeyDataset

import hf_paged
from hf_paged import EngineClosed, EngineConfig, InvalidArgument, RequestTooLarge, UnsupportedModel
from hf_paged.hf.patch import is_patched, patch_of
from hf_paged.integrations.pipeline import PagedTextGenerationPipeline

VOCAB = 300
PROMPTS = ["hello there", "x", "the rest of it is here, and there is a lot of it to be read", "ünïcödé ☕", "no", "on and on"]
CHATS = [
    [{"role": "user", "content": "hello"}],
    [{"role": "system", "content": "short"}, {"role": "user", "content": "what is there, and where?"}],
    [{"role": "user", "content": "go on"}, {"role": "assistant", "content": "once there was"}],
]
TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for document in documents or [] %}({{ document.title }}){% endfor %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% if not loop.last %}\n{% endif %}{% endfor %}"
    "{% if loud %}!{% endif %}{% if add_generation_prompt %}\n<assistant>{% endif %}"
)
GREEDY = dict(do_sample=False, max_new_tokens=12)


def small_model(**overrides):
    model = tiny_model("llama", vocab_size=VOCAB, **overrides)
    model.generation_config.eos_token_id = [*range(5, VOCAB, 9)]  # rows end at different lengths
    return model


def small_tokenizer():
    tokenizer = tiny_tokenizer(VOCAB)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def stock():
    return pipeline("text-generation", model=small_model(), tokenizer=small_tokenizer())


@pytest.fixture(scope="module")
def paged():
    with pipeline("text-generation", model=small_model(), tokenizer=small_tokenizer(), backend="paged") as pipe:
        yield pipe


def engine(pipe):
    return hf_paged.engine_of(pipe.model)


def read(results):
    """What a call returned, whole."""
    return results if isinstance(results, list) else list(results)


def get_weather(city: str) -> str:
    """Weather of a city.

    Args:
        city: its name.
    """


def test_the_names(stock, paged):
    assert type(stock) is TextGenerationPipeline
    assert type(paged) is PagedTextGenerationPipeline
    assert isinstance(paged, TextGenerationPipeline)
    assert is_patched(paged.model)
    assert not is_patched(stock.model)


def test_several_prompts_end_at_different_lengths(stock):
    """So that what follows compares something."""
    lengths = {len(out[0]["generated_token_ids"]) for out in stock(PROMPTS, return_tensors=True, **GREEDY)}
    assert len(lengths) > 2


@pytest.mark.parametrize(
    "inputs",
    [
        "hello there",
        "",
        PROMPTS,
        [PROMPTS[0]],
        [*PROMPTS, ""],
        CHATS[0],
        tuple(CHATS[1]),
        CHATS[2],
        CHATS,
        [tuple(chat) for chat in CHATS],
    ],
    ids=["str", "empty", "list", "one", "with-empty", "chat", "tuple-chat", "prefill", "chats", "tuple-chats"],
)
@pytest.mark.parametrize("options", [{}, {"return_full_text": False}, {"return_tensors": True}], ids=["", "new", "ids"])
def test_kinds_of_input(stock, paged, inputs, options):
    expected = stock(inputs, **GREEDY, **options)
    assert paged(inputs, **GREEDY, **options) == expected


@pytest.mark.parametrize(
    "options",
    [
        dict(batch_size=2),
        dict(batch_size=4, return_tensors=True),
        dict(prefix="so: "),
        dict(prefix="so: ", max_length=30, max_new_tokens=None),
        dict(max_length=70, max_new_tokens=None),
        dict(min_new_tokens=6),
        dict(max_length=80, min_length=40, max_new_tokens=None),
        dict(repetition_penalty=1.7),
        dict(repetition_penalty=1.7, no_repeat_ngram_size=2, batch_size=3, return_tensors=True),
        dict(eos_token_id=None, max_new_tokens=5),
        dict(stop_sequence="t"),
        dict(stop_strings=["th", "\x00"], eos_token_id=None),
        dict(skip_special_tokens=False),
        dict(clean_up_tokenization_spaces=True),
        dict(return_text=True),
        dict(add_special_tokens=True),
        dict(truncation=True, max_length=9, max_new_tokens=4),
        dict(tokenizer_encode_kwargs=dict(truncation=True, max_length=5)),
        dict(generation_config=GenerationConfig(max_new_tokens=7, do_sample=False, eos_token_id=[30, 40], pad_token_id=0)),
        dict(num_beams=3),
        dict(num_beams=4, num_return_sequences=2, batch_size=2, return_tensors=True),
        dict(prompt_lookup_num_tokens=3),
        dict(prefix_allowed_tokens_fn=lambda row, ids: [*range(int(ids[-1]) % 7 + 3, VOCAB, 7)]),
    ],
    ids=lambda options: "-".join(options),
)
def test_options(stock, paged, options):
    options = {**GREEDY, **options}
    if "generation_config" in options:
        del options["do_sample"], options["max_new_tokens"]
    if options.get("stop_strings"):
        options["tokenizer"] = stock.tokenizer
    options = {name: value for name, value in options.items() if value is not None or name == "eos_token_id"}
    expected = stock(PROMPTS, **options)
    assert paged(PROMPTS, **options) == expected
    assert list(paged((prompt for prompt in PROMPTS), **options)) == expected


@pytest.mark.parametrize(
    "options",
    [
        dict(continue_final_message=False),
        dict(tools=[get_weather]),
        dict(documents=[dict(title="news", text="none")]),
        dict(tokenizer_encode_kwargs=dict(loud=True)),
        dict(batch_size=2),
    ],
    ids=lambda options: "-".join(options),
)
def test_options_of_chats(stock, paged, options):
    expected = stock(CHATS, **GREEDY, **options)
    assert paged(CHATS, **GREEDY, **options) == expected
    if options.get("continue_final_message") is not False and "batch_size" not in options:
        assert expected != stock(CHATS, **GREEDY)


def test_outputs_beside_the_sequences(stock, paged):
    options = dict(return_dict_in_generate=True, output_logits=True, output_scores=True, do_sample=False)
    for inputs in ("hello", PROMPTS):
        expected, results = (pipe(inputs, max_new_tokens=4, eos_token_id=None, **options) for pipe in (stock, paged))
        for mine, theirs in zip(read_flat(results), read_flat(expected), strict=True):
            assert mine.pop("generated_text") == theirs.pop("generated_text")
            assert mine.keys() == theirs.keys()
            for name, value in theirs.items():
                torch.testing.assert_close(torch.tensor(mine[name]), torch.tensor(value), rtol=0, atol=1e-4)


def read_flat(results):
    return [record for item in results for record in (item if isinstance(item, list) else [item])]


def test_long_prompts_are_cut_where_a_hole_is_asked_for(stock, paged, monkeypatch):
    for pipe in (stock, paged):
        monkeypatch.setattr(pipe.tokenizer, "model_max_length", 20)
    expected = stock(PROMPTS, handle_long_generation="hole", **GREEDY)
    assert paged(PROMPTS, handle_long_generation="hole", **GREEDY) == expected
    assert expected != stock(PROMPTS, **GREEDY)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (prompt for prompt in PROMPTS),
        lambda: (chat for chat in CHATS),
        lambda: (message for message in CHATS[1]),
        lambda: (prompt for prompt in ()),
        lambda: KeyDataset([{"text": prompt} for prompt in PROMPTS], "text"),
        lambda: KeyDataset([{"chat": chat} for chat in CHATS], "chat"),
        lambda: Shouted(),
    ],
    ids=["prompts", "chats", "messages", "none", "dataset", "dataset-of-chats", "iterable-dataset"],
)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_generators_and_datasets(stock, paged, make, batch_size):
    expected, results = (pipe(make(), batch_size=batch_size, **GREEDY) for pipe in (stock, paged))
    assert type(results) is type(expected)
    if isinstance(make(), KeyDataset) and not isinstance(expected, list):
        assert len(results) == len(expected)
        assert list(results) == list(expected)  # again: it starts over
    assert read(results) == read(expected)


class Shouted(torch.utils.data.IterableDataset):
    def __iter__(self):
        return map(str.upper, PROMPTS)


def test_other_iterators_and_empty_lists_are_taken_too(stock, paged):
    assert list(paged(map(str.upper, PROMPTS), **GREEDY)) == stock([prompt.upper() for prompt in PROMPTS], **GREEDY)
    assert list(paged(iter(()), **GREEDY)) == []
    assert paged([], **GREEDY) == []


def test_a_tokenizer_without_padding(stock):
    tokenizer = small_tokenizer()
    tokenizer.pad_token = None
    model = small_model()
    model.generation_config.pad_token_id = None
    expected = stock(PROMPTS, **GREEDY)
    with pipeline("text-generation", model=model, tokenizer=tokenizer, backend="paged") as pipe:
        assert pipe(PROMPTS, **GREEDY) == expected
        assert list(pipe((prompt for prompt in PROMPTS), **GREEDY)) == expected


@pytest.mark.parametrize("inputs", ["hello", PROMPTS], ids=["str", "list"])
def test_an_assistant_model(stock, inputs):
    helper = tiny_model("qwen2", vocab_size=VOCAB, num_hidden_layers=1)
    expected = stock(inputs, **GREEDY)
    with pipeline(
        "text-generation", model=small_model(), tokenizer=small_tokenizer(), assistant_model=helper, backend="paged"
    ) as pipe:
        assert pipe(inputs, **GREEDY) == expected
        pieces = "".join(pipe.stream("hello", **GREEDY))
    assert pieces == stock("hello", return_full_text=False, **GREEDY)[0]["generated_text"]


def test_a_list_runs_side_by_side(paged):
    engine(paged).reset_stats()
    paged(PROMPTS, eos_token_id=None, min_new_tokens=12, **GREEDY)
    stats = engine(paged).stats()
    assert stats["output_tokens"] == 12 * len(PROMPTS)
    assert stats["steps"] < 2 * 12


def test_with_batches_several_run_at_once(paged):
    engine(paged).reset_stats()
    paged(PROMPTS, batch_size=2, eos_token_id=None, **GREEDY)
    assert engine(paged).stats()["steps"] < 2 * 12


def test_a_generator_without_end_is_read_no_further_than_needed(stock):
    taken = []

    def endless():
        for number in itertools.count():
            taken.append(number)
            yield f"number {number}"

    config = EngineConfig(max_num_seqs=3)
    with pipeline(
        "text-generation", model=small_model(), tokenizer=small_tokenizer(), backend="paged", engine_config=config
    ) as pipe:
        results = iter(pipe(endless(), **GREEDY))
        firsts = [next(results) for _ in range(20)]
        assert firsts == stock([f"number {number}" for number in range(20)], **GREEDY)
        assert 20 < len(taken) <= 20 + 4 * 3
        assert engine(pipe).has_unfinished()
        del results
        gc.collect()
        engine(pipe).step()
        assert not engine(pipe).has_unfinished()
        engine(pipe).check_integrity()


def test_one_prompt_at_a_time_if_the_engine_is_told_so(stock):
    """For a generator whose next prompt comes from the last result."""
    answers = []

    def dialogue():
        yield "hello"
        for _ in range(3):
            yield answers[-1] + " more"

    def run(pipe):
        answers.clear()
        for out in pipe(dialogue(), **GREEDY):
            answers.append(out[0]["generated_text"])
        return list(answers)

    one = EngineConfig(max_num_seqs=1)
    with pipeline(
        "text-generation", model=small_model(), tokenizer=small_tokenizer(), backend="paged", engine_config=one
    ) as pipe:
        assert run(pipe) == run(stock)


# Sampling


def test_one_sampled_prompt_draws_what_stock_draws(stock, paged):
    for inputs in ("hello", ["hello"], CHATS[0], CHATS[:1]):
        for options in (dict(), dict(temperature=1.3, top_k=20), dict(top_p=0.9, repetition_penalty=1.2)):
            texts = []
            for pipe in (stock, paged):
                torch.manual_seed(7)
                texts.append(pipe(inputs, max_new_tokens=10, do_sample=True, **options))
            assert texts[0] == texts[1]


def test_sampled_prompts_beside_others(paged):
    def sample(seed, prompts):
        torch.manual_seed(seed)
        return paged(prompts, max_new_tokens=10, do_sample=True, eos_token_id=None, num_return_sequences=2)

    first = sample(0, ["hello"] * 4)
    assert first == sample(0, ["hello"] * 4)
    assert first[:2] == sample(0, ["hello"] * 2)  # what comes later changes nothing
    assert first != sample(1, ["hello"] * 4)
    assert len({out["generated_text"] for outs in first for out in outs}) > 4


# A user's own objects


class Counting(LogitsProcessor):
    """Forbids other tokens at every call: what it does depends on how often it was called."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        scores = scores.clone()
        scores[:, self.calls % 5 :: 5] = -torch.inf
        return scores


class Budget(StoppingCriteria):
    def __init__(self, tokens):
        self.left = tokens

    def __call__(self, input_ids, scores, **kwargs):
        self.left -= 1
        return torch.full((len(input_ids),), self.left % 4 == 0)


def test_processors_and_criteria_with_a_memory_see_one_prompt_after_another(stock, paged):
    def run(pipe):
        return pipe(
            PROMPTS,
            logits_processor=LogitsProcessorList([Counting()]),
            stopping_criteria=StoppingCriteriaList([Budget(17)]),
            **GREEDY,
        )

    assert run(paged) == run(stock)


@pytest.mark.parametrize("inputs", ["hello there", PROMPTS[:1], PROMPTS], ids=["one", "list-of-one", "list"])
def test_a_streamer_sees_what_it_sees_in_stock(stock, paged, inputs, capsys):
    written = []
    for pipe in (stock, paged):
        result = pipe(inputs, streamer=TextStreamer(pipe.tokenizer, skip_prompt=True), **GREEDY)
        written.append((result, capsys.readouterr().out))
    assert written[0] == written[1]
    assert written[0][1]


def test_an_iterator_streamer(stock, paged):
    streamer = TextIteratorStreamer(paged.tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=paged, args=("hello there",), kwargs=dict(streamer=streamer, **GREEDY))
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == stock("hello there", return_full_text=False, **GREEDY)[0]["generated_text"]


# Streaming text


@pytest.mark.parametrize("prompt", [*PROMPTS, "", CHATS[1], CHATS[2]], ids=str)
@pytest.mark.parametrize(
    "options", [{}, dict(skip_special_tokens=False), dict(stop_sequence="t"), dict(num_beams=2)], ids=str
)
def test_streamed_pieces_make_the_text(stock, paged, prompt, options):
    options = {**GREEDY, "max_new_tokens": 30, **options}
    expected = stock(prompt, return_full_text=False, **options)[0]["generated_text"]
    assert "".join(paged.stream(prompt, **options)) == expected


def test_pieces_come_as_they_are_made(paged):
    pieces = paged.stream("hello there", eos_token_id=None, suppress_tokens=[*range(130, 259)], **GREEDY)
    first = next(pieces)
    assert engine(paged).has_unfinished()
    assert first and len([first, *pieces]) > 6
    assert not engine(paged).has_unfinished()


def test_a_stream_that_is_left_ends_its_request(paged):
    engine(paged).reset_stats()
    for _ in paged.stream("hello there", eos_token_id=None, max_new_tokens=200):
        break
    engine(paged).step()
    assert not engine(paged).has_unfinished()
    assert engine(paged).stats()["output_tokens"] < 20
    engine(paged).check_integrity()


def test_a_sampled_stream_draws_what_stock_draws(stock, paged):
    torch.manual_seed(3)
    expected = stock("hello", return_full_text=False, max_new_tokens=12)[0]["generated_text"]
    torch.manual_seed(3)
    assert "".join(paged.stream("hello", max_new_tokens=12)) == expected


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (["a", "b"], {}, "text_inputs"),
        ([], {}, "text_inputs"),
        (3, {}, "text_inputs"),
        ("a", dict(return_tensors=True), "return_tensors"),
        ("a", dict(streamer=print), "streamer"),
        ("a", dict(do_sample=True, num_return_sequences=2), "num_return_sequences"),
        ("a", dict(num_beams=2, num_return_sequences=2), "num_return_sequences"),
        ("x" * 600, {}, "exceed"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_streams_that_are_refused(paged, prompt, options, message):
    with pytest.raises(InvalidArgument, match=message):
        list(paged.stream(prompt, max_new_tokens=5, **options))
    engine(paged).step()
    assert not engine(paged).has_unfinished()


# Errors


def test_an_error_in_a_list_says_which_prompt(stock, paged):
    prompts = [*PROMPTS[:3], "long " * 400, *PROMPTS[3:]]
    with pytest.raises(RequestTooLarge) as caught:
        paged(prompts, **GREEDY)
    assert "prompt 3 " in caught.value.__notes__[0]
    for bad in ([*PROMPTS[:2], 5], [*PROMPTS[:2], None, "x"]):
        with pytest.raises(TypeError) as caught:
            paged(bad, **GREEDY)
        assert "prompt 2 " in caught.value.__notes__[0]
    assert paged(PROMPTS, **GREEDY) == stock(PROMPTS, **GREEDY)
    assert not engine(paged).has_unfinished()


def test_an_error_in_a_batch_says_which_prompts(paged):
    with pytest.raises(TypeError) as caught:
        paged([*PROMPTS[:5], 5], batch_size=2, **GREEDY)
    assert "prompts 4 to 5 " in caught.value.__notes__[0]


@pytest.mark.parametrize("as_dataset", [False, True])
def test_results_behind_an_error_can_still_be_read(stock, paged, as_dataset):
    prompts = [*PROMPTS[:2], "long " * 400, *PROMPTS[2:]]
    given = KeyDataset([{"text": prompt} for prompt in prompts], "text") if as_dataset else (p for p in prompts)
    results, read = iter(paged(given, **GREEDY)), []
    while True:
        try:
            read.append(next(results))
        except StopIteration:
            break
        except RequestTooLarge as error:
            read.append(error.__notes__)
    assert read.pop(2) == ["This is the error of prompt 2 of the pipeline's input, counted from 0."]
    assert read == stock(PROMPTS, **GREEDY)


def test_a_generator_s_own_error_comes_through(paged):
    def broken():
        yield "hello"
        raise KeyError("source")

    results = iter(paged(broken(), **GREEDY))
    next(results)
    with pytest.raises(KeyError, match="source"):
        next(results)


def test_unknown_options_are_stock_s_error(stock, paged):
    for pipe in (stock, paged):
        for inputs in ("hello", PROMPTS):
            with pytest.raises(ValueError, match="no_such_option"):
                pipe(inputs, no_such_option=3, **GREEDY)


# Progress


def test_a_progress_bar_on_request(stock, paged, capsys):
    assert paged(PROMPTS, progress=True, **GREEDY) == stock(PROMPTS, **GREEDY)
    assert "6/6" in capsys.readouterr().err
    paged(PROMPTS, batch_size=4, progress=True, **GREEDY)
    assert "6/6" in capsys.readouterr().err
    list(paged((prompt for prompt in PROMPTS), progress=True, **GREEDY))
    assert "6prompt" in capsys.readouterr().err
    paged("hello", progress=True, **GREEDY)
    assert "1/1" in capsys.readouterr().err
    paged(PROMPTS, **GREEDY)
    assert "prompt" not in capsys.readouterr().err


def test_a_progress_bar_for_every_call(capsys):
    with pipeline(
        "text-generation", model=small_model(), tokenizer=small_tokenizer(), backend="paged", progress=True
    ) as pipe:
        pipe(PROMPTS[:2], **GREEDY)
        assert "2/2" in capsys.readouterr().err
        pipe(PROMPTS[:2], progress=False, **GREEDY)
        list(pipe.stream("hello", **GREEDY))
        assert "prompt" not in capsys.readouterr().err


# Making and ending one


def test_closing_unpatches_and_ends_use():
    model = small_model()
    pipe = pipeline("text-generation", model=model, tokenizer=small_tokenizer(), backend="paged")
    assert pipe.model is model and is_patched(model)
    lazy, pieces = iter(pipe((prompt for prompt in PROMPTS), **GREEDY)), pipe.stream("hello", **GREEDY)
    pipe.close()
    pipe.close()
    assert not is_patched(model)
    for later in (lazy, pieces):
        with pytest.raises(EngineClosed, match="pipeline"):
            next(later)
    for call in (pipe, pipe.stream):
        with pytest.raises(EngineClosed, match="pipeline"):
            call("hello", **GREEDY)


def test_a_model_that_was_patched_stays_so(stock):
    model = hf_paged.patch(small_model(), max_num_seqs=2)
    mine = patch_of(model)
    with pipeline("text-generation", model=model, tokenizer=small_tokenizer(), backend="paged") as pipe:
        assert patch_of(pipe.model) is mine
        assert pipe(PROMPTS, **GREEDY) == stock(PROMPTS, **GREEDY)
    assert patch_of(model) is mine
    make = dict(task="text-generation", model=model, tokenizer=small_tokenizer(), backend="paged")
    pipeline(**make, engine_config=EngineConfig(max_num_seqs=2))
    with pytest.raises(InvalidArgument, match="engine_config"):
        pipeline(**make, engine_config=EngineConfig(max_num_seqs=3))
    assert patch_of(model) is mine


def test_two_pipelines_may_share_a_model(stock):
    model = small_model()
    first, second = (
        pipeline("text-generation", model=model, tokenizer=small_tokenizer(), backend="paged") for _ in range(2)
    )
    expected = stock(PROMPTS, **GREEDY)
    assert first(PROMPTS, **GREEDY) == second(PROMPTS, **GREEDY) == expected
    first.close()
    assert second(PROMPTS, **GREEDY) == expected
    assert is_patched(model)
    second.close()
    assert not is_patched(model)


def test_copies_and_pickles_work_on(stock, paged):
    for twin in (copy.deepcopy(paged), pickle.loads(pickle.dumps(paged))):
        assert type(twin) is PagedTextGenerationPipeline
        assert twin(PROMPTS, **GREEDY) == stock(PROMPTS, **GREEDY)
        assert is_patched(twin.model) and twin.model is not paged.model
        twin.close()
    assert is_patched(paged.model)


def test_arguments_that_are_refused(paged):
    make = dict(task="text-generation", model=paged.model, tokenizer=paged.tokenizer)
    with pytest.raises(InvalidArgument, match="backend.*'vllm'"):
        pipeline(**make, backend="vllm")
    with pytest.raises(InvalidArgument, match="engine_config"):
        pipeline(**make, engine_config=EngineConfig())
    with pytest.raises(InvalidArgument, match="engine_config"):
        pipeline(**make, backend="paged", engine_config=dict(max_num_seqs=3))
    assert type(pipeline(**make, backend=None)) is TextGenerationPipeline


def test_a_model_that_cannot_be_patched_is_refused(monkeypatch):
    from transformers import RwkvConfig, RwkvForCausalLM

    model = RwkvForCausalLM(RwkvConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, context_length=64))
    with pytest.raises(UnsupportedModel, match="rwkv"):
        pipeline("text-generation", model=model, tokenizer=small_tokenizer(), backend="paged")


def test_a_folder_with_everything_passed_through(stock, tmp_path):
    small_model().save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    with pipeline(
        "text-generation",
        model=str(tmp_path),
        backend="paged",
        engine_config=EngineConfig(block_size=32, fuse=False),
        dtype=torch.bfloat16,
        device="cpu",
        model_kwargs=dict(attn_implementation="eager"),
        batch_size=2,
        return_full_text=False,
        **GREEDY,
    ) as pipe:
        assert pipe.model.dtype == torch.bfloat16
        assert patch_of(pipe.model).config == EngineConfig(block_size=32, fuse=False)
    with pipeline(
        "text-generation", model=tmp_path, backend="paged", device_map="cpu", return_full_text=False, **GREEDY
    ) as pipe:
        assert pipe(PROMPTS) == stock(PROMPTS, return_full_text=False, **GREEDY)


# The registry


def test_a_pipeline_class_can_be_given(stock, paged):
    class Loud(PagedTextGenerationPipeline):
        def postprocess(self, model_outputs, **parameters):
            return [{"generated_text": out["generated_text"].upper()} for out in super().postprocess(model_outputs)]

    make = dict(task="text-generation", model=small_model(), tokenizer=small_tokenizer())
    with pipeline(**make, pipeline_class=Loud) as pipe:
        assert pipe("x", **GREEDY)[0]["generated_text"] == stock("x", **GREEDY)[0]["generated_text"].upper()
    assert type(pipeline(**make, pipeline_class=TextGenerationPipeline)) is TextGenerationPipeline


def test_a_class_registered_by_somebody_else_is_theirs(monkeypatch):
    from hf_paged.integrations.pipeline import _register

    class Mine(PIPELINE_REGISTRY.check_task("text-generation")[1]["impl"]):
        def __init__(self, *args, mine=None, **kwargs):
            super().__init__(*args, **kwargs)
            self.mine = mine

    task = PIPELINE_REGISTRY.supported_tasks["text-generation"]
    monkeypatch.setitem(task, "impl", Mine)
    _register()
    pipe = pipeline("text-generation", model=small_model(), tokenizer=small_tokenizer(), mine=3)
    assert type(pipe) is Mine and pipe.mine == 3
    assert not is_patched(pipe.model)


SCRIPT = """
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer
model, tokenizer = tiny_model("llama", vocab_size=300), tiny_tokenizer(300)
options = dict(task="text-generation", model=model, tokenizer=tokenizer)
expected = pipeline(**options)("hello", do_sample=False, max_new_tokens=5)
with pipeline(**options, backend="paged") as pipe:
    assert type(pipe).__name__ == "PagedTextGenerationPipeline", type(pipe)
    assert pipe("hello", do_sample=False, max_new_tokens=5) == expected
assert type(pipeline(**options)).__name__ == "TextGenerationPipeline"
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import hf_paged\nfrom transformers import pipeline",
        "from transformers import pipeline\nimport hf_paged",
        "from hf_paged.integrations.pipeline import PagedTextGenerationPipeline\nfrom transformers import pipeline",
    ],
    ids=["before", "after", "adapter"],
)
def test_any_order_of_imports(imports, request):
    tests = str(request.config.rootpath / "tests")
    script = f"import sys; sys.path.insert(0, {tests!r})\n{imports}\n{SCRIPT}"
    done = subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
