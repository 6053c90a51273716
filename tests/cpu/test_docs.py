"""The code in the documentation runs, from top to bottom."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import peft
import pytest
import torch
from datasets import Dataset
from lm_eval.tasks import TaskManager
from PIL import Image
from quantized_checkpoints import gptq_layer, save_quantized
from tiny_models import tiny_config, tiny_model
from tiny_processors import tiny_pair
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForSequenceClassification
from trl import GRPOConfig

DOCS = Path(__file__).parents[2] / "docs"
SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2)
CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "sym": False}

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's own


@pytest.fixture
def names(tmp_path) -> dict:
    """What the text takes for granted: a quantized checkpoint, a model, a folder, token ids."""
    save_quantized(tiny_model("llama", **SIZES), tmp_path / "quantized", CONFIG, lambda name, N, K: gptq_layer(N, K))
    tiny_model("llama", **SIZES).save_pretrained(tmp_path / "float")
    ids = torch.tensor([[5, 9, 11, 40, 7, 8]])
    return dict(checkpoint=tmp_path / "quantized", name=tmp_path / "float", folder=tmp_path / "out", ids=ids)


def run(page: str, names: dict) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def test_adapters(names, tmp_path, capsys):
    plain = tiny_model("llama", **SIZES)
    peft.get_peft_model(plain, peft.LoraConfig(r=4, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    names["adapter"] = tmp_path / "adapter"
    run("adapters.md", names)
    assert re.search(r"LORA 4 \d+ \['first', 'second'\]", capsys.readouterr().out)
    assert names["rows"].shape == (2, 11) and len(names["outputs"]) == 3


def test_batching():
    names = dict(model=tiny_model("llama", vocab_size=320), tokenizer=tiny_tokenizer(320))
    names["model"].generation_config.eos_token_id = 2
    run("batching.md", names)
    done = names["done"]
    assert done.keys() == {"story", "form", "vector", "score 0", "score 1"} and done["form"].outputs[0].text in ("yes", "no")


def test_benchmarks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("benchmarks.md", dict(model=tiny_model("llama", vocab_size=320), tokenizer=tiny_tokenizer(320)))
    assert json.loads((tmp_path / "steps.json").read_text())["traceEvents"]


def test_memory(capsys, tmp_path):
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 300, (100,), generator=generator).tolist() for _ in range(12)]
    model = tiny_model("llama", vocab_size=320, num_hidden_layers=20, max_position_embeddings=256)
    names = dict(model=model, tokenizer=tiny_tokenizer(320), prompts=prompts, folder=tmp_path)
    run("memory.md", names)
    first, disk, *_ = capsys.readouterr().out.splitlines()
    preemptions, swaps_out, swaps_in, *_ = map(int, first.split())
    assert preemptions == swaps_out == swaps_in > 0
    assert int(disk.split()[1]) == len(list(tmp_path.rglob("0-*.safetensors"))) > 0
    assert len(names["branches"]) == 8 and len(names["sent_back"]) == 1
    assert names["cached"] == len(names["state"]) > 64


def test_tasks(names, tmp_path, capsys):
    config = tiny_config("llama", vocab_size=320)
    config.num_labels = 2
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "classifier")
    names |= dict(model=tiny_model("llama", vocab_size=320), tokenizer=tiny_tokenizer(320))
    names["classifier"] = tmp_path / "classifier"
    run("tasks.md", names)
    assert capsys.readouterr().out.count("LABEL_") == 2
    assert -1 <= names["similarity"] <= 1 and names["best"] in names["scores"]
    assert isinstance(names["results"]["story"], str) and names["results"]["vector"].embedding.shape == (48,)


def test_scheduling(names):
    names |= dict(model=tiny_model("llama", vocab_size=320), tokenizer=tiny_tokenizer(320))
    run("scheduling.md", names)
    assert len(names["finished"]) == 7


TASK = """\
task: one
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/one.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: [" yes", " no"]
doc_to_target: 0
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # of lm-eval and what it imports
def test_tools(names, tmp_path, capsys):
    (tmp_path / "one.jsonl").write_text('{"question": "Is it?"}\n')
    (tmp_path / "one.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))
    names |= dict(model=tiny_model("llama", vocab_size=320), tokenizer=tiny_tokenizer(320))
    names["dataset"] = Dataset.from_dict(
        {"question": ["Is it?", "Why?"], "choices": [[" yes", " no"], [" so"]]}
    )
    names |= dict(tasks=["one"], manager=TaskManager(include_path=str(tmp_path), include_defaults=False))
    run("tools.md", names)
    assert "acc,none" in capsys.readouterr().out
    assert len(names["answered"]["answer"]) == 2 and [len(row) for row in names["chosen"]["logprobs"]] == [2, 1]
    assert names["found"].shape == (2, 32) and len(names["vectors"]["vector"][0]) == 48


def test_structured(names, capsys):
    model, tokenizer = tiny_model("llama", vocab_size=320), tiny_tokenizer(320)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    names |= dict(model=model, tokenizer=tokenizer)
    run("structured.md", names)
    assert all(set(json.loads(text)) == {"name_of_the_city", "on_the_coast"} for text in names["texts"])
    (text,) = tokenizer.batch_decode(names["beams"][:, len(tokenizer("Where?").input_ids) :], skip_special_tokens=True)
    assert isinstance(json.loads(text)["on_the_coast"], bool)
    assert int(capsys.readouterr().out.split()[0]) > 0


def test_vision(names, capsys):
    model, processor, _ = tiny_pair("llava")
    processor.tokenizer.padding_side = "left"
    photo = Image.effect_mandelbrot((20, 12), (-2, -1, 1, 1), 50).convert("RGB")
    encoded = io.BytesIO()
    photo.save(encoded, "PNG")
    names |= dict(model=model, processor=processor, photo=photo, encoded=encoded.getvalue())
    run("vision.md", names)
    assert names["tokens"].shape[0] == 2 and names["output"].outputs[0].token_ids == names["same"].outputs[0].token_ids
    assert names["vector"].embedding.shape == (48,)
    assert "LlavaModel.get_image_features" in capsys.readouterr().out


def test_getting_started(names, tmp_path, capsys):
    model, tokenizer = tiny_model("llama", vocab_size=320), tiny_tokenizer(320)
    model.generation_config.pad_token_id, tokenizer.chat_template = 0, "{{ messages[0]['content'] }}"
    model.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    names["name"] = tmp_path / "chat"
    run("getting-started.md", names)
    assert names["tokens"].shape == (2, names["inputs"]["input_ids"].shape[1] + 20) and len(names["texts"]) == 2
    assert "LlamaForCausalLM (float32 on cpu)" in capsys.readouterr().out


@pytest.mark.parametrize("page", [path.name for path in DOCS.glob("*.md")])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", (DOCS / page).read_text(encoding="utf-8")):
        assert "://" in target or (DOCS / target).exists(), target


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")  # TRL's
def test_rl(names, tmp_path):
    torch.manual_seed(0)
    model, tokenizer = tiny_model("llama", vocab_size=320), tiny_tokenizer(320)
    model.generation_config.eos_token_id = 2
    args = GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=8, max_steps=1,
        report_to=[], use_cpu=True, bf16=False, save_strategy="no",
    )  # fmt: skip
    before = [parameter.clone() for parameter in model.parameters()]
    names |= dict(model=model, tokenizer=tokenizer, batches=[["one two", "three"], ["four"]], args=args)
    names |= dict(reward=lambda completion_ids, **_: [len(set(ids)) / len(ids) for ids in completion_ids])
    names["dataset"] = Dataset.from_dict({"prompt": ["one two", "three four"]})
    run("rl.md", names)
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters()))
    assert names["trainer"].state.global_step == 1


def test_quantization(names, capsys):
    run("quantization.md", names)
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM (float32 on cpu)" in printed
    assert names["adapted"].generate(names["ids"], max_new_tokens=3, do_sample=False).shape == (1, 9)
    assert (names["folder"] / "config.json").exists()
