"""Whatever dies under a batch and a fine-tune, they go on: no row and no step is lost."""

import contextlib
import csv
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.support.cluster import Cluster, command, eventually, free_port
from tests.support.fine_tunes import example, jsonl

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(900)]

ROWS = 3000
MODEL = {"name": "fake", "model": "none", "engine": "fake", "num_cpus": 0.1,
         "vllm_args": {"token_delay_s": 0.05, "max_num_seqs": 24}}  # fmt: skip
EXAMPLES, EPOCHS, BATCH = 160, 12, 4
STEPS = EXAMPLES // BATCH * EPOCHS
#: It is trained upon for real, and served by nobody: this is about the jobs.
BASE = {"name": "demo", "model": "builtin:chat", "engine": "fake", "num_cpus": 0.1,
        "max_adapters": 2}  # fmt: skip
#: What dies, one after the other: a program, or a part of the gateway.
PROGRAMS = {
    "batch": "jobs.batch",
    "tune": "jobs.fine_tune",
    "trainer": "llm_engine.fine_tunes.trainer",
    "engine": "llm_engine.engine.fake",
}
VICTIMS = ["batch", "trainer", "batch", "tune", "Ingress", "JobKeeper", "engine", "Controller"]


def victims(cluster: Cluster, kind: str) -> list[int]:
    if kind not in PROGRAMS:
        return cluster.replica_pids(kind)
    running = [(process.pid, command(process)) for process in cluster.processes()]
    return [pid for pid, words in running if words[1:3] == ["-m", PROGRAMS[kind]]]


def strike(cluster: Cluster, kind: str) -> bool:
    """False where there is none of them at the moment."""
    for pid in victims(cluster, kind):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            return True
    return False


class Work:
    """A batch and a fine-tune, as the gateway tells of them: nothing while none answers."""

    def __init__(self, cluster: Cluster) -> None:
        client = cluster.openai(max_retries=5)
        self.batch = begin_batch(client)
        self.tune = begin_fine_tune(client)

    def rows(self, cluster: Cluster) -> int:
        found = get(cluster, f"batches/{self.batch}")
        return found.get("request_counts", {}).get("completed", 0)

    def steps(self, cluster: Cluster) -> int:
        events = get(cluster, f"fine_tuning/jobs/{self.tune}/events?limit=20").get("data", [])
        return max((event["data"]["step"] for event in events if event["data"]), default=0)

    def reach(self, cluster: Cluster, kind: str, share: float) -> None:
        """Wait until that is so far which `kind` belongs to."""

        def done() -> float:
            if kind == "batch":  # early: the fine-tune does not wait for it
                return 3 * self.rows(cluster) / ROWS
            return self.steps(cluster) / STEPS

        eventually(lambda: done() >= share, 150, 0.2, kind)


def get(cluster: Cluster, path: str) -> dict[str, Any]:
    try:
        with cluster.client() as client:
            answer = client.get(f"/v1/{path}")
    except httpx.HTTPError:
        return {}
    return answer.json() if answer.is_success else {}


def begin_batch(client: OpenAI) -> str:
    lines = []
    for number in range(ROWS):
        body = {"model": "fake", "prompt": f"Row {number}", "max_tokens": 1 + number % 32}
        line = {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/completions"}
        lines.append(json.dumps(line | {"body": body}) + "\n")
    file = client.files.create(file=("rows.jsonl", "".join(lines).encode()), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    ).id


def begin_fine_tune(client: OpenAI) -> str:
    data = jsonl(map(example, range(EXAMPLES)))
    file = client.files.create(file=("train.jsonl", data), purpose="fine-tune")
    return client.fine_tuning.jobs.create(
        model="demo", training_file=file.id, seed=1,
        method={"type": "supervised", "supervised": {
            "hyperparameters": {"n_epochs": EPOCHS, "batch_size": BATCH}}},
    ).id  # fmt: skip


def test_what_dies_costs_no_row_and_no_step(tmp_path_factory: pytest.TempPathFactory):
    # Ray's sockets do not fit under pytest's own long folder names.
    folder = Path(tmp_path_factory.getbasetemp())
    settings = {
        "gateway": {"port": free_port(), "api_keys": [Cluster.KEY], "min_replicas": 2},
        "endpoints": [MODEL, BASE],
        "batches": {"lease_s": 4},
        "fine_tunes": {"lease_s": 4, "checkpoint_every_s": 2},
        "cluster": {"state_dir": str(folder / "jobs"), "ray_port": 0, "num_cpus": 4,
                    "dashboard_port": free_port()},
    }  # fmt: skip
    with Cluster(settings) as cluster:
        work = Work(cluster)
        for number, kind in enumerate(VICTIMS, 1):
            work.reach(cluster, kind, number / (len(VICTIMS) + 6))
            eventually(lambda kind=kind: strike(cluster, kind), 60, 0.1, f"no {kind}")
        work.reach(cluster, "tune", 0.65)
        rows, steps = work.rows(cluster), work.steps(cluster)
        assert steps < STEPS, "it was over before the power went"
        cluster.kill()
    with Cluster(settings) as again:
        assert work.rows(again) >= rows and work.steps(again) >= steps
        eventually(lambda: get(again, f"batches/{work.batch}").get("status") == "completed", 120)
        check_batch(again, get(again, f"batches/{work.batch}"))
        path = f"fine_tuning/jobs/{work.tune}"
        eventually(lambda: get(again, path).get("status") == "succeeded", 240, 0.5)
        check_fine_tune(again, get(again, path))


def check_batch(cluster: Cluster, batch: dict[str, Any]) -> None:
    """Each row once, in its place, and with its own answer."""
    assert batch["request_counts"] == {"total": ROWS, "completed": ROWS, "failed": 0}
    text = cluster.openai().files.content(batch["output_file_id"]).text
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["custom_id"] for line in lines] == [f"row-{n}" for n in range(ROWS)]
    for number, line in enumerate(lines):
        assert line["response"]["status_code"] == 200 and line["error"] is None
        usage = line["response"]["body"]["usage"]
        assert usage["completion_tokens"] == 1 + number % 32


def check_fine_tune(cluster: Cluster, job: dict[str, Any]) -> None:
    """Each step once, in the events and in the result file; all that it promises is there."""
    client = cluster.openai()
    assert job["error"] is None and job["trained_tokens"] > 0
    events = client.fine_tuning.jobs.list_events(job["id"], limit=100)
    told = [event.data["step"] for event in events if event.type == "metrics"]
    assert told[::-1] == list(range(1, STEPS + 1))
    text = client.files.content(job["result_files"][0]).text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    assert all(row["train_loss"] for row in rows)
    kept = client.fine_tuning.jobs.checkpoints.list(job["id"]).data
    per_epoch = EXAMPLES // BATCH
    assert [each.step_number for each in kept] == [STEPS, STEPS - per_epoch, STEPS - 2 * per_epoch]
    names = {job["fine_tuned_model"], *(each.fine_tuned_model_checkpoint for each in kept)}
    eventually(lambda: names <= {model.id for model in client.models.list()}, 10, 0.1)
