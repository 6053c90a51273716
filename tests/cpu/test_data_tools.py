"""`datasets.map` through the engine, and `encode` as sentence-transformers has it, against stock transformers."""

from __future__ import annotations

import json

import datasets
import numpy
import pytest
import torch
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModel

from hf_paged import Engine, InvalidArgument, RequestTooLarge, SamplingParams, UnsupportedOption
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
    numpy.testing.assert_allclose(found, [stock(text, pooling) for text in TEXTS], atol=1e-5)
    numpy.testing.assert_allclose(encoder.encode(TEXTS[0]), stock(TEXTS[0], pooling), atol=1e-5)
    short = encoder.encode(TEXTS, truncate_dim=7, normalize_embeddings=True, batch_size=2)
    wanted = [stock(text, pooling, 7, normalize=True) for text in TEXTS]
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
        (encoder.encode_document("rain"), "rain"),
        (encoder.encode_query("rain", prompt=""), "rain"),
    ):
        numpy.testing.assert_allclose(found, stock(text), atol=1e-5)
    cut = tiny_tokenizer(320).decode(tiny_tokenizer(320)("abc" * 30).input_ids[:20])
    numpy.testing.assert_allclose(encoder.encode("abc" * 30, prompt=""), stock(cut), atol=1e-5)
    with pytest.raises(
        InvalidArgument, match="prompt_name 'other' is not one of prompts, which are: 'query', 'document', 'passage'"
    ):
        encoder.encode("rain", prompt_name="other")
    with pytest.raises(InvalidArgument, match="inputs must be a text or a list of texts, got one that is 5"):
        encoder.encode([5])
    with pytest.raises(InvalidArgument, match="max_seq_length must be between 1 and"):
        SentenceEncoder(engine, max_seq_length=10**9)
    with pytest.raises(InvalidArgument, match="prompt_name 'x'"):
        SentenceEncoder(engine, default_prompt_name="x")


LASTTOKEN = {"pooling_mode": "lasttoken", "embedding_dimension": 48, "include_prompt": True}


def folder_of(path, *further: str, pooling: dict = LASTTOKEN, **general):
    """A checkpoint as sentence-transformers saves it; `further` modules come after the pooling."""
    tiny_model("llama", vocab_size=320).model.save_pretrained(path)
    kinds = ["base.modules.transformer.Transformer", "sentence_transformer.modules.pooling.Pooling", *further]
    folders = ["", *(f"{place}_{kind.rpartition('.')[2]}" for place, kind in enumerate(kinds[1:], 1))]
    types = [kind if kind.startswith("own.") else f"sentence_transformers.{kind}" for kind in kinds]
    modules = [{"idx": place, "path": path, "type": name} for place, (path, name) in enumerate(zip(folders, types))]
    (path / "1_Pooling").mkdir()
    for file, content in (
        ("modules.json", modules),
        ("1_Pooling/config.json", pooling),
        ("config_sentence_transformers.json", general),
        ("sentence_bert_config.json", {"max_seq_length": 24}),
    ):
        (path / file).write_text(json.dumps(content))
    return AutoModel.from_pretrained(path).eval()


def test_what_the_checkpoint_says(tmp_path):
    said = dict(prompts={"query": "query: ", "passage": "so: "}, default_prompt_name="passage", similarity_fn_name="dot")
    model = folder_of(tmp_path, "base.modules.normalize.Normalize", **said)
    with Engine(model, tiny_tokenizer(320)) as engine:
        encoder = SentenceEncoder(engine)
        for found, text in (
            (encoder.encode("rain"), "so: rain"),
            (encoder.encode_query("rain"), "query: rain"),
            (encoder.encode_document("rain"), "rain"),
        ):
            numpy.testing.assert_allclose(found, stock(text, "last", normalize=True), atol=1e-5)
        whole = stock("rain", "last", normalize=True)
        numpy.testing.assert_allclose(encoder.encode("rain", prompt="", truncate_dim=7), whole[:7], atol=1e-5)
        short = encoder.encode("rain", prompt="", truncate_dim=7, normalize_embeddings=True)
        numpy.testing.assert_allclose(short, stock("rain", "last", 7, normalize=True), atol=1e-5)
        cut = tiny_tokenizer(320).decode(tiny_tokenizer(320)("abc" * 30).input_ids[:24])
        numpy.testing.assert_allclose(
            encoder.encode("abc" * 30, prompt=""), stock(cut, "last", normalize=True), atol=1e-5
        )
        one, other = encoder.encode("rain"), 2 * encoder.encode("snow")
        assert encoder.similarity(one, other).item() == pytest.approx(one @ other, abs=1e-6)
        own = SentenceEncoder(engine, prompts={"query": "q "}, similarity_fn_name="euclidean", truncate_dim=5)
        wanted = stock("q rain", "last", normalize=True)[:5]
        numpy.testing.assert_allclose(own.encode_query("rain"), wanted, atol=1e-5)
        assert own.similarity(one, other).item() == pytest.approx(-numpy.linalg.norm(one - other), abs=1e-5)
        manhattan = SentenceEncoder(engine, similarity_fn_name="manhattan")
        assert manhattan.similarity(one, other).item() == pytest.approx(-abs(one - other).sum(), abs=1e-5)


def test_modules_that_are_not_run_are_named(tmp_path):
    further = ["base.modules.dense.Dense", "own.module.Whitening"]
    with Engine(folder_of(tmp_path, *further), tiny_tokenizer(320)) as engine:
        with pytest.raises(UnsupportedOption, match="pools by 'last, then Dense, then own.module.Whitening'"):
            SentenceEncoder(engine).encode("rain")
        with pytest.raises(UnsupportedOption, match="then Dense"):
            engine.embed("rain")
        numpy.testing.assert_allclose(
            SentenceEncoder(engine, pooling="mean").encode("rain"), stock("rain"), atol=1e-5
        )


def test_a_prompt_that_is_not_pooled_is_refused(tmp_path):
    pooling = {"pooling_mode": "mean", "include_prompt": False}
    with Engine(folder_of(tmp_path, pooling=pooling, prompts={"query": "q: "}), tiny_tokenizer(320)) as engine:
        encoder = SentenceEncoder(engine)
        numpy.testing.assert_allclose(encoder.encode("rain"), stock("rain"), atol=1e-5)
        with pytest.raises(UnsupportedOption, match="leaves the prompt's tokens out"):
            encoder.encode_query("rain")
        last = SentenceEncoder(engine, pooling="last").encode_query("rain")
        numpy.testing.assert_allclose(last, stock("q: rain", "last"), atol=1e-5)


@pytest.mark.parametrize(
    ("option", "error", "words"),
    [
        ({"precision": "int8"}, UnsupportedOption, "precision: vectors are 'float32'"),
        ({"output_value": "token_embeddings"}, UnsupportedOption, "output_value"),
        ({"device": "meta"}, UnsupportedOption, "device: the engine's model is on cpu"),
        ({"truncate_dim": 0}, InvalidArgument, "truncate_dim must be a positive integer"),
        ({"inputs": None}, InvalidArgument, "inputs must be a text or a list of texts, got None"),
        ({"inputs": ["a", ""]}, InvalidArgument, "inputs: '' has no tokens"),
    ],
)
def test_what_encode_is_told_wrong(engine, option, error, words):
    with pytest.raises(error, match=words):
        SentenceEncoder(engine).encode(**{"inputs": "rain"} | option)
    with pytest.raises(InvalidArgument, match="similarity_fn_name must be one of 'cosine'"):
        SentenceEncoder(engine, similarity_fn_name="own")
