"""What Ray Serve costs a request, and what routing by prefix gains, on this machine.

    python benchmarks/run.py parallel.replicas [MODEL]

asks one replica on Ray and `hf-paged serve` in turns, one request at a time: seconds to an answer of one token, and from token to
token of a stream. Then two replicas get prompts with 8 beginnings, with routing by prefix and with Ray's own: the share
of prompt tokens that they find in their caches. Rows go to benchmarks/results/replicas.csv. (How much more two replicas
answer than one is not measured: it takes a machine with room for both.)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import socket
import time

import httpx
from tqdm import tqdm

from hf_paged.benchmarks.schema import Measure, describe_machine, quantile, replace_rows, results_folder
from hf_paged.benchmarks.server.process import Server

PLAIN, RAY, PREFIX, OWN = "hf-paged serve", "Ray Serve", "by prefix", "Ray's own"
BEGINNINGS, QUESTIONS, WORDS = 8, 8, 150
STREAMED = 33  # tokens
CHAT = "/v1/chat/completions"


def latencies(urls: dict[str, str], rounds: int) -> dict[tuple[str, str], list[float]]:
    """(system, metric) -> seconds, one for each round; the systems take turns."""
    found: dict[tuple[str, str], list[float]] = {}
    with httpx.Client(timeout=120) as client:
        for number in tqdm(range(rounds + 2), desc="latency"):
            for system, url in urls.items():
                body = {"messages": [{"role": "user", "content": f"{number}: name a river."}], "temperature": 0}
                begun = time.perf_counter()
                client.post(url + CHAT, json=body | {"max_tokens": 1}).raise_for_status()
                first = time.perf_counter() - begun
                gap = streamed(client, url, body)
                if number >= 2:  # before that, paths are warmed up
                    found.setdefault((system, "one token"), []).append(first)
                    found.setdefault((system, "between tokens"), []).append(gap)
    return found


def streamed(client: httpx.Client, url: str, body: dict) -> float:
    """Seconds from token to token."""
    times = []
    body = body | {"max_tokens": STREAMED, "ignore_eos": True, "stream": True}
    with client.stream("POST", url + CHAT, json=body) as answer:
        for line in answer.iter_lines():
            if '"content":' in line:
                times.append(time.perf_counter())
    return (times[-1] - times[0]) / (STREAMED - 1)


def cached_share(url: str, seed: int) -> tuple[float, int]:
    """Of the prompt tokens, those found cached; and how many replicas answered. Questions come in random order."""
    draw = random.Random(seed)
    words = "river hill stone cloud north winter bridge garden letter paper window silver".split()
    beginnings = [" ".join(draw.choices(words, k=WORDS)) for _ in range(BEGINNINGS)]
    asked = [(topic, question) for topic in range(BEGINNINGS) for question in range(QUESTIONS)]
    draw.shuffle(asked)
    prompt = cached = 0
    replicas = set()
    with httpx.Client(timeout=120) as client:
        for topic, question in tqdm(asked, desc="prefixes"):
            messages = [{"role": "system", "content": beginnings[topic]}, {"role": "user", "content": f"Question {question}"}]
            answer = client.post(url + CHAT, json={"messages": messages, "max_tokens": 1, "temperature": 0}).raise_for_status()
            usage = answer.json()["usage"]
            prompt += usage["prompt_tokens"]
            cached += usage["prompt_tokens_details"]["cached_tokens"]
            replicas.add(answer.headers["x-replica"])
    return cached / prompt, len(replicas)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    import ray
    from ray import serve

    from hf_paged.integrations.ray_serve import build_app

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    ray.init("local", num_cpus=8, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    measures, name = [], arguments.model or "SmolLM2-135M-Instruct"
    same = {"benchmark": "replicas", "model": name, "dtype": "float32"}
    loading = {"dtype": "float32", "server": {"model_name": name}}
    try:
        serve.run(build_app(arguments.model, **loading), name="one")
        with contextlib.closing(Server(arguments.model, "--dtype", "float32", "--threads", "1")) as plain:
            found = latencies({PLAIN: f"http://127.0.0.1:{plain.port}", RAY: url}, arguments.rounds)
        serve.delete("one")
        for (system, metric), samples in found.items():
            measures.append(Measure(workload="one client", system=system, metric=metric, unit="s", samples=samples, **same))
        for system, routing in ((PREFIX, True), (OWN, False)):
            serve.run(build_app(arguments.model, num_replicas=2, prefix_routing=routing, **loading), name="two")
            shares = [cached_share(url, seed) for seed in (1, 2)]
            detail = {"beginnings": BEGINNINGS, "questions": QUESTIONS, "replicas": [number for _, number in shares]}
            samples = [share for share, _ in shares]
            measures.append(Measure(workload="8 prefixes", system=system, metric="cached", unit="ratio", samples=samples, detail=detail, **same))
            serve.delete("two")
    finally:
        serve.shutdown()
        ray.shutdown()
    for measure in measures:
        print(measure.workload, measure.system, measure.metric, f"{quantile(measure.samples, 0.5):.5f} {measure.unit}", json.dumps(measure.detail))
    replace_rows(results_folder() / "replicas.csv", measures, describe_machine("cpu", 1))


if __name__ == "__main__":
    main()
