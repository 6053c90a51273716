"""A Ray cluster of its own with replicas of a checkpoint, until stdin ends: `ray_cluster.py CHECKPOINT`.

Prints one line of JSON: the address of two replicas (behind the key "secret"), and that of one on two ranks.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import tempfile

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}

import ray  # noqa: E402
from ray import serve  # noqa: E402

from hf_paged.integrations.ray_serve import build_app  # noqa: E402


def main(checkpoint: str) -> None:
    folder = tempfile.mkdtemp(prefix="ray")  # Ray's sockets lie in it: it must be short
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        ray.init(
            "local", num_cpus=8, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False, _temp_dir=folder
        )
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        same = {"dtype": "float32", "engine": {"max_num_seqs": 8}, "health_check_period": 1.0}
        server = {"model_name": "tiny", "api_keys": ["secret"]}
        two = build_app(checkpoint, num_replicas=2, server=server, **same)
        team = build_app(checkpoint, tensor_parallel_size=2, server={"model_name": "tiny"}, **same)
        serve.run_many([serve.RunTarget(two, "two", "/"), serve.RunTarget(team, "team", "/team")])
        print(json.dumps({"two": f"http://127.0.0.1:{port}", "team": f"http://127.0.0.1:{port}/team"}), flush=True)
        sys.stdin.read()
        serve.shutdown()
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
