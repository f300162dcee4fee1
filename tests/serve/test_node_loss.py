"""A batch on two nodes, with its files in S3, when one of the nodes is lost."""

import contextlib
import json
import os
import signal
from typing import Any

import psutil
import pytest

from llm_engine.config import ENV_STORAGE
from tests.support.cluster import eventually
from tests.support.nodes import Nodes
from tests.support.s3 import MotoServer

pytestmark = pytest.mark.slow

ROWS = 3000
MODEL = {"name": "fake", "model": "none", "engine": "fake", "num_cpus": 0.1,
         "vllm_args": {"token_delay_s": 0.2, "max_num_seqs": 64}}  # fmt: skip


def rows() -> bytes:
    lines = []
    for number in range(ROWS):
        body = {"model": "fake", "prompt": f"Row {number}", "max_tokens": 2, "seed": number}
        line = {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/completions"}
        lines.append(json.dumps(line | {"body": body}).encode() + b"\n")
    return b"".join(lines)


def settings(nodes: Nodes, server: MotoServer) -> dict[str, Any]:
    storage = {"s3_endpoint_url": server.url, "s3_region": "us-east-1", "s3_path_style": True}
    return {
        "gateway": {"host": "0.0.0.0", "port": nodes.port},
        "endpoints": [MODEL],
        "storage": storage,
        "batches": {"num_cpus": 1.5, "lease_s": 5},  # more than the head has
    }


def job_of(nodes: Nodes, node: int) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(nodes.pid(node)).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[1:3] == ["-m", "jobs.batch"]:
                found.append(process)
    return found


def folders(server: MotoServer, bucket: str) -> set[str]:
    listed = server.client.list_objects_v2(Bucket=bucket.removeprefix("s3://"))
    return {each["Key"].rsplit("/", 1)[0] for each in listed["Contents"]}


def kill(pid: int) -> None:
    """With all that it has started."""
    processes = psutil.Process(pid).children(recursive=True)
    for each in [psutil.Process(pid), *processes]:
        with contextlib.suppress(psutil.Error):
            os.kill(each.pid, signal.SIGKILL)


def test_a_batch_survives_the_node_of_its_job(tmp_path):
    nodes = Nodes(tmp_path, count=3, head_cpus=1)
    with MotoServer() as server:
        bucket = server.new_bucket()
        nodes.environment |= server.environment | {ENV_STORAGE: f"{bucket}/platform"}
        with nodes:
            nodes.deploy(settings(nodes, server))
            nodes.wait_ready("fake")
            with nodes.client() as client:
                file = client.post(
                    "/v1/files", data={"purpose": "batch"}, files={"file": ("rows.jsonl", rows())}
                ).json()
                asked = {"input_file_id": file["id"], "endpoint": "/v1/completions"}
                made = client.post("/v1/batches", json=asked | {"completion_window": "24h"}).json()

                def batch() -> dict[str, Any]:
                    return nodes.get(f"/v1/batches/{made['id']}").json()

                def done() -> int:
                    return batch()["request_counts"]["completed"]

                eventually(lambda: done() > ROWS / 10, 60, 0.2, "no progress")
                (node,) = [number for number in (1, 2) if job_of(nodes, number)]
                kill(nodes.pid(node))
                before = done()
                assert before < ROWS
                ended = eventually(
                    lambda: (found := batch())["status"] == "completed" and found, 120, 0.5
                )
                assert ended["request_counts"] == {"total": ROWS, "completed": ROWS, "failed": 0}
                text = nodes.get(f"/v1/files/{ended['output_file_id']}/content").text
                # The parts go once their results can be had.
                left = {f"platform/batches/{made['id']}", "platform/files"}
                eventually(lambda: folders(server, bucket) == left, 20, 0.5)
        answers = [json.loads(line) for line in text.splitlines()]
        assert [line["custom_id"] for line in answers] == [f"row-{n}" for n in range(ROWS)]
        for number, line in enumerate(answers):
            said = line["response"]["body"]["choices"][0]["text"]
            assert said.split()[0] == str(number)
