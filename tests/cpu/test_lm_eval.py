"""lm-evaluation-harness: tasks come out as with its own model `hf`, from the command line as from code."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import lm_eval
import peft
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft_adapters import LAYERS, WARNINGS, shake
from quantized_checkpoints import gptq_layer, save_quantized, source
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

import hf_paged
from hf_paged import InvalidArgument, UnsupportedOption
from hf_paged.hf.patch import is_patched
from hf_paged.integrations.lm_eval import HFPaged

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of lm-eval and what it imports
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

LENGTH = 256
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHOICES = """\
task: sea_choices
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choices.jsonl}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
TEXTS = """\
task: sea_texts
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
ANSWERS = """\
task: sea_answers
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choices.jsonl}}
test_split: test
fewshot_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e", "\\n\\n"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three tasks over local files: choices, perplexity, generation."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = [
        {
            "question": f"what is number {place} of the {'sea ' * (1 + place % 4)}?",
            "choices": [f" {place}", " salt and water", " a ship", " x"][: 2 + place % 3],
            "answer": place % 2,
        }
        for place in range(10)
    ]
    texts = [{"text": "the tide comes in and goes out " * count} for count in (1, 4, 13, 20)]
    for name, lines in (("choices", questions), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in (("choices", CHOICES), ("texts", TEXTS), ("answers", ANSWERS)):
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_HARNESS_CACHE_PATH", str(tmp_path / "requests"))


def pair(dtype=torch.float32):
    model, tokenizer = tiny_model("llama", vocab_size=320, dtype=dtype), tiny_tokenizer(320)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    tokenizer.chat_template = TEMPLATE
    return {"pretrained": model, "tokenizer": tokenizer, "max_length": LENGTH}


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=place) for place, args in enumerate(arguments)]


def evaluated(model, folder, tasks=("sea_choices", "sea_texts", "sea_answers"), **options) -> dict:
    """simple_evaluate's metrics, and what the model said to each request."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model,
        tasks=list(tasks),
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=True,
        **options,
    )
    said = {name: [sample["resps"] for sample in lines] for name, lines in found["samples"].items()}
    return {"results": found["results"], "said": said, "config": found["config"]}


def numbers(said) -> list[float]:
    """The numbers, in order, of responses nested in whatever way."""
    if isinstance(said, str):
        return [float(said)] if said not in ("True", "False") else [said == "True"]
    return [number for one in said for number in numbers(one)] if isinstance(said, list | tuple) else [said]


def assert_equal(found: dict, expected: dict) -> None:
    assert found["said"].keys() == expected["said"].keys()
    for task, said in expected["said"].items():
        if task == "sea_answers":
            assert found["said"][task] == said
        else:
            assert numbers(found["said"][task]) == pytest.approx(numbers(said), abs=2e-3, rel=1e-5)
    for task, metrics in expected["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert found["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_fewshot": 2},
        {
            "num_fewshot": 2,
            "apply_chat_template": True,
            "fewshot_as_multiturn": True,
            "system_instruction": "Answer.",
            "tasks": ["sea_choices", "sea_answers"],
        },
        {"gen_kwargs": {"num_beams": 2}, "tasks": ["sea_answers"]},
        {"gen_kwargs": {"repetition_penalty": 1.3, "max_gen_toks": 40}, "tasks": ["sea_answers"]},
    ],
    ids=["plain", "fewshot", "chat", "beams", "penalty"],
)
def test_tasks_come_out_as_with_hf(folder, options):
    given = pair()
    expected = evaluated(HFLM(batch_size=1, **given), folder, **options)
    with HFPaged(batch_size=1, **given) as model:
        found = evaluated(model, folder, **options)
    assert_equal(found, expected)
    assert not is_patched(given["pretrained"])


def test_by_name_on_a_saved_model(folder, tmp_path):
    given = pair()
    given["pretrained"].save_pretrained(tmp_path)
    given["tokenizer"].save_pretrained(tmp_path)
    arguments = {"pretrained": str(tmp_path), "max_length": LENGTH, "device": "cpu"}
    expected = evaluated("hf", folder, model_args=arguments)
    found = evaluated("hf-paged", folder, model_args=arguments | {"max_num_seqs": 3, "block_size": 16})
    assert_equal(found, expected)
    assert get_model("hf-paged") is HFPaged
    assert found["config"]["model_num_parameters"] == expected["config"]["model_num_parameters"]


def test_the_command(folder, tmp_path):
    given = pair()
    given["pretrained"].save_pretrained(tmp_path / "model")
    given["tokenizer"].save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "hf_paged", "lm-eval", "--model", "hf-paged", "--tasks", "sea_choices"]
    command += ["--model_args", f"pretrained={tmp_path}/model,max_length={LENGTH},max_num_seqs=8", "--device", "cpu"]
    command += ["--include_path", str(folder), "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "|sea_choices|" in done.stdout
    (written,) = (tmp_path / "out").rglob("results_*.json")
    expected = evaluated(HFLM(batch_size=4, **given), folder, ["sea_choices"])["results"]["sea_choices"]
    assert json.loads(written.read_text())["results"]["sea_choices"]["acc,none"] == expected["acc,none"]


def test_log_likelihoods(caplog):
    given = pair()
    asked = [("x" * 300, "y" * 20), ("", "hello"), ("", "<s>hello"), ("a b ", "c"), ("one", "z" * LENGTH)]
    asked += [("same beginning", f" {letter}") for letter in "abcd"]
    wanted = HFLM(batch_size=1, prefix_token_id=7, **given).loglikelihood(requests("loglikelihood", asked))
    with HFPaged(prefix_token_id=7, **given) as model, caplog.at_level(logging.WARNING):
        caplog.clear()  # of what stock said
        found = model.loglikelihood(requests("loglikelihood", asked))
        assert caplog.text.count("from the left") == 2
        with pytest.raises(InvalidArgument, match=f"{LENGTH + 1} tokens; it must have from 1 to max_length"):
            model.loglikelihood(requests("loglikelihood", [("a", "b" * (LENGTH + 1))]))
        assert not model._engine.has_unfinished()
    for (logprob, greedy), (expected, is_greedy) in zip(found, wanted, strict=True):
        assert logprob == pytest.approx(expected, abs=2e-3) and greedy is is_greedy


def test_of_equal_logits_the_first_is_greedy():
    given = pair()
    with torch.no_grad():
        given["pretrained"].lm_head.weight[70] = given["pretrained"].lm_head.weight[80]
    stock = HFLM(batch_size=1, **given)
    ties = requests(
        "loglikelihood",
        [(f"{place}", given["tokenizer"].decode([token])) for place in range(200) for token in (70, 80)],
    )
    wanted = [greedy for _, greedy in stock.loglikelihood(ties)]
    with HFPaged(**given) as model:
        assert [greedy for _, greedy in model.loglikelihood(ties)] == wanted
    assert True in wanted[::2] and True not in wanted[1::2]


def test_texts(caplog):
    given = pair()
    asked = [
        ("tell me", {"until": ["e"], "max_gen_toks": 30}),
        ("tell me", {"until": "o", "max_new_tokens": 30, "do_sample": False, "temperature": 0.7}),
        ("m" * 400, {"until": [], "max_gen_toks": 30}),
        ("a line\n", {"until": ["\n\n"], "max_gen_toks": 30}),
        ("tell me", {"max_length": 40, "max_gen_toks": 10}),
        ("<s>tell me", {"until": ["</s>", "zz"], "max_gen_toks": 10}),
    ]
    wanted = HFLM(batch_size=1, **given).generate_until(requests("generate_until", asked))
    with HFPaged(**given) as model, caplog.at_level(logging.WARNING, logger="lm_eval.models.huggingface"):
        caplog.clear()  # of what stock said
        assert model.generate_until(requests("generate_until", asked)) == wanted
        assert "Left truncation applied" in caplog.text and "Please use `max_gen_toks`" in caplog.text
        sampled = requests(
            "generate_until", [("tell me", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 20})] * 3
        )
        torch.manual_seed(5)
        first = model.generate_until(sampled)
        torch.manual_seed(5)
        assert model.generate_until(sampled) == first and len(set(first)) == 3
        with pytest.raises(InvalidArgument, match="max_gen_toks \\(256\\) must be less than max_length"):
            model.generate_until(requests("generate_until", [("a", {})]))
        with pytest.raises(ValueError, match="nonsense"):  # transformers' own words
            model.generate_until(requests("generate_until", [asked[0], ("a", {"nonsense": 1, "max_gen_toks": 5})]))
        assert not model._engine.has_unfinished()


@pytest.mark.filterwarnings(*WARNINGS)
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")  # lm-eval does, of the checkpoint's own
@pytest.mark.parametrize("kind", ["peft", "gptq"])
def test_adapters_and_quantized_weights(kind, tmp_path):
    given = {"tokenizer": tiny_tokenizer(320), "max_length": 64, "device": "cpu"}
    if kind == "peft":
        given["pretrained"], given["peft"] = str(tmp_path / "model"), str(tmp_path / "adapter")
        tuned = peft.get_peft_model(tiny_model("llama", vocab_size=320), peft.LoraConfig(r=4, **LAYERS))
        shake(tuned)
        tuned.save_pretrained(tmp_path / "adapter")
        tiny_model("llama", vocab_size=320).save_pretrained(tmp_path / "model")
        stock = HFLM(batch_size=1, **given)
    else:
        config = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}
        model = source(vocab_size=320)
        save_quantized(model, tmp_path / "model", config, lambda name, N, K: gptq_layer(N, K))
        stock = HFLM(batch_size=1, **given | {"pretrained": model})
        given["pretrained"] = str(tmp_path / "model")
    scored = [("the sea is", " wide"), ("rain", " falls on it"), ("x" * 90, "end")]
    texts = [("a tide " * 30,), ("snow",)]  # the first is longer than the model's windows
    written = [("tell me", {"until": ["e", "\n\n", "st"], "max_gen_toks": 12})]
    with HFPaged(**given) as model:
        for (found, greedy), (expected, is_greedy) in zip(
            model.loglikelihood(requests("loglikelihood", scored)),
            stock.loglikelihood(requests("loglikelihood", scored)),
            strict=True,
        ):
            assert found == pytest.approx(expected, abs=2e-3) and greedy is is_greedy
        rolled = [one.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) for one in (model, stock)]
        assert rolled[0] == pytest.approx(rolled[1], abs=2e-3)
        assert model.generate_until(requests("generate_until", written)) == stock.generate_until(
            requests("generate_until", written)
        )


@pytest.mark.parametrize("marker", ["e", 104])
def test_what_was_thought_is_left_out(marker):
    given = pair() | {"think_end_token": marker}
    asked = requests(
        "generate_until", [(f"tell {number}", {"until": ["x"], "max_gen_toks": 30}) for number in range(8)]
    )
    wanted = HFLM(batch_size=1, **given).generate_until(asked)
    with HFPaged(**given) as model:
        assert model.generate_until(asked) == wanted


def test_results_are_cached_as_they_come(folder, tmp_path, monkeypatch):
    given = pair()
    cached = {"use_cache": str(tmp_path / "said")}
    with HFPaged(**given) as model:
        whole = evaluated(model, folder, ["sea_answers"])
        told = []
        step = model._engine.step

        def failing():
            if len(told) >= 4:
                raise KeyboardInterrupt
            return step()

        monkeypatch.setattr(model._engine, "step", failing)
        add_partial = type(model.cache_hook).add_partial
        monkeypatch.setattr(
            type(model.cache_hook), "add_partial", lambda *args: (told.append(args[2]), add_partial(*args))
        )
        with pytest.raises(KeyboardInterrupt):
            evaluated(model, folder, ["sea_answers"], **cached)
        assert not model._engine.has_unfinished()
        monkeypatch.undo()
        asked = model._engine.stats()["tokens"]
        assert_equal(evaluated(model, folder, ["sea_answers"], **cached), whole)
        again = model._engine.stats()["tokens"]
        assert_equal(evaluated(model, folder, ["sea_answers"], **cached), whole)
        assert again > asked and model._engine.stats()["tokens"] == again  # all of it was there


def test_a_patched_model_keeps_its_engine():
    given = pair()
    hf_paged.patch(given["pretrained"], max_num_seqs=5)
    with HFPaged(**given) as model:
        assert model._engine is hf_paged.engine_of(given["pretrained"])
    assert is_patched(given["pretrained"])
    with pytest.raises(InvalidArgument, match="max_num_seqs: this model is patched already"):
        HFPaged(max_num_seqs=4, **given)


@pytest.mark.parametrize(
    ("option", "error", "words"),
    [
        ({"mixed_precision_dtype": "bfloat16"}, UnsupportedOption, "mixed_precision_dtype: the engine runs"),
        ({"parallelize": True}, UnsupportedOption, "parallelize: "),
        ({"softmax_dtype": "bfloat16"}, UnsupportedOption, "softmax_dtype: .* in float32"),
        ({"block_size": 0}, InvalidArgument, "block_size"),
        ({"max_model_len": 100}, InvalidArgument, "max_length is 256, but the engine's max_model_len 100"),
    ],
)
def test_options_that_cannot_be(option, error, words):
    given = pair()
    with pytest.raises(error, match=words):
        HFPaged(**given, **option)
    assert not is_patched(given["pretrained"])
