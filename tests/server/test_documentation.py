"""What README and docs/serving.md tell people to type works as it is written, against a server's own process."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_parts import EOS, Running, make_model, make_tokenizer, serving
from tiny_models import tiny_model
from tool_parts import TEMPLATE

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/serving.md")


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(page: str, program: str) -> list[str]:
    """Shell commands, with the lines that belong to them."""
    joined = "\n".join(blocks(page, "bash"))
    return re.findall(rf"^{program} (?:'[^']*'|\\\n|[^\n'])*", joined, re.MULTILINE)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder, disk = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("disk")
    model, tokenizer = tiny_model("llama", vocab_size=320), make_tokenizer()
    model.generation_config.eos_token_id = EOS
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with Running(folder, "--tool-parser", "hermes", "--offload", "16MiB", "--offload-disk", str(disk)) as running:
        yield running.url()


@pytest.mark.parametrize("page", PAGES)
def test_curl_examples_are_answered(server, page):
    examples = commands(page, "curl")
    assert examples
    for example in examples:
        assert "127.0.0.1:8000" in example
        command = example.replace("http://127.0.0.1:8000", server).replace("curl ", "curl -sS --fail-with-body --max-time 60 ", 1)
        ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        assert ended.returncode == 0, (example, ended.stdout, ended.stderr)
        if '"stream": true' in example:
            assert ended.stdout.rstrip().endswith("[DONE]")
        else:
            assert json.loads(ended.stdout)["object" if "rerank" not in example else "results"]


def test_the_dashboard_asks_for_numbers_that_exist(server):
    found = set()
    for family in text_string_to_metric_families(httpx.get(f"{server}/metrics").text):
        found |= {family.name} | {sample.name for sample in family.samples}
        if family.type == "counter":  # told from the first count on, by labels that nobody knows before
            found.add(f"{family.name}_total")
    board = json.loads((ROOT / "docs/grafana.json").read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked.append(board["templating"]["list"][1]["query"])
    names = [re.findall(r"hf_paged:\w+", text) for text in asked]
    assert len(asked) > 20 and all(names)
    assert {name for some in names for name in some} <= found
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8").partition("\n## Metrics\n")[2].partition("\n## ")[0]
    told = {f"hf_paged:{name}" for row in re.findall(r"^\| `(.*?) \|", page, re.MULTILINE) for name in re.findall(r"[a-z_0-9]{5,}(?=[`{])", "`" + row)}
    assert told - found == set() and len(told) > 20


def test_an_app_of_your_own():
    names = {"model": make_model(), "tokenizer": make_tokenizer()}
    [block] = [block for block in blocks("docs/serving.md", "python") if "create_app" in block]
    exec(compile(block, "serving.md", "exec"), names)
    with serving(names["app"]) as url:
        answer = httpx.post(f"{url}/llm/v1/completions", json={"model": "mine", "prompt": "a", "max_tokens": 2})
        assert answer.json()["usage"]["completion_tokens"] > 0
    assert names["engine"].engine.closed


def test_the_image_s_variables_are_options():
    text = (ROOT / "integrations/openai/Dockerfile").read_text(encoding="utf-8")
    from typer.main import get_command

    from hf_paged.cli.app import app

    options = {parameter.name.upper() for parameter in get_command(app).commands["serve"].params}
    named = set(re.findall(r"HF_PAGED_([A-Z_]+)", text + (ROOT / "docs/serving.md").read_text(encoding="utf-8")))
    assert named - options == {"API_KEYS"}
