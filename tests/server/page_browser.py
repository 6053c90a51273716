"""The chat page in headless Chromium, against `hf-paged serve` with the embedded model: `make test-page`.

It needs playwright and a Chromium (CHROMIUM names one), and runs apart from the other tests, in an environment of its
own, where HF_PAGED_PYTHON names the interpreter that serves. SCREENSHOTS names a folder for pictures of what was
tested.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

KEY = "a-key"
PATIENCE = 120_000  # milliseconds for a whole answer, on slow machines
PROBES = (
    "<img src=x onerror=\"document.title='harm'\"><script>document.title='harm'</script>",
    "<svg/onload=document.title='harm'> [link](javascript:document.title='harm')",
    "```html\n<iframe srcdoc=\"<script>parent.document.title='harm'</script>\"></iframe>\n```",
)


@contextlib.contextmanager
def served(*options: str):
    """The address of a server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    python = os.environ.get("HF_PAGED_PYTHON", "python")
    process = subprocess.Popen([python, "-m", "hf_paged", "serve", "--port", str(port), *options])
    try:
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 300
        while time.monotonic() < until:
            assert process.poll() is None, "the server has ended"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health")
                break
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def url():
    with served() as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    installed = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    own = os.environ.get("CHROMIUM") or next(filter(None, installed), None)  # None: playwright's
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=own, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, request):
    """A page that no test may leave with an error of its scripts, and that asks nobody but its server."""
    context = browser.new_context(viewport={"width": 1100, "height": 760})
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    wrong, hosts = [], set()
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
    page.on("request", lambda asked: hosts.add(re.match(r"\w+:(//[^/:]+)?", asked.url).group()))
    yield page
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder, f"{request.node.name}.png"))
    assert not wrong and hosts <= {"http://127.0.0.1", "data:"}
    context.close()


FIELDS = {"system": "System prompt", "temperature": "Temperature", "most": "Most tokens"}


def settle(page: Page, **values: str) -> None:
    page.get_by_role("button", name="Settings").click()
    for field, value in values.items():
        page.get_by_label(FIELDS[field]).fill(value)
    page.get_by_role("button", name="Settings").click()


def say(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answered(page: Page, count: int) -> str:
    """The text of the last of `count` answers, when it is whole."""
    answers = page.locator("article.assistant")
    expect(answers).to_have_count(count, timeout=PATIENCE)
    expect(answers.last).to_have_attribute("aria-busy", "false", timeout=PATIENCE)
    return answers.last.locator(".text").inner_text()


def events(*texts: str, **delta: str) -> str:
    """A stream as the server sends it."""
    chunks = [{"choices": [{"index": 0, "delta": delta or {}, "finish_reason": None}]}]
    chunks += [{"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def answer_with(page: Page, body: str) -> None:
    """Instead of the server."""
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))


def greedy(url: str, question: str, most: int) -> str:
    """What any client gets; the page shows list markers and the like as what they mean."""
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": most}
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(asked) as response:
        text = json.load(response)["choices"][0]["message"]["content"]
    return re.sub(r"^\s*(\d+\.|[-*]) |\*\*", "", text, flags=re.MULTILINE)


def running(url: str) -> float:
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    return float(re.search(r"^hf_paged_requests_running\{.*\} (.*)$", text, re.MULTILINE).group(1))


def test_a_conversation(page, url):
    page.goto(url)
    expect(page.locator("#model")).to_have_text("SmolLM2-135M-Instruct")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    settle(page, temperature="0", most="24")
    question = "Name five rivers and where they flow."
    say(page, question)
    assert answered(page, 1).split() == greedy(url, question, 24).split()
    foot = page.locator(".foot").last
    expect(foot).to_contain_text(re.compile(r"first token \d+\.\d\d s · \d+\.\d tokens/s · \d+ tokens"))
    say(page, "Which is the longest?")
    answered(page, 2)
    with page.expect_request("**/v1/chat/completions") as asked:
        page.get_by_role("button", name="Answer again").click()
    assert [message["role"] for message in asked.value.post_data_json["messages"]] == ["user", "assistant", "user"]
    answered(page, 2)
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("article")).to_have_count(0)
    expect(page.get_by_role("heading", level=2, name="Ask")).to_be_visible()


def test_the_answer_grows_while_it_comes_and_stop_stops_the_engine(page, url):
    page.goto(url)
    settle(page, temperature="0")
    say(page, "Write a long story about a lighthouse keeper, with many details.")
    text, seen = page.locator("article.assistant .text"), set()
    while len(seen) < 4:
        seen.add(text.inner_text())
    assert running(url) == 1
    page.keyboard.press("Escape")
    expect(page.locator(".foot")).to_contain_text("stopped")
    until = time.monotonic() + 10
    while running(url) and time.monotonic() < until:
        time.sleep(0.05)
    assert running(url) == 0
    stopped = answered(page, 1)
    assert stopped and page.get_by_role("button", name="Send").is_visible()
    settle(page, most="4")
    say(page, "Go on.")
    assert answered(page, 2)
    expect(page.locator(".foot").last).to_contain_text("cut off at the most tokens")


def test_the_system_prompt_and_the_settings_are_sent_and_kept(page, url):
    page.goto(url)
    settle(page, system="Answer in French.", temperature="0.5", most="3")
    page.reload()
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "Hello")
    body = asked.value.post_data_json
    assert [message["content"] for message in body["messages"]] == ["Answer in French.", "Hello"]
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert (body["temperature"], body["max_tokens"], body["stream"]) == (0.5, 3, True)
    answered(page, 1)


def test_errors_can_be_read_and_mended(page, url):
    page.goto(url)
    settle(page, most="4")
    say(page, "word " * 9000)
    error = page.get_by_role("alert")
    expect(error).to_contain_text("8192", timeout=PATIENCE)
    expect(page.locator("article.assistant")).to_have_count(0)
    say(page, "short")
    answered(page, 1)
    expect(page.locator("article.unsent")).to_have_count(1)
    page.route("**/v1/chat/completions", lambda route: route.abort())
    say(page, "anybody there?")
    expect(error).to_contain_text("cannot be reached")
    page.unroute("**/v1/chat/completions")
    error.get_by_role("button", name="Try again").click()
    answered(page, 2)
    expect(error).to_have_count(0)
    settle(page, temperature="7")
    say(page, "too warm")
    expect(error).to_contain_text("Temperature")


def test_a_stream_that_breaks_off_or_fails_is_told(page, url):
    page.goto(url)
    broken = events("half").replace("data: [DONE]\n\n", "")
    failed = broken + 'data: {"error": {"message": "no room"}}\n\n'
    for body, message in ((broken, "connection was lost"), (failed, "no room")):
        answer_with(page, body)
        say(page, "hello")
        expect(page.get_by_role("alert")).to_contain_text(message)
        expect(page.locator("article.assistant").last).to_contain_text("half")


@pytest.mark.parametrize("probe", PROBES, ids=["handler", "svg", "frame"])
def test_what_a_model_says_does_no_harm(page, url, probe):
    page.goto(url)
    body = events(probe[:20], probe[20:], reasoning_content=probe)
    answer_with(page, body)
    say(page, probe)
    shown = answered(page, 1)
    assert re.sub(r"^```html\n|\n```$|\*", "", probe) in shown.replace("Copy", "").strip()
    page.get_by_text("Reasoning").click()
    expect(page.locator("details.reasoning div")).to_have_text(probe)
    time.sleep(0.3)
    assert page.title() == "SmolLM2-135M-Instruct · hf_paged"
    assert page.locator("img, iframe, a:not(.skip), script:not(body > script)").count() == 0


def test_reasoning_is_folded_and_text_has_its_form(page, url):
    page.goto(url)
    text = "# Title\n\nSome **bold** and `code`.\n\n1. one\n2. two\n\n- a\n- b\n\n```python\nprint(1)\n```\n> said\n"
    body = events(text, reasoning_content="Let me think.")
    answer_with(page, body)
    say(page, "hello")
    answered(page, 1)
    answer = page.locator("article.assistant")
    expect(answer.locator("details div")).to_be_hidden()
    answer.locator("summary").click()
    expect(answer.locator("details div")).to_have_text("Let me think.")
    shown = {"h3": "Title", "strong": "bold", "p code": "code", "pre code": "print(1)", "blockquote": "said"}
    for selector, content in shown.items():
        expect(answer.locator(selector)).to_have_text(content)
    expect(answer.locator("ol li")).to_have_text(["one", "two"])
    expect(answer.locator("ul li")).to_have_text(["a", "b"])


def test_a_key_is_asked_for_and_kept_for_the_tab(page):
    with served("--api-key", KEY) as url:
        page.goto(url)
        field = page.get_by_label("API key")
        expect(field).to_be_focused()
        field.fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_text("does not know this key")).to_be_visible()
        field.fill(KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("SmolLM2-135M-Instruct")
        page.get_by_label("Most tokens").fill("4")
        page.reload()
        expect(page.locator("#model")).to_have_text("SmolLM2-135M-Instruct")
        say(page, "Hello")
        answered(page, 1)
        assert KEY not in json.dumps(page.context.storage_state())  # neither cookies nor what outlives the tab


def test_keyboard_and_names(page, url):
    """All that can be used has a name, and can be reached by the Tab key."""
    page.goto(url)
    page.get_by_role("button", name="Settings").click()
    reached = set()
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.add(page.locator(":focus").first.get_attribute("id") if page.locator(":focus").count() else None)
    assert reached >= {"new", "options", "system", "temperature", "max-tokens", "prompt"}
    for role in ("button", "textbox", "spinbutton", "combobox"):
        for element in page.get_by_role(role).all():
            label = element.evaluate("e => e.ariaLabel || e.textContent.trim() || e.labels?.[0]?.textContent")
            assert label
    page.keyboard.press("Escape")
    expect(page.locator("#panel")).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_shows_everything(browser, url, scheme):
    page = browser.new_page(viewport={"width": 320, "height": 560}, color_scheme=scheme)
    page.goto(url)
    body = events("a_very_long_word_" * 30 + "\n\n```\n" + "wide " * 60 + "\n```")
    answer_with(page, body)
    say(page, "hello " * 20)
    answered(page, 1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    page.get_by_role("button", name="Settings").click()
    for name in ("Send", "New", "Settings"):
        expect(page.get_by_role("button", name=name)).to_be_in_viewport()
    page.close()
