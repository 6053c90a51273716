"""The benchmarks' own arithmetic: quantiles, CSV rows, slices of a workload, padded batches."""

from __future__ import annotations

import csv

import pytest

from hf_paged.benchmarks import schema
from hf_paged.benchmarks.engine import workload

MACHINE = schema.Machine(
    date="d", commit="c", device="cpu", cpu="x", threads=1, python="3", torch="2", transformers="5", hf_paged="0"
)


class Tokenizer:
    def __call__(self, text, **options):
        return type("Encoding", (), {"input_ids": [len(word) for word in text.split()]})


def measure(**changes):
    base = {"benchmark": "b", "workload": "w", "system": "s", "metric": "m", "unit": "u", "samples": [3.0, 1.0, 2.0]}
    return schema.Measure(**(base | changes))


def test_quantile_interpolates():
    assert schema.quantile([4, 1, 2, 3], 0.5) == 2.5
    assert schema.quantile([7], 0.8) == 7
    assert schema.quantile([0, 10], 0.2) == 2


def test_rows_append_below_one_header(tmp_path):
    path = tmp_path / "results" / "engine.csv"
    schema.append_rows(path, [measure(detail={"seed": 1})], MACHINE)
    schema.append_rows(path, [measure(baseline="stock")], MACHINE)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == schema.COLUMNS
    assert [row["p50"] for row in rows] == ["2", "2"]
    assert rows[0]["detail"] == '{"seed": 1}' and rows[1]["baseline"] == "stock"


def test_rows_replace_those_of_the_same_workload(tmp_path):
    path = tmp_path / "results" / "offload.csv"
    schema.replace_rows(path, [measure(), measure(workload="other"), measure(model="large")], MACHINE)
    schema.replace_rows(path, [measure(samples=[7.0]), measure(system="second", samples=[8.0])], MACHINE)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["workload"], row["model"], row["p50"]) for row in rows] == [
        ("other", "", "2"),
        ("w", "large", "2"),
        ("w", "", "7"),
        ("w", "", "8"),
    ]
    assert list(path.parent.iterdir()) == [path]


def test_a_file_with_other_columns_is_left_alone(tmp_path):
    path = tmp_path / "engine.csv"
    path.write_text("a,b\n1,2\n")
    for write in (schema.append_rows, schema.replace_rows):
        with pytest.raises(ValueError, match="other columns"):
            write(path, [measure()], MACHINE)
    assert path.read_text() == "a,b\n1,2\n"


def test_workloads_have_the_lengths_they_promise():
    mixed, shared = workload.mixed(Tokenizer()), workload.shared(Tokenizer())
    assert len(mixed.requests) == 64 and len(shared.requests) == 32
    assert all(16 <= len(r.prompt) <= 512 and 16 <= r.max_new_tokens <= 128 for r in mixed.requests)
    assert len({r.prompt[:384] for r in shared.requests}) == 1
    assert all(16 <= len(r.prompt) - 384 <= 48 and r.max_new_tokens == 32 for r in shared.requests)
    assert mixed.fingerprint() == workload.mixed(Tokenizer()).fingerprint()
    assert mixed.fingerprint() != workload.mixed(Tokenizer(), seed=1).fingerprint()


@pytest.mark.parametrize(("parts", "size"), [(4, 16), (1, 64), (2, 8), (3, 5)])
def test_slices_never_repeat_and_mix_lengths(parts, size):
    mixed = workload.mixed(Tokenizer())
    dealt = workload.slices(mixed, parts, size)
    chosen = [index for part in dealt for index in part]
    assert [len(part) for part in dealt] == [size] * parts
    assert len(set(chosen)) == len(chosen)
    if size >= 8:
        means = [sum(mixed.requests[i].max_new_tokens for i in part) / size for part in dealt]
        assert max(means) < 1.5 * min(means)


def test_conversations_grow_by_turns():
    requests = workload.chat(Tokenizer()).requests
    assert len(requests) == 32 and len({request.prompt[:96] for request in requests}) == 1
    for first, second in zip(requests, requests[8:]):
        assert second.prompt[: len(first.prompt)] == first.prompt and len(second.prompt) >= len(first.prompt) + 48 + 16
    assert len(workload.chat(Tokenizer(), count=5).requests) == 5


def test_long_prompts_are_long():
    assert all(1024 <= len(request.prompt) <= 1792 for request in workload.long(Tokenizer()).requests)


def test_requests_come_from_a_trace(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "one three", "output_tokens": 4}\n\n{"prompt": [5, 6], "output_tokens": 2}\n'
                    '{"prompt_tokens": 30, "output_tokens": 7}\n')  # fmt: skip
    work = workload.from_trace(path, Tokenizer())
    assert work.name == "mine" and [request.max_new_tokens for request in work.requests] == [4, 2, 7]
    assert [request.prompt for request in work.requests[:2]] == [(3, 5), (5, 6)] and len(work.requests[2].prompt) == 30
    assert work == workload.from_trace(path, Tokenizer()) != workload.from_trace(path, Tokenizer(), seed=1)
    assert workload.from_trace(path, Tokenizer(), count=1).requests == work.requests[:1]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: "),
        ("[1]", "line 2: must be an object, got list"),
        ('{"output_tokens": 2}', "line 2: needs prompt or prompt_tokens"),
        ('{"prompt": "a", "prompt_tokens": 2, "output_tokens": 2}', "line 2: needs prompt or prompt_tokens, and not both"),
        ('{"prompt": "a"}', "line 2: output_tokens must be a positive integer, got None"),
        ('{"prompt": "a", "output_tokens": 0}', "line 2: output_tokens must be a positive integer, got 0"),
        ('{"prompt": "a", "output_tokens": 1.5}', "line 2: output_tokens must be"),
        ('{"prompt_tokens": true, "output_tokens": 1}', "line 2: prompt_tokens must be"),
        ('{"prompt_tokens": 1000000000, "output_tokens": 1}', "line 2: prompt_tokens must be below"),
        ('{"prompt": "", "output_tokens": 1}', "line 2: prompt must be text or a list of token ids"),
        ('{"prompt": [1, -1], "output_tokens": 1}', "line 2: prompt must be text"),
        ('{"prompt": {}, "output_tokens": 1}', "line 2: prompt must be text"),
        ('{"prompt": "a", "output_tokens": 1, "temperature": 2}', "line 2: no field 'temperature'"),
    ],
)
def test_a_trace_names_the_line_that_is_wrong(line, words, tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"prompt": "a", "output_tokens": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=words):
        workload.from_trace(path, Tokenizer())


def test_a_trace_that_is_not_there_or_empty(tmp_path):
    with pytest.raises(ValueError, match="nowhere.jsonl cannot be read"):
        workload.from_trace(tmp_path / "nowhere.jsonl", Tokenizer())
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="empty.jsonl has no requests"):
        workload.from_trace(tmp_path / "empty.jsonl", Tokenizer())
