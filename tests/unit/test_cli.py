"""The command line around a stand-in engine: what it reads, prints and returns. No model is loaded."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hf_paged import cli
from hf_paged.base.errors import RequestFailed, RequestTooLarge
from hf_paged.base.types import CompletionOutput, RequestMetrics, RequestOutput
from hf_paged.cli import chat, common, generate, ranks


class Tokenizer:
    """Words are tokens; a token's id is the word itself."""

    chat_template = "{{ messages }}"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return " ".join(f"{message['role']}:{message['content']}" for message in messages)

    def __call__(self, text, **options):
        return SimpleNamespace(input_ids=text.split())


class Engine:
    """Answers each prompt with "w1 w2 ..." one word a step; the prompt "fail" fails, "huge" is refused."""

    def __init__(self):
        self.running: dict[str, RequestOutput] = {}
        self.params = {}
        self.prompts, self.aborted, self.on_step = [], [], None
        self.guesses_by, self.processor = (None, None), None

    def add(self, prompt, params):
        if prompt == "huge":
            raise RequestTooLarge("prompt has too many tokens")
        name = str(len(self.prompts))
        self.prompts.append(prompt)
        metrics = RequestMetrics(arrival=0.0)
        self.running[name] = RequestOutput(name, None, list(prompt), [CompletionOutput(0)], metrics)
        self.params[name] = params
        return name

    def has_unfinished(self):
        return bool(self.running)

    def abort(self, name):
        self.aborted.append(name)
        return self.running.pop(name, None) is not None

    def step(self):
        if self.on_step:
            self.on_step()
        changed = list(reversed(self.running.values()))  # later requests finish first
        for output in changed:
            completion = output.outputs[0]
            completion.token_ids.append(len(completion.token_ids) + 1)
            completion.text += f" w{len(completion.token_ids)}"
            if self.guesses_by != (None, None):
                output.metrics.num_draft_tokens, output.metrics.num_accepted_tokens = 8, 2
            output.finished = len(completion.token_ids) >= self.params[output.request_id].max_tokens
            if self.prompts[int(output.request_id)] == "fail":
                output.finished, output.error = True, RequestFailed(output.request_id, "it broke")
            if output.finished:
                completion.finish_reason = "length"
                del self.running[output.request_id]
        return changed


@pytest.fixture
def engine(monkeypatch):
    engine, tokenizer = Engine(), Tokenizer()
    model = SimpleNamespace(config=SimpleNamespace(_name_or_path="stand-in"), device="cpu")

    @contextlib.contextmanager
    def open_engine(**loading):
        common.dtype_name(loading["dtype"])
        engine.guesses_by = loading["speculation"], loading["draft_model"]
        engine.quantization = loading["quantization"]
        yield model, tokenizer, engine

    monkeypatch.setattr(generate, "open_engine", open_engine)
    monkeypatch.setattr(chat, "open_engine", open_engine)
    return engine


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exited:
        cli.main(list(arguments))
    return exited.value.code or 0


def test_one_prompt_prints_only_its_answer(engine, capsys):
    assert run("generate", "--prompt", "hello", "--max-tokens", "2", "--quiet") == 0
    assert capsys.readouterr().out == " w1 w2\n"


def test_many_prompts_print_in_order(engine, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("two\n\nthree\n")
    assert run("generate", "-p", "one", "-f", str(file), "--max-tokens", "1", "-q") == 0
    heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert heads == ["[0] one", "[1] two", "[2] three"]


def test_json_lines_with_own_parameters(engine, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a", "max_tokens": 3, "id": "x"}, {"messages": [{"role": "user", "content": "hi"}]}]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert run("generate", "-f", str(file), "--json", "--max-tokens", "1", "-q") == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["id"], first["text"], first["completion_tokens"]) == ("x", " w1 w2 w3", 3)
    assert (second["text"], second["finish_reason"]) == (" w1", "length")
    assert engine.prompts[1] == ["user:hi"]


def test_guessing_is_asked_for_and_reported(engine, capsys):
    assert run("generate", "-p", "a", "--speculation", "ngram", "--json", "--max-tokens", "1") == 0
    assert engine.guesses_by == ("ngram", None)
    captured = capsys.readouterr()
    row = json.loads(captured.out)
    assert (row["draft_tokens"], row["accepted_tokens"]) == (8, 2)
    assert "guesses_right=25%" in captured.err
    assert run("chat", "--prompt", "hi", "--draft-model", "small", "--max-tokens", "1") == 0
    assert engine.guesses_by == (None, "small")


def test_a_form_is_asked_for(engine, tmp_path, capsys):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "integer"}')
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "own", "structured_outputs": {"regex": "c+"}}')
    assert run("generate", "-p", "a", "--json-schema", str(schema), "-f", str(lines), "--max-tokens", "1", "-q") == 0
    assert [params.structured_outputs.form for params in engine.params.values()] == ["json", "regex"]
    assert run("generate", "-p", "a", "--choice", "yes", "--choice", "no", "--max-tokens", "1") == 0
    assert engine.params["2"].structured_outputs.choice == ("yes", "no")


def test_an_unknown_way_to_guess_is_refused_before_a_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(common, "load", lambda **loading: pytest.fail("loaded"))
    assert run("generate", "-p", "a", "--speculation", "psychic") == 2
    assert "speculation must be" in capsys.readouterr().err


def test_quantization_is_asked_for(engine):
    assert run("generate", "-p", "a", "--quantization", "int4", "--max-tokens", "1") == 0
    assert engine.quantization == "int4"
    assert run("chat", "--prompt", "hi", "--quantization", "int8", "--max-tokens", "1") == 0
    assert engine.quantization == "int8"


def test_an_unknown_quantization_is_refused_before_a_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(common, "load", lambda **loading: pytest.fail("loaded"))
    assert run("generate", "-p", "a", "--quantization", "int5") == 2
    assert "quantization must be one of int4, int8, fp8" in capsys.readouterr().err


def test_prompts_from_standard_input(engine, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"prompt": "from stdin"}\n'))
    assert run("generate", "-f", "-", "--max-tokens", "1", "--json", "-q") == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "from stdin"


def test_one_bad_request_leaves_the_others_alone(engine, capsys):
    assert run("generate", "-p", "ok", "-p", "huge", "-p", "fail", "--json", "-q", "--max-tokens", "2") == 1
    rows = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert rows[0]["text"] == " w1 w2"
    assert "too many tokens" in rows[1]["error"] and "it broke" in rows[2]["error"]


def test_progress_goes_to_stderr(engine, capsys):
    assert run("generate", "-p", "a", "-p", "b", "--max-tokens", "1") == 0
    captured = capsys.readouterr()
    assert "2/2" in captured.err and "2/2" not in captured.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "give --prompt or --file"),
        (["generate", "-f", "/no/such/file"], "/no/such/file: No such file"),
        (["generate", "-p", "x", "--temperature", "-1"], "temperature"),
        (["generate", "-p", "x", "--max-tokens", "0"], "max_tokens"),
        (["generate", "-p", "x", "--regex", "a", "--choice", "b"], "it has regex and choice"),
        (["generate", "-p", "x", "--json-schema", "/no/such/schema"], "/no/such/schema: No such file"),
        (["generate", "-p", "x", "--dtype", "int3"], "--dtype must be one of"),
        (["generate", "-p", "x", "--no-such-option"], "No such option"),
        (["chat", "--temperature", "-1"], "temperature"),
        (["nonsense"], "No such command"),
    ],
)
def test_bad_input_is_one_line_and_status_2(engine, capsys, arguments, message):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    if error.startswith("hf-paged:"):
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    "line", ["not json", "[1]", "{}", '{"prompt": 3}', '{"prompt": "a", "messages": []}', '{"prompt": "a", "tmp": 1}']
)
def test_a_bad_line_is_named(engine, tmp_path, capsys, line):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line)
    assert run("generate", "-f", str(file), "-q") == 2
    assert "2:" in capsys.readouterr().err.replace("prompt 2", "2:").replace("line 2", "2:")
    assert engine.prompts == []


def test_chat_one_shot(engine, capsys):
    assert run("chat", "--prompt", "hi", "--system", "be brief", "--max-tokens", "2") == 0
    assert capsys.readouterr().out == " w1 w2\n"
    assert engine.prompts == [["system:be", "brief", "user:hi"]]


def test_chat_keeps_and_resets_the_conversation(engine, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n/reset\n/what\nthree\n/exit\nnever\n"))
    assert run("chat", "--max-tokens", "1") == 0
    assert [" ".join(prompt) for prompt in engine.prompts] == [
        "user:one",
        "user:one assistant: w1 user:two",
        "user:three",
    ]
    assert "unknown command /what" in capsys.readouterr().out


def test_interrupt_stops_the_answer_not_the_chat(engine, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    steps = []

    def interrupt():
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    engine.on_step = interrupt
    assert run("chat", "--max-tokens", "5") == 0
    assert engine.aborted == ["0"]
    assert " ".join(engine.prompts[1]) == "user:one assistant: w1 w2 user:two"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_chat_survives_a_failed_turn(engine, monkeypatch, capsys):
    monkeypatch.setattr(chat, "chat_prompt", lambda engine, tokenizer, messages: messages[-1]["content"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("huge\nfail\nfine\n"))
    assert run("chat", "--max-tokens", "1") == 0
    out = capsys.readouterr().out
    assert "too many tokens" in out and "it broke" in out and out.rstrip().endswith("w1")


def test_a_model_without_template_is_refused():
    with pytest.raises(common.UserError, match="no chat template"):
        common.chat_prompt(SimpleNamespace(processor=None), SimpleNamespace(chat_template=None), [])


def test_guard_lets_bugs_through():
    with pytest.raises(KeyError), common.guard():
        raise KeyError("a bug")
    with pytest.raises(ValueError), common.guard(debug=True):
        raise ValueError("shown whole")


def test_help_is_quick_and_light():
    code = (
        "import sys\nfrom hf_paged.cli import main\ntry:\n    main(['--help'])\nfinally:\n"
        "    print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.strip() == "[]"
    for command in ("generate", "chat", "explain", "demo", "bench"):
        assert command in done.stdout


class TestRanksOfMpi:
    def test_get_what_torchrun_sets(self):
        environment = dict(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_LOCAL_RANK="0", MASTER_ADDR="a", MASTER_PORT="1")
        ranks.adopt_mpi(environment)
        assert (environment["WORLD_SIZE"], environment["RANK"], environment["LOCAL_RANK"]) == ("2", "1", "0")

    def test_have_to_know_where_to_meet(self):
        with pytest.raises(ValueError, match="set MASTER_ADDR and MASTER_PORT"):
            ranks.adopt_mpi(dict(PMI_SIZE="2", PMI_RANK="0"))

    @pytest.mark.parametrize("size", [{}, {"PMI_SIZE": "1", "PMI_RANK": "0"}, {"WORLD_SIZE": "3", "OMPI_COMM_WORLD_SIZE": "2"}])
    def test_alone_or_started_by_torchrun(self, size, capsys):
        environment = dict(size)
        ranks.adopt_mpi(environment)
        assert environment == size and capsys.readouterr().err == ""

    def test_what_accelerate_does_not_start(self, capsys):
        ranks.adopt_mpi(dict(ACCELERATE_USE_CPU="True", MASTER_ADDR="127.0.0.1"))
        assert "this process is alone" in capsys.readouterr().err
