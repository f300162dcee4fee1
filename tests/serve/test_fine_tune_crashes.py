"""Whatever dies under a fine-tune, it goes on by itself, and ends as if nothing had happened."""

import contextlib
import csv
import io
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.cluster import Cluster, eventually, free_port
from tests.support.fine_tunes import example, jsonl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

EXAMPLES, EPOCHS, BATCH = 160, 8, 4
STEPS = EXAMPLES // BATCH * EPOCHS
#: It is trained upon for real, and served by nobody: this is about the jobs.
MODEL = {"name": "demo", "model": "builtin:chat", "engine": "fake", "num_cpus": 0.1,
         "max_adapters": 2}  # fmt: skip
MODULES = {"job": "jobs.fine_tune", "trainer": "llm_engine.fine_tunes.trainer"}
VICTIMS = ["trainer", "Ingress", "job", "JobKeeper", "trainer", "Controller", "job"]


def victims(cluster: Cluster, kind: str) -> list[int]:
    if kind not in MODULES:
        return cluster.replica_pids(kind)
    found = []
    for process in cluster.processes():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[1:3] == ["-m", MODULES[kind]]:
                found.append(process.pid)
    return found


def get(cluster: Cluster, path: str) -> dict[str, Any]:
    """As a gateway tells it; empty while none answers."""
    try:
        with cluster.client() as client:
            answer = client.get(f"/v1/fine_tuning/jobs/{path}")
    except httpx.HTTPError:
        return {}
    return answer.json() if answer.is_success else {}


def at(cluster: Cluster, job: str) -> int:
    """The last step that was told."""
    events = get(cluster, f"{job}/events?limit=20").get("data", [])
    return max((event["data"]["step"] for event in events if event["data"]), default=0)


def all_steps(cluster: Cluster, job: str) -> list[int]:
    events = cluster.openai().fine_tuning.jobs.list_events(job, limit=100)
    return [event.data["step"] for event in events if event.type == "metrics"][::-1]


def test_what_dies_costs_a_fine_tune_no_step(tmp_path_factory: pytest.TempPathFactory):
    folder = Path(tmp_path_factory.getbasetemp())
    settings = {
        "gateway": {"port": free_port(), "api_keys": [Cluster.KEY], "min_replicas": 2},
        "endpoints": [MODEL],
        "fine_tunes": {"lease_s": 4, "checkpoint_every_s": 2},
        "cluster": {"state_dir": str(folder / "tune"), "ray_port": 0, "num_cpus": 4,
                    "dashboard_port": free_port()},
    }  # fmt: skip
    with Cluster(settings) as cluster:
        client = cluster.openai(max_retries=5)
        data = jsonl(map(example, range(EXAMPLES)))
        file = client.files.create(file=("train.jsonl", data), purpose="fine-tune")
        made = client.fine_tuning.jobs.create(
            model="demo", training_file=file.id, seed=1,
            method={"type": "supervised", "supervised": {
                "hyperparameters": {"n_epochs": EPOCHS, "batch_size": BATCH}}},
        )  # fmt: skip
        for number, kind in enumerate(VICTIMS, 1):
            enough = STEPS * number // (len(VICTIMS) + 4)
            eventually(lambda enough=enough: at(cluster, made.id) >= enough, 120, 0.2, kind)
            pid = eventually(lambda kind=kind: victims(cluster, kind), 60, 0.1, f"no {kind}")[0]
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: at(cluster, made.id) >= STEPS * 0.7, 120, 0.2)
        kept = at(cluster, made.id)
        assert kept < STEPS, "it was over before the power went"
        cluster.kill()
    with Cluster(settings) as again:
        assert at(again, made.id) >= kept
        eventually(lambda: get(again, made.id).get("status") == "succeeded", 240, 0.5)
        check(again, get(again, made.id))


def check(cluster: Cluster, job: dict[str, Any]) -> None:
    """Each step once, in the events and in the result file; all that it promises is there."""
    client = cluster.openai()
    assert job["error"] is None and job["trained_tokens"] > 0
    assert all_steps(cluster, job["id"]) == list(range(1, STEPS + 1))
    text = client.files.content(job["result_files"][0]).text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    assert all(row["train_loss"] for row in rows)
    kept = client.fine_tuning.jobs.checkpoints.list(job["id"]).data
    per_epoch = EXAMPLES // BATCH
    assert [each.step_number for each in kept] == [STEPS, STEPS - per_epoch, STEPS - 2 * per_epoch]
    names = {job["fine_tuned_model"], *(each.fine_tuned_model_checkpoint for each in kept)}
    eventually(lambda: names <= {model.id for model in client.models.list()}, 10, 0.1)
