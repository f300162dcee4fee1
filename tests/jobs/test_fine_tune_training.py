"""`python -m jobs.fine_tune` with the real trainer: what dies on the way changes no weight."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from llm_engine.records import FineTuneRecord
from llm_engine.statuses import FineTuneState
from tests.support.cluster import eventually
from tests.support.fine_tunes import Bench, jsonl

pytestmark = [pytest.mark.slow, pytest.mark.alone]

EXAMPLES, EPOCHS = 48, 8
ASKED = {"n_epochs": EPOCHS, "batch_size": 4}
STEPS = EXAMPLES // 4 * EPOCHS


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("training")
    bench = Bench(folder, "jobs.fine_tune", lease_s=10, checkpoint_every_s=1)
    yield bench
    bench.close()


def weights(bench: Bench, record: FineTuneRecord, folder: Path) -> bytes:
    manifest = bench.fetch(record.adapter, folder)
    assert manifest.rank == record.plan["lora_rank"]
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(bench, tmp_path_factory) -> tuple[bytes, list[dict[str, str]], FineTuneRecord]:
    """The weights, the metrics and the record of a fine-tune that nothing happened to."""
    tune = bench.tune(EXAMPLES, valid=8, asked=ASKED)
    code, printed, record = bench.run(tune, 250)
    assert code == 0 and record.state is FineTuneState.SUCCEEDED, printed
    return weights(bench, record, tmp_path_factory.mktemp("w") / "a"), bench.rows(tune), record


def disturbed(bench: Bench, tune: FineTuneRecord, deeds: list[str]) -> None:
    """One job after the other, each disturbed once it has kept something; then one that is not."""
    seen = 0
    for deed in deeds:
        with bench.start(tune) as job:
            step = seen
            eventually(lambda step=step: bench.get(tune).step > step, 120, 0.05, "no progress")
            trainers = bench.trainers(tune)
            if deed == "stop":
                job.terminate()
            elif deed == "pause":
                bench.store.fine_tunes.pause(tune.id)
            else:
                victim = trainers[0] if deed == "kill the trainer" else psutil.Process(job.pid)
                victim.kill()
            job.communicate(timeout=60)
        assert psutil.wait_procs(trainers, 10)[1] == [], "a trainer outlived its job"
        record = bench.get(tune)
        seen = record.step
        assert seen < STEPS, "it was over too early"
        bench.release(tune)
        if record.state is FineTuneState.PAUSED:
            bench.store.fine_tunes.resume(tune.id)
    code, printed, _ = bench.run(tune, 250)
    assert code == 0, printed


@pytest.mark.parametrize(
    "deeds", [["kill the trainer", "kill the job"], ["stop", "pause"]], ids=str
)
def test_what_dies_on_the_way_changes_no_weight(bench, undisturbed, deeds, tmp_path):
    expected, rows, _ = undisturbed
    tune = bench.tune(EXAMPLES, valid=8, asked=ASKED)
    disturbed(bench, tune, deeds)
    record = bench.get(tune)
    assert record.state is FineTuneState.SUCCEEDED and record.starts == len(deeds) + 1
    assert weights(bench, record, tmp_path / "a") == expected
    assert bench.rows(tune) == rows and len(rows) == STEPS
    assert bench.told_steps(tune) == list(range(1, STEPS + 1))
    assert [each.step for each in bench.checkpoints(tune)] == [STEPS - 24, STEPS - 12, STEPS]
    assert bench.left_over(tune) == [f"fine_tunes/{tune.id}/results.csv"]


def test_an_undisturbed_one_is_told_in_full(bench, undisturbed):
    _, rows, record = undisturbed
    assert (record.step, record.total_steps) == (STEPS, STEPS)
    assert record.plan["n_epochs"] == EPOCHS and record.trained_tokens > 0
    assert record.progress["step"] == STEPS
    assert all(row["train_loss"] and row["train_accuracy"] for row in rows)
    assert [bool(row["valid_loss"]) for row in rows][11::12] == [True] * EPOCHS
    kept = bench.checkpoints(record)
    assert all("valid_loss" in each.metrics for each in kept)


def preference(number: int) -> dict[str, Any]:
    return {
        "input": {"messages": [{"role": "user", "content": f"question {number}"}]},
        "preferred_output": [{"role": "assistant", "content": "Yes, gladly."}],
        "non_preferred_output": [{"role": "assistant", "content": "No."}],
    }


def test_preferences_are_learned_upon_another_fine_tune(bench, undisturbed, tmp_path):
    _, _, parent = undisturbed
    data = jsonl(map(preference, range(16)))
    tune = bench.tune(data, method="dpo", parent=parent.adapter, asked={"n_epochs": 1})
    code, printed, record = bench.run(tune, 200)
    assert code == 0 and record.state is FineTuneState.SUCCEEDED, printed
    assert record.plan["lora_rank"] == parent.plan["lora_rank"]
    assert weights(bench, record, tmp_path / "a") != weights(bench, parent, tmp_path / "b")


def test_what_the_real_trainer_refuses_is_the_error(bench):
    tune = bench.tune(16, asked={"max_length": 100_000})
    code, printed, record = bench.run(tune, 100)
    assert (code, record.state) == (0, FineTuneState.FAILED), printed
    assert (record.error["code"], record.error["param"]) == ("invalid_hyperparameter", "max_length")


def test_a_cancelled_one_frees_the_machine_soon(bench):
    tune = bench.tune(EXAMPLES, asked=ASKED | {"n_epochs": 50})
    with bench.start(tune) as job:
        eventually(lambda: bench.get(tune).step > 0, 120, 0.1, "no progress")
        bench.store.fine_tunes.ask_cancel(tune.id)
        began = time.monotonic()
        job.communicate(timeout=30)
    assert time.monotonic() - began < 10 and bench.trainers() == []
    assert bench.left_over(tune) == []
