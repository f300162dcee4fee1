"""A fine-tune on several nodes, with its files in S3, when the node of its trainer is lost."""

import contextlib
import os
import signal
from typing import Any

import psutil
import pytest

from llm_engine.config import ENV_STORAGE
from tests.support.cluster import eventually
from tests.support.fine_tunes import example, jsonl
from tests.support.nodes import Nodes
from tests.support.s3 import MotoServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(590)]

EXAMPLES, BATCH, EPOCHS = 120, 4, 4
STEPS = EXAMPLES // BATCH * EPOCHS
MODEL = {"name": "demo", "model": "builtin:chat", "engine": "fake", "num_cpus": 0.1,
         "max_adapters": 2}  # fmt: skip


def settings(nodes: Nodes, server: MotoServer) -> dict[str, Any]:
    storage = {"s3_endpoint_url": server.url, "s3_region": "us-east-1", "s3_path_style": True}
    return {
        "gateway": {"host": "0.0.0.0", "port": nodes.port},
        "endpoints": [MODEL],
        "storage": storage,
        # More CPUs than the head has.
        "fine_tunes": {"num_cpus": 1.5, "lease_s": 5, "checkpoint_every_s": 2},
    }


def trains(nodes: Nodes, node: int) -> bool:
    for process in psutil.Process(nodes.pid(node)).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[1:3] == ["-m", "llm_engine.fine_tunes.trainer"]:
                return True
    return False


def kill(pid: int) -> None:
    """With all that it has started."""
    processes = psutil.Process(pid).children(recursive=True)
    for each in [psutil.Process(pid), *processes]:
        with contextlib.suppress(psutil.Error):
            os.kill(each.pid, signal.SIGKILL)


def objects(server: MotoServer, bucket: str, prefix: str) -> set[str]:
    name = bucket.removeprefix("s3://")
    listed = server.client.list_objects_v2(Bucket=name, Prefix=f"platform/{prefix}")
    return {each["Key"] for each in listed.get("Contents", [])}


def test_a_fine_tune_survives_the_node_of_its_trainer(tmp_path):
    nodes = Nodes(tmp_path, count=3, head_cpus=1)
    with MotoServer() as server:
        bucket = server.new_bucket()
        nodes.environment |= server.environment | {ENV_STORAGE: f"{bucket}/platform"}
        with nodes:
            nodes.deploy(settings(nodes, server))
            nodes.wait_ready("demo")
            with nodes.client() as client:
                data = jsonl(map(example, range(EXAMPLES)))
                file = client.post(
                    "/v1/files",
                    data={"purpose": "fine-tune"},
                    files={"file": ("train.jsonl", data)},
                ).json()
                hyperparameters = {"n_epochs": EPOCHS, "batch_size": BATCH}
                asked = {"model": "demo", "training_file": file["id"],
                         "hyperparameters": hyperparameters}  # fmt: skip
                made = client.post("/v1/fine_tuning/jobs", json=asked).json()
                path = f"/v1/fine_tuning/jobs/{made['id']}"

                def told() -> list[int]:
                    events = nodes.get(f"{path}/events", limit=100).json()["data"]
                    return sorted(event["data"]["step"] for event in events if event["data"])

                eventually(lambda: len(told()) > STEPS // 4, 180, 0.5, "no progress")
                (node,) = [number for number in (1, 2) if trains(nodes, number)]
                kill(nodes.pid(node))
                assert len(told()) < STEPS
                ended = eventually(
                    lambda: (found := nodes.get(path).json())["status"] == "succeeded" and found,
                    240, 0.5,
                )  # fmt: skip
                text = nodes.get(f"/v1/files/{ended['result_files'][0]}/content").text
                left = {f"platform/fine_tunes/{made['id']}/results.csv"}
                eventually(lambda: objects(server, bucket, "fine_tunes/") == left, 20, 0.5)
                messages = nodes.get(f"{path}/events", limit=100).json()["data"]
        assert len(objects(server, bucket, "adapters/")) > 3
        assert [line.split(",")[0] for line in text.split()[1:]] == [
            str(step) for step in range(1, STEPS + 1)
        ]
        assert any("goes on from the checkpoint" in each["message"] for each in messages)
