"""The server of a model on two ranks: answers, and what a client hears when a rank dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank_of(pid: int) -> str | None:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((variable[5:].decode() for variable in variables if variable.startswith(b"RANK=")), None)


def error_of(client: openai.OpenAI, model: str) -> int | str:
    """The status that ends a long request that does not stream."""
    try:
        client.completions.create(model=model, prompt="a tent", max_tokens=8000, temperature=0, extra_body={"ignore_eos": True})
    except openai.APIStatusError as error:
        return error.status_code
    return "it was answered"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
def test_a_rank_that_dies(tmp_path):
    tiny_model("llama", vocab_size=300, max_position_embeddings=8192).save_pretrained(tmp_path)
    tiny_tokenizer(300).save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "hf_paged", "serve", str(tmp_path), "--port", str(port)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    with log.open("w") as output:
        launcher = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert launcher.poll() is None, log.read_text()
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        model = client.models.list().data[0].id
        answer = client.completions.create(model=model, prompt="the rain", max_tokens=8, temperature=0)
        assert answer.usage.completion_tokens == 8
        ended = []
        waiting = threading.Thread(target=lambda: ended.append(error_of(client, model)))
        waiting.start()
        stream = client.completions.create(
            model=model, prompt="a hat", max_tokens=8000, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        ranks = children(launcher.pid)
        [follower] = [pid for pid in ranks if rank_of(pid) == "1"]
        with pytest.raises(openai.APIError, match="going down"):
            for place, _ in enumerate(stream):
                if place == 3:
                    os.kill(follower, signal.SIGKILL)
        waiting.join(60)
        assert ended == [503], ended
        launcher.wait(60)
        assert launcher.returncode != 0
        assert "hf-paged (rank 0): a rank has died" in log.read_text()
        assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", port))  # raises if something still listens there
    finally:
        launcher.kill()
        launcher.wait()
