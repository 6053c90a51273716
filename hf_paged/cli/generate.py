"""`hf-paged generate`: many prompts at once, answers in order."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from .common import UserError, chat_prompt, follow_rank_0, one_line, open_engine


def run_generate(
    prompts: list[str],
    file: Path | None,
    images: list[Path],
    chat: bool,
    sampling: dict,
    json_lines: bool,
    loading: dict,
) -> int:
    """Read, generate, print. `images` are beside every prompt. Returns 1 if any request failed, else 0."""
    from hf_paged.base.sampling_params import SamplingParams

    follow_rank_0(**loading)
    entries = [{"prompt": prompt} for prompt in prompts]
    if file is not None:
        entries += read_entries(file)
    if not entries:
        raise UserError("nothing to generate from: give --prompt or --file")
    params = [make_params(SamplingParams, entry, sampling, place) for place, entry in enumerate(entries, 1)]
    encoded = [image.read_bytes() for image in images]
    with open_engine(**loading) as (_, tokenizer, engine):
        inputs = [to_input(engine, tokenizer, entry, chat, encoded) for entry in entries]
        results = run_all(engine, inputs, params, progress=loading["progress"])
    for place, (entry, result) in enumerate(zip(entries, results, strict=True)):
        print(as_json(place, entry, result) if json_lines else as_text(place, entry, result, alone=len(entries) == 1))
    return int(any(isinstance(result, Exception) for result in results))


def run_all(engine, inputs: list, params: list, *, progress: bool) -> list:
    """Each input's RequestOutput, or the exception that refused or ended it. One bad input leaves the rest alone.

    Args:
        inputs: keyword arguments of `engine.add`.
    """
    from tqdm import tqdm

    results: list = [None] * len(inputs)
    places, tokens, guessed, right = {}, 0, 0, 0
    with tqdm(total=len(inputs), unit="request", disable=not progress, file=sys.stderr) as bar:
        for place, (given, sampling) in enumerate(zip(inputs, params, strict=True)):
            try:
                places[engine.add(params=sampling, **given)] = place
            except ValueError as error:  # refused by name: too long, say
                results[place] = error
                bar.update()
        while engine.has_unfinished():
            for output in engine.step():
                if output.finished:
                    results[places[output.request_id]] = output.error or output
                    tokens += sum(len(completion.token_ids) for completion in output.outputs)
                    guessed += output.metrics.num_draft_tokens
                    right += output.metrics.num_accepted_tokens
                    rate = {"guesses_right": f"{right / guessed:.0%}"} if guessed else {}
                    bar.set_postfix(tokens=tokens, **rate, refresh=False)
                    bar.update()
    return results


def read_entries(file: Path) -> list[dict]:
    """One dict with "prompt" or "messages" per line that is not empty."""
    if str(file) == "-":
        text, name = sys.stdin.read(), "standard input"
    else:
        text, name = file.read_text(encoding="utf-8"), str(file)
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise UserError(f"{name} holds no prompts")
    as_objects = file.suffix == ".jsonl" or (str(file) == "-" and lines[0][1].lstrip().startswith("{"))
    if not as_objects:
        return [{"prompt": line} for _, line in lines]
    return [_parse(line, f"{name}, line {number}") for number, line in lines]


def _parse(line: str, where: str) -> dict:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg})") from None
    if not isinstance(entry, dict) or ("prompt" in entry) == ("messages" in entry):
        raise UserError(f'{where}: expected an object with either "prompt" or "messages"')
    if not isinstance(entry.get("prompt", ""), str) or not isinstance(entry.get("messages", []), list):
        raise UserError(f'{where}: "prompt" must be a string, "messages" a list')
    return entry


def make_params(cls, entry: dict, sampling: dict, place: int):
    """Sampling parameters of one entry: the command's, overridden by the entry's own fields."""
    own = {name: value for name, value in entry.items() if name not in ("prompt", "messages", "id")}
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(own) - known)
    if unknown:
        raise UserError(f"prompt {place}: {unknown[0]} is not a sampling parameter; known: {', '.join(sorted(known))}")
    try:
        return cls(**(sampling | own))
    except (TypeError, ValueError) as error:
        raise UserError(f"prompt {place}: {one_line(error)}") from error


def to_input(engine, tokenizer, entry: dict, chat: bool, images: list[bytes]) -> dict:
    """Keyword arguments of `engine.add`. In a chat the images come before what is said of them."""
    more = {"images": images} if images else {}
    if "messages" not in entry and not chat:
        return {"prompt": entry["prompt"], **more}
    messages = entry.get("messages")
    if messages is None:
        said = {"type": "text", "text": entry["prompt"]}
        messages = [{"role": "user", "content": [*({"type": "image"} for _ in images), said] if images else entry["prompt"]}]
    return {"prompt": chat_prompt(engine, tokenizer, messages), **more}


def as_text(place: int, entry: dict, result, *, alone: bool) -> str:
    if isinstance(result, Exception):
        body = f"error: {one_line(result)}"
    else:
        body = "\n".join(completion.text for completion in result.outputs)
    if alone:
        return body
    asked = entry.get("prompt") or entry["messages"][-1].get("content", "")
    return f"[{place}] {_short(asked)}\n{body}\n"


def as_json(place: int, entry: dict, result) -> str:
    row: dict = {"index": place}
    row |= {name: entry[name] for name in ("id", "prompt", "messages") if name in entry}
    if isinstance(result, Exception):
        return json.dumps(row | {"error": one_line(result)}, ensure_ascii=False)
    first = result.outputs[0]
    row |= {"text": first.text, "finish_reason": first.finish_reason}
    if len(result.outputs) > 1:
        row["texts"] = [completion.text for completion in result.outputs]
    row["prompt_tokens"] = len(result.prompt_token_ids)
    row["completion_tokens"] = sum(len(completion.token_ids) for completion in result.outputs)
    if result.metrics.num_draft_tokens:
        row["draft_tokens"] = result.metrics.num_draft_tokens
        row["accepted_tokens"] = result.metrics.num_accepted_tokens
    return json.dumps(row, ensure_ascii=False)


def _short(text: object, width: int = 100) -> str:
    flat = " ".join(str(text).split())
    return flat if len(flat) <= width else flat[: width - 3] + "..."
