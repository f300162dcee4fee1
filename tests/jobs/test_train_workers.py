"""Several workers that train together, by Ray Train: one of them dies, or lives elsewhere."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from llm_engine.records import FineTuneRecord
from llm_engine.statuses import FineTuneState
from tests.support.cluster import eventually
from tests.support.fine_tunes import Bench
from tests.support.nodes import Nodes

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(590)]

EXAMPLES, BATCH, EPOCHS = 96, 8, 4
ASKED = {"n_epochs": EPOCHS, "batch_size": BATCH}
STEPS = EXAMPLES // BATCH * EPOCHS
PATIENCE_S = 240


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    # Ray's sockets do not fit under pytest's own long folder names.
    with Nodes(Path(tmp_path_factory.getbasetemp()), count=1, head_cpus=4) as nodes:
        yield nodes


@pytest.fixture
def bench(ray, tmp_path) -> Iterator[Bench]:
    bench = Bench(tmp_path, "jobs.fine_tune", lease_s=10, checkpoint_every_s=2, workers=2)
    bench.environment = {
        name: value for name, value in ray.environment.items() if name.startswith("RAY_")
    } | {"RAY_ADDRESS": ray.gcs}
    yield bench
    bench.close()


def workers(ray: Nodes) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(ray.pid(0)).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[0].startswith("ray::RayTrainWorker"):
                found.append(process)
    return found


def ended_well(bench: Bench, tune: FineTuneRecord, folder: Path) -> FineTuneRecord:
    record = bench.get(tune)
    assert record.state is FineTuneState.SUCCEEDED, (record.reason, record.error)
    assert [int(row["step"]) for row in bench.rows(tune)] == list(range(1, STEPS + 1))
    assert bench.told_steps(tune) == list(range(1, STEPS + 1))
    assert float(bench.rows(tune)[-1]["train_loss"]) < float(bench.rows(tune)[0]["train_loss"]) / 2
    assert bench.fetch(record.adapter, folder).rank == record.plan["lora_rank"]
    assert bench.left_over(tune) == [f"fine_tunes/{tune.id}/results.csv"]
    return record


def test_a_worker_that_dies_costs_no_step(ray, bench, tmp_path):
    """Nor does it where workers see no folder of the job's, as on other nodes."""
    bench.module = "tests.support.elsewhere_job"
    tune = bench.tune(EXAMPLES, valid=8, asked=ASKED)
    with bench.start(tune) as job:
        eventually(lambda: bench.get(tune).step > 0, PATIENCE_S, 0.2, "no progress")
        both = eventually(lambda: len(found := workers(ray)) == 2 and found, 10, 0.2)
        both[1].kill()
        printed, _ = job.communicate(timeout=120)
    assert job.returncode == 1 and "another job goes on" in printed
    record = bench.get(tune)
    assert record.state is FineTuneState.RUNNING and 0 < record.step < STEPS
    assert record.reason.startswith("its trainer died")
    eventually(lambda: workers(ray) == [], 30, 0.2, "workers outlive their driver")
    code, printed, _ = bench.run(tune, PATIENCE_S)
    assert code == 0, printed
    assert f"Training goes on from the checkpoint at step {record.step}" in bench.messages(tune)
    assert ended_well(bench, tune, tmp_path / "a").starts == 2
    left = list(Path(tempfile.gettempdir()).glob("llm-engine-fine-tune-worker-*"))
    assert len(left) <= 1, "more than that of the one that was killed"
    for folder in left:
        shutil.rmtree(folder)


def test_what_it_waits_for_is_told(ray, bench):
    settings = bench.settings.fine_tunes.model_copy(update={"num_cpus": 64.0})
    bench.settings = bench.settings.model_copy(update={"fine_tunes": settings})
    tune = bench.tune(EXAMPLES, asked=ASKED)
    with bench.start(tune) as job:
        eventually(lambda: bench.get(tune).reason, 120, 0.2, "nothing is told")
        assert bench.get(tune).reason == ("it waits for 2 workers of 64 CPUs (fine_tunes.workers)")
        bench.store.fine_tunes.pause(tune.id)
        job.communicate(timeout=30)
    assert (bench.get(tune).state, bench.get(tune).worker) == (FineTuneState.PAUSED, None)
