"""Deploys ray.serve.llm's OpenAI application on a Ray of its own; stays until it is ended.

Run by `targets.RayServeLLM`: the dashboard port and a folder as arguments, what to serve as one
line of JSON on stdin. Its Ray takes no port that another Ray on this machine uses by default.
"""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app

from deployments.local import free_port

START_TIMEOUT_S = 60


def start_ray(dashboard_port: str, folder: Path) -> str:
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block",
        "--node-ip-address=127.0.0.1", f"--port={port}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}",
        f"--dashboard-agent-listen-port={free_port()}",
        f"--dashboard-agent-grpc-port={free_port()}",
        f"--metrics-export-port={free_port()}", f"--runtime-env-agent-port={free_port()}",
        "--num-cpus=4", f"--object-store-memory={100 * 2**20}", f"--temp-dir={folder / 'ray'}",
    ]  # fmt: skip
    subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return f"127.0.0.1:{port}"


def connect(address: str) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            ray.init(address, logging_level="ERROR", log_to_driver=True)
            return
        except (ConnectionError, RuntimeError):
            if time.monotonic() > end:
                raise
            time.sleep(1)


def main() -> None:
    wanted = json.loads(sys.stdin.readline())
    connect(start_ray(sys.argv[1], Path(sys.argv[2])))
    from vllm import AsyncEngineArgs

    # Arguments of vLLM's HTTP server mean nothing here: ray.serve.llm has its own.
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)} - {
        "model", "served_model_name",
    }  # fmt: skip
    model = LLMConfig(
        model_loading_config={"model_id": wanted["name"], "model_source": wanted["model"]},
        accelerator_config={"kind": "cpu"},
        engine_kwargs={k: v for k, v in wanted["vllm_args"].items() if k in known},
    )
    serve.start(http_options={"host": wanted["host"], "port": wanted["port"]})
    serve.run(build_openai_app({"llm_configs": [model]}), name="llm", route_prefix="/")
    sys.stdin.read()


if __name__ == "__main__":
    main()
