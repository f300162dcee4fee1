"""Whatever dies under a batch, it goes on by itself, and each row is in its output once."""

import contextlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.cluster import Cluster, eventually, free_port

pytestmark = pytest.mark.slow

ROWS = 2400
MODEL = {"name": "fake", "model": "none", "engine": "fake", "num_cpus": 0.1,
         "vllm_args": {"token_delay_s": 0.02}}  # fmt: skip
VICTIMS = ["job", "Ingress", "JobKeeper", "engine", "job"]


def rows() -> bytes:
    lines = []
    for number in range(ROWS):
        body = {"model": "fake", "prompt": f"Row {number}", "max_tokens": 1 + number % 32}
        line = {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/completions"}
        lines.append(json.dumps(line | {"body": body}) + "\n")
    return "".join(lines).encode()


def jobs(cluster: Cluster) -> list[psutil.Process]:
    found = []
    for process in cluster.processes():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[1:3] == ["-m", "jobs.batch"]:
                found.append(process)
    return found


def victims(cluster: Cluster, kind: str) -> list[int]:
    if kind == "job":
        return [process.pid for process in jobs(cluster)]
    if kind == "engine":
        processes = cluster.processes()
        return [p.pid for p in processes if "llm_engine.engine.fake" in " ".join(p.cmdline())]
    return cluster.replica_pids(kind)


def batch(cluster: Cluster, name: str) -> dict[str, Any]:
    """As a gateway tells it; empty while none answers."""
    try:
        with cluster.client() as client:
            answer = client.get(f"/v1/batches/{name}")
    except httpx.HTTPError:
        return {}
    return answer.json() if answer.is_success else {}


def done(cluster: Cluster, name: str) -> int:
    return batch(cluster, name).get("request_counts", {}).get("completed", 0)


def test_what_dies_costs_a_batch_no_row(tmp_path_factory: pytest.TempPathFactory):
    folder = Path(tmp_path_factory.getbasetemp())
    settings = {
        "gateway": {"port": free_port(), "api_keys": [Cluster.KEY], "min_replicas": 2},
        "endpoints": [MODEL],
        "batches": {"lease_s": 4},
        "cluster": {"state_dir": str(folder / "batch"), "ray_port": 0,
                    "dashboard_port": free_port()},
    }  # fmt: skip
    with Cluster(settings) as cluster:
        client = cluster.openai(max_retries=5)
        file = client.files.create(file=("rows.jsonl", rows()), purpose="batch")
        made = client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
        )
        for number, kind in enumerate(VICTIMS, 1):
            enough = ROWS * number // (len(VICTIMS) + 3)
            eventually(lambda enough=enough: done(cluster, made.id) >= enough, 90, 0.1, kind)
            pid = eventually(lambda kind=kind: victims(cluster, kind), 60, 0.1, f"no {kind}")[0]
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: done(cluster, made.id) >= ROWS * 0.8, 90, 0.1)
        kept = done(cluster, made.id)
        assert kept < ROWS, "it was over before the power went"
        cluster.kill()
    with Cluster(settings) as again:
        assert batch(again, made.id)["request_counts"]["completed"] >= kept
        eventually(lambda: batch(again, made.id).get("status") == "completed", 120, 0.2)
        counts = batch(again, made.id)["request_counts"]
        assert counts == {"total": ROWS, "completed": ROWS, "failed": 0}
        text = again.openai().files.content(batch(again, made.id)["output_file_id"]).text
        check(text)


def check(text: str) -> None:
    """Each row once, in its place, and with its own answer."""
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["custom_id"] for line in lines] == [f"row-{n}" for n in range(ROWS)]
    for number, line in enumerate(lines):
        assert line["response"]["status_code"] == 200 and line["error"] is None
        usage = line["response"]["body"]["usage"]
        assert usage["completion_tokens"] == 1 + number % 32
