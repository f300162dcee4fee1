"""A batch and a fine-tune, with their files in S3, when the node that they run on is lost."""

import contextlib
import json
import os
import signal
from typing import Any

import httpx
import psutil
import pytest

from llm_engine.config import ENV_STORAGE
from tests.support.cluster import command, eventually
from tests.support.fine_tunes import example, jsonl
from tests.support.nodes import Nodes
from tests.support.s3 import MotoServer

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(590)]

ROWS = 4500
MODEL = {"name": "fake", "model": "none", "engine": "fake", "num_cpus": 0.1,
         "vllm_args": {"token_delay_s": 0.4, "max_num_seqs": 64}}  # fmt: skip
EXAMPLES, BATCH, EPOCHS = 120, 4, 4
STEPS = EXAMPLES // BATCH * EPOCHS
#: It is trained upon for real, and served by nobody: this is about the jobs.
BASE = {"name": "demo", "model": "builtin:chat", "engine": "fake", "num_cpus": 0.1,
        "max_adapters": 2}  # fmt: skip
MODULES = {"batch": "jobs.batch", "trainer": "llm_engine.fine_tunes.trainer"}


def settings(nodes: Nodes, server: MotoServer) -> dict[str, Any]:
    storage = {"s3_endpoint_url": server.url, "s3_region": "us-east-1", "s3_path_style": True}
    return {
        "gateway": {"host": "0.0.0.0", "port": nodes.port},
        "endpoints": [MODEL, BASE],
        "storage": storage,
        # More CPUs than the head has.
        "batches": {"num_cpus": 1.5, "lease_s": 5},
        "fine_tunes": {"num_cpus": 1.5, "lease_s": 5, "checkpoint_every_s": 2},
    }


def is_on(nodes: Nodes, node: int, kind: str) -> bool:
    for process in psutil.Process(nodes.pid(node)).children(recursive=True):
        if command(process)[1:3] == ["-m", MODULES[kind]]:
            return True
    return False


def kill(pid: int) -> None:
    """With all that it has started."""
    processes = psutil.Process(pid).children(recursive=True)
    for each in [psutil.Process(pid), *processes]:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.kill(each.pid, signal.SIGKILL)


def objects(server: MotoServer, bucket: str, prefix: str) -> set[str]:
    name = bucket.removeprefix("s3://")
    listed = server.client.list_objects_v2(Bucket=name, Prefix=f"platform/{prefix}")
    return {each["Key"] for each in listed.get("Contents", [])}


def rows() -> bytes:
    lines = []
    for number in range(ROWS):
        body = {"model": "fake", "prompt": f"Row {number}", "max_tokens": 2, "seed": number}
        line = {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/completions"}
        lines.append(json.dumps(line | {"body": body}).encode() + b"\n")
    return b"".join(lines)


def upload(client: httpx.Client, purpose: str, data: bytes) -> str:
    files = {"file": ("lines.jsonl", data)}
    return client.post("/v1/files", data={"purpose": purpose}, files=files).json()["id"]


def begin_batch(client: httpx.Client) -> str:
    asked = {"input_file_id": upload(client, "batch", rows()), "endpoint": "/v1/completions",
             "completion_window": "24h"}  # fmt: skip
    return client.post("/v1/batches", json=asked).json()["id"]


def begin_fine_tune(client: httpx.Client) -> str:
    data = jsonl(map(example, range(EXAMPLES)))
    asked = {"model": "demo", "training_file": upload(client, "fine-tune", data),
             "hyperparameters": {"n_epochs": EPOCHS, "batch_size": BATCH}}  # fmt: skip
    return client.post("/v1/fine_tuning/jobs", json=asked).json()["id"]


def test_a_batch_and_a_fine_tune_survive_their_node(tmp_path):
    nodes = Nodes(tmp_path, count=2, head_cpus=1, node_cpus=4)
    with MotoServer() as server:
        bucket = server.new_bucket()
        nodes.environment |= server.environment | {ENV_STORAGE: f"{bucket}/platform"}
        with nodes:
            nodes.deploy(settings(nodes, server))
            nodes.wait_ready("fake", "demo")
            with nodes.client() as client:
                tune, batch = begin_fine_tune(client), begin_batch(client)

            def job(path: str) -> dict[str, Any]:
                return nodes.get(f"/v1/{path}").json()

            def done() -> int:
                return job(f"batches/{batch}")["request_counts"]["completed"]

            def told() -> list[dict[str, Any]]:
                return nodes.get(f"/v1/fine_tuning/jobs/{tune}/events", limit=100).json()["data"]

            def step() -> int:
                return max((each["data"]["step"] for each in told() if each["data"]), default=0)

            def ended(path: str, state: str) -> dict[str, Any]:
                return eventually(
                    lambda: (found := job(path))["status"] == state and found, 240, 0.5
                )

            eventually(lambda: all(is_on(nodes, 1, kind) for kind in MODULES), 120, 0.5)
            nodes.join()
            eventually(lambda: done() > ROWS / 20 and step() > STEPS / 3, 180, 0.5, "no progress")
            assert done() < ROWS and step() < STEPS, "too late"
            kill(nodes.pid(1))
            check_batch(nodes, ended(f"batches/{batch}", "completed"))
            results = ended(f"fine_tuning/jobs/{tune}", "succeeded")["result_files"]
            text = nodes.get(f"/v1/files/{results[0]}/content").text
            rows = [line.split(",")[0] for line in text.split()[1:]]
            assert rows == [str(number) for number in range(1, STEPS + 1)]
            assert any("goes on from the checkpoint" in each["message"] for each in told())
            # Parts and checkpoints go once their results can be had.
            kept = {f"platform/fine_tunes/{tune}/results.csv"}
            eventually(lambda: objects(server, bucket, "fine_tunes/") == kept, 20, 0.5)
            eventually(lambda: not objects(server, bucket, f"batches/{batch}/parts/"), 20, 0.5)
        assert len(objects(server, bucket, "adapters/")) > 3


def check_batch(nodes: Nodes, ended: dict[str, Any]) -> None:
    assert ended["request_counts"] == {"total": ROWS, "completed": ROWS, "failed": 0}
    text = nodes.get(f"/v1/files/{ended['output_file_id']}/content").text
    answers = [json.loads(line) for line in text.splitlines()]
    assert [line["custom_id"] for line in answers] == [f"row-{n}" for n in range(ROWS)]
    for number, line in enumerate(answers):
        assert line["response"]["body"]["choices"][0]["text"].split()[0] == str(number)
