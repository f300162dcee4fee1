"""`llm-engine fine-tunes` against a real gateway over HTTP, with a store, a storage and no job: the
test works on a fine-tune as its job would."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from llm_engine.cli import fine_tune_watch
from tests.support.cli import run, write_configuration
from tests.support.cluster import eventually
from tests.support.fine_tuned import Work, jsonl
from tests.support.gateway import GatewayThread, fake_endpoint

KEY = "bootstrap"


@pytest.fixture(scope="module")
def shared():
    with GatewayThread([fake_endpoint("fake", max_adapters=2)], api_keys=[KEY]) as running:
        yield running


@pytest.fixture
def gateway(shared, tmp_path, monkeypatch):
    """A gateway that the command line finds by itself, from a folder with a training file."""
    monkeypatch.chdir(tmp_path)
    write_configuration(tmp_path)
    monkeypatch.setenv("LLM_ENGINE_URL", shared.url)
    monkeypatch.setenv("LLM_ENGINE_API_KEY", KEY)
    monkeypatch.setattr(fine_tune_watch, "PERIOD_S", 0.02)
    Path("train.jsonl").write_bytes(jsonl())
    return shared


def told(*words: str) -> Any:
    """What a command says to programs."""
    result = run(*words, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def open_ones(gateway: GatewayThread) -> list[Any]:
    return gateway.services.store.fine_tunes.open()


def test_a_file_is_sent_and_followed_until_it_is_a_model(gateway):
    def work() -> None:
        (record,) = eventually(lambda: open_ones(gateway), 10, 0.02)
        job = Work(gateway, record.id).run()
        for step in range(1, 4):
            job.step(step)
        job.checkpoint(3)
        job.finish()

    worker = threading.Thread(target=work)
    worker.start()
    result = run("fine-tunes", "create", "train.jsonl", "-m", "fake", "--suffix", "x", "--watch")
    worker.join(10)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    (made,) = (line.partition(": ")[2] for line in lines if "Created fine-tuning job" in line)
    name = f"ft:fake:{told('fine-tunes', 'get', made)['organization_id']}:x:{made[-8:]}"
    assert lines[-2].startswith(f"{name} is ready after ")
    assert lines[-1] == f"Talk to it: llm-engine chat --model {name}"

    row = told("fine-tunes", "get", made)
    assert (row["status"], row["fine_tuned_model"]) == ("succeeded", name)
    stored = gateway.services.store.files.get(row["training_file"])
    assert (stored.purpose, stored.filename) == ("fine-tune", "train.jsonl")
    shown = " ".join(run("fine-tunes", "get", made).stdout.split())
    assert f"checkpoints {name}:ckpt-step-3 model {name}" in shown
    assert made in run("fine-tunes", "list").stdout
    assert "Step 3/30: training loss=0.50" in run("fine-tunes", "events", made).stdout
    results = run("files", "download", row["result_files"][0], "-o", "-").stdout
    assert results.startswith("step,train_loss")

    asyncio.run_coroutine_threadsafe(gateway.refresh(), gateway.loop).result(10)
    assert name in [each["id"] for each in told("models")]
    assert run("fine-tunes", "delete", made).stdout.strip() == f"{name} is deleted."
    again = run("fine-tunes", "delete", name)
    assert again.exit_code == 1 and "does not exist" in again.stderr
    assert told("fine-tunes", "get", made)["status"] == "succeeded"


def test_it_rests_goes_on_and_ends_as_asked(gateway):
    made = told("fine-tunes", "create", "train.jsonl", "--model", "fake", "--epochs", "2")["id"]
    assert run("fine-tunes", "pause", made).stdout.strip() == f"{made} is paused."
    assert run("fine-tunes", "resume", made).stdout.strip() == f"{made} is validating files."
    again = run("fine-tunes", "resume", made)
    assert again.exit_code == 1 and "Cannot resume a fine-tune" in again.stderr
    assert run("fine-tunes", "cancel", made).stdout.strip() == f"{made} is cancelled."
    result = run("fine-tunes", "get", made, "--watch")
    assert result.exit_code == 1 and f"{made} is cancelled." in result.stderr


def test_numbers_that_cannot_be_are_the_gateways_to_refuse(gateway):
    result = run("fine-tunes", "create", "train.jsonl", "--model", "fake", "--epochs", "99")
    assert result.exit_code == 1
    assert "'method.supervised.hyperparameters.n_epochs' must be" in result.stderr
    file = result.stderr.partition("fine-tunes create ")[2].split("`")[0]
    assert told("fine-tunes", "create", file, "--model", "fake")["training_file"] == file
