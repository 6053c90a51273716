"""`datasets.map` through the engine, and `encode` as sentence-transformers has it, against stock transformers."""

from __future__ import annotations

import datasets
import numpy
import pytest
import torch
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

from hf_paged import Engine, InvalidArgument, RequestTooLarge, SamplingParams
from hf_paged.integrations.datasets import Embed, Generate, Score
from hf_paged.integrations.sentence_transformers import SentenceEncoder

TEXTS = ["the sea", "rain", "a longer text about the weather in the north sea", "the sea", " snow "]
GREEDY = SamplingParams(temperature=0, max_tokens=6)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(dill|multiprocess|datasets).*")


@pytest.fixture(scope="module")
def model():
    model = tiny_model("llama", vocab_size=320)
    model.generation_config.eos_token_id = 2
    return model


@pytest.fixture(scope="module")
def engine(model):
    with Engine(model, tiny_tokenizer(320)) as engine:
        yield engine
        assert not engine.has_unfinished()


@torch.no_grad()
def stock(text: str, pooling: str = "mean", size: int | None = None, normalize: bool = False) -> numpy.ndarray:
    model = tiny_model("llama", vocab_size=320)
    ids = torch.tensor([tiny_tokenizer(320)(text).input_ids])
    hidden = model.model(input_ids=ids).last_hidden_state[0]
    vector = {"mean": hidden.mean(0), "last": hidden[-1], "cls": hidden[0]}[pooling][:size]
    return (torch.nn.functional.normalize(vector, dim=0) if normalize else vector).numpy()


def rows(**columns) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": TEXTS, **columns})


def test_texts_of_rows_in_order(engine):
    expected = [output.outputs[0].text for output in engine.generate(TEXTS, GREEDY)]
    assert len(set(expected)) > 2
    call = Generate(engine, GREEDY, prompt="text", output="said")
    for batch_size in (2, 100):
        found = rows().map(call, batched=True, batch_size=batch_size)
        assert found["said"][:] == expected and found["text"][:] == TEXTS
    streamed = rows().to_iterable_dataset().map(call, batched=True, batch_size=2)
    assert [row["said"] for row in streamed] == expected


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas"])
def test_rows_in_any_format(engine, kind):
    ids = [[5, 9, 11], [40, 7, 8], [3, 3, 3], [5, 9, 11], [60, 61, 62]]
    expected = [output.outputs[0].text for output in engine.generate(ids, GREEDY)]
    given = rows(ids=ids).with_format(kind)
    assert (
        given.map(Generate(engine, GREEDY, prompt="ids"), batched=True, batch_size=3).with_format(None)["completion"][:]
        == expected
    )
    found = given.map(Embed(engine, pooling="last"), batched=True, batch_size=3).with_format("numpy")["embedding"][:]
    numpy.testing.assert_allclose(found, [stock(text, "last", normalize=True) for text in TEXTS], atol=1e-5)


def test_prompts_made_of_rows(engine):
    expected = [output.outputs[0].text for output in engine.generate([f"{text}: 7" for text in TEXTS], GREEDY)]
    call = Generate(engine, GREEDY, prompt=lambda row: f"{row['text']}: {row['number']}")
    assert rows(number=[7] * 5).map(call, batched=True)["completion"][:] == expected
    many = Generate(engine, SamplingParams(n=3, max_tokens=4, seed=1), prompt="text", output="drafts")
    assert [len(drafts) for drafts in rows().map(many, batched=True)["drafts"]] == [3] * 5


def test_scores_of_rows(engine):
    choices = [[" salt", " a ship"], [" x"], [" y", " z", " w"], [" salt", " a ship"], ["!"]]
    expected = [[score.logprob for score in scores] for scores in engine.score(TEXTS, choices)]
    found = rows(choices=choices).map(Score(engine, prompt="text", continuations="choices"), batched=True, batch_size=2)
    assert [len(row) for row in found["logprobs"]] == [2, 1, 3, 2, 1]
    for row, wanted in zip(found["logprobs"], expected, strict=True):
        assert row == pytest.approx(wanted)
    one = Score(engine, prompt="text", continuations=lambda row: row["choices"][0], output="first", per_token=True)
    lengths = [len(tiny_tokenizer(320)(row[0]).input_ids) for row in choices]
    first = rows(choices=choices).map(one, batched=True)["first"][:]
    assert first == pytest.approx([wanted[0] / length for wanted, length in zip(expected, lengths, strict=True)])


def test_weights_that_change_are_seen_by_the_next_map(model, engine, tmp_path):
    rows().save_to_disk(tmp_path / "rows")
    given = datasets.load_from_disk(tmp_path / "rows")  # `map` keeps results beside it
    call = Embed(engine, normalize=False)
    before = given.map(call, batched=True)["embedding"][:]
    weight = model.model.norm.weight
    try:
        with torch.no_grad():
            weight.mul_(2)
        numpy.testing.assert_allclose(given.map(call, batched=True)["embedding"][:], 2 * numpy.array(before), rtol=1e-4)
    finally:
        with torch.no_grad():
            weight.div_(2)


def test_what_map_is_told_wrong(engine):
    with pytest.raises(InvalidArgument, match="there is no column 'prompt', only 'text'"):
        rows().map(Generate(engine, GREEDY), batched=True)
    with pytest.raises(InvalidArgument, match="call map with batched=True"):
        rows().map(Embed(engine))
    with pytest.raises(RequestTooLarge):
        rows(long=["x" * 10_000] * 5).map(Embed(engine, text="long"), batched=True)


@pytest.mark.slow
def test_other_processes_have_no_engine(engine):
    with pytest.raises(InvalidArgument, match="leave num_proc out"):
        rows().map(Embed(engine), batched=True, num_proc=2)


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_encode_is_stock_pooled(engine, pooling):
    encoder = SentenceEncoder(engine, pooling=pooling)
    found = encoder.encode(TEXTS)
    assert found.dtype == numpy.float32 and found.shape == (5, 48)
    numpy.testing.assert_allclose(found, [stock(text.strip(), pooling) for text in TEXTS], atol=1e-5)
    numpy.testing.assert_allclose(encoder.encode(TEXTS[0]), stock(TEXTS[0], pooling), atol=1e-5)
    short = encoder.encode(TEXTS, truncate_dim=7, normalize_embeddings=True, batch_size=2)
    wanted = [stock(text.strip(), pooling, 7, normalize=True) for text in TEXTS]
    numpy.testing.assert_allclose(short, wanted, atol=1e-5)


def test_forms_of_vectors(engine, capsys):
    encoder = SentenceEncoder(engine)
    array = encoder.encode(TEXTS)
    assert capsys.readouterr().err == ""
    tensor = encoder.encode(TEXTS, convert_to_tensor=True, show_progress_bar=True)
    assert "5/5" in capsys.readouterr().err
    listed = encoder.encode(tuple(TEXTS), convert_to_numpy=False)
    assert torch.equal(tensor, torch.stack(listed)) and numpy.array_equal(tensor.numpy(), array)
    assert encoder.encode([]).shape == (0,) and encoder.encode([], convert_to_tensor=True).numel() == 0
    assert encoder.encode("rain", convert_to_tensor=True).shape == (48,)
    wanted = torch.nn.functional.cosine_similarity(tensor[:, None], tensor[None], dim=-1)
    assert torch.allclose(encoder.similarity(array, tensor), wanted, atol=1e-6)
    assert encoder.similarity(array[0], listed).shape == (1, 5)


def test_prompts_and_long_texts(engine):
    prompts = {"query": "query: ", "passage": "passage: "}
    encoder = SentenceEncoder(engine, prompts=prompts, default_prompt_name="passage", max_seq_length=20)
    for found, text in (
        (encoder.encode("rain"), "passage: rain"),
        (encoder.encode("rain", prompt_name="query"), "query: rain"),
        (encoder.encode("rain", prompt="so: "), "so: rain"),
        (encoder.encode_query("rain"), "query: rain"),
        (encoder.encode_document("rain"), "passage: rain"),
        (encoder.encode_query("rain", prompt=""), "rain"),
    ):
        numpy.testing.assert_allclose(found, stock(text), atol=1e-5)
    cut = tiny_tokenizer(320).decode(tiny_tokenizer(320)("abc" * 30).input_ids[:20])
    numpy.testing.assert_allclose(encoder.encode("abc" * 30, prompt=""), stock(cut), atol=1e-5)
    with pytest.raises(
        InvalidArgument, match="prompt_name 'other' is not one of prompts, which are: 'query', 'passage'"
    ):
        encoder.encode("rain", prompt_name="other")
    with pytest.raises(InvalidArgument, match="sentences must be a text or a list of texts, got int"):
        encoder.encode([5])
    with pytest.raises(InvalidArgument, match="max_seq_length must be between 1 and"):
        SentenceEncoder(engine, max_seq_length=10**9)
    with pytest.raises(InvalidArgument, match="prompt_name 'x'"):
        SentenceEncoder(engine, default_prompt_name="x")
