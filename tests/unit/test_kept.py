"""What becomes of fine-tunes and batches in the keeper's hands: a real store and storage, and a Ray
made up."""

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from deployments import keeper as keeper_module
from deployments.kept import KeptBatches, KeptFineTunes
from jobs.launcher import Job, LaunchError
from llm_engine import files, keeping
from llm_engine.batches import parts
from llm_engine.batches.parts import folder_of
from llm_engine.fine_tunes import adapters
from llm_engine.keeping import Deed
from llm_engine.records import BatchPart, BatchRecord
from llm_engine.responses import ResponseRecord, StoredChat
from llm_engine.statuses import BatchState, FineTuneState, ResponseState
from llm_engine.storage import ownership
from tests.support.batches import batch_record
from tests.support.fine_tunes import Bench, fine_tune_record

_S = FineTuneState


class FakeLauncher:
    """Ray, as far as the keeper sees it."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.started: list[tuple[str, dict[str, float]]] = []
        self.stopped: list[str] = []
        self.away = False
        self.asked = 0

    def start(self, module, record, job, gateways, metadata, **resources) -> None:
        if self.away:
            raise LaunchError("Ray's job API does not answer")
        assert metadata[module.removeprefix("jobs.")] == record
        self.jobs[job] = Job(job, True, False, "")
        self.started.append((job, resources))

    def find(self, job: str) -> Job | None:
        self.asked += 1
        return self.jobs.get(job)

    def stop(self, job: str) -> None:
        self.stopped.append(job)

    def now(self, job: str, *, live: bool = True, running: bool = True, message: str = "") -> None:
        self.jobs[job] = Job(job, live, running, message)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path, max_idle_starts=2, num_cpus=2)
    yield bench
    bench.close()


@pytest.fixture
def ray() -> FakeLauncher:
    return FakeLauncher()


def keeper(bench: Bench, ray: Any) -> KeptFineTunes:
    return KeptFineTunes(bench.settings, bench.store, bench.storage, ray)


def create(bench: Bench, **facts: Any):
    return bench.store.fine_tunes.create(fine_tune_record(**facts), 99)


def test_a_new_one_gets_a_job_with_what_its_trainer_uses(bench, ray):
    tune = create(bench)
    assert keeper(bench, ray).look([]) == (True, False)
    assert ray.started == [(tune.id, {"num_cpus": 2.0})]


def test_a_gpu_is_reserved_and_several_workers_reserve_their_own(tmp_path, ray):
    gpu = Bench(tmp_path, num_gpus=1)
    create(gpu)
    keeper(gpu, ray).look([])
    many = gpu.settings.model_copy(
        update={"fine_tunes": gpu.settings.fine_tunes.model_copy(update={"workers": 2})}
    )
    other = FakeLauncher()
    KeptFineTunes(many, gpu.store, gpu.storage, other).look([])
    gpu.close()
    assert ray.started[0][1] == {"num_cpus": 1.0, "num_gpus": 1.0}
    assert other.started[0][1] == {"num_cpus": 0.1}


def test_others_wait_their_turn_and_are_told_so(bench, ray):
    first, second = create(bench), create(bench)
    kept = keeper(bench, ray)
    kept.look([])
    kept.look([])
    assert [name for name, _ in ray.started] == [first.id]
    assert "its job waits for a node" in bench.get(first).reason
    assert "fine_tunes.max_running" in bench.get(second).reason


def test_a_job_that_died_is_followed_by_another(bench, ray):
    tune = create(bench)
    kept = keeper(bench, ray)
    kept.look([])
    bench.store.fine_tunes.claim(tune.id, "w1", 60)
    ray.now(tune.id, live=False, running=False, message="killed")
    assert kept.look([]) == (True, True)  # the lease has ended: look again at once
    kept.look([])
    assert [name for name, _ in ray.started] == [tune.id, f"{tune.id}-2"]
    # A keeper that is new to it finds the job.
    keeper(bench, ray).look([])
    assert len(ray.started) == 2


def test_jobs_that_die_in_a_row_end_it_with_what_the_last_one_said(bench, ray):
    tune = create(bench)
    kept = keeper(bench, ray)
    for number in range(2):
        kept.look([])
        record = bench.store.fine_tunes.claim(tune.id, f"w{number}", 60)
        bench.store.fine_tunes.leave(record, "its trainer died: it ran out of memory", tried=True)
        ray.now(ray.started[-1][0], live=False, running=False, message="exit code 1")
    kept.look([])
    record = bench.get(tune)
    assert record.state is _S.FAILED and record.error["code"] == "job_failed"
    assert record.error["message"] == (
        "2 jobs in a row ended before one more checkpoint was kept (fine_tunes.max_idle_starts); "
        "the last one: its trainer died: it ran out of memory"
    )


def test_jobs_that_never_claim_it_end_it_with_what_ray_said(bench, ray):
    tune = create(bench)
    kept = keeper(bench, ray)
    for _ in range(3):
        kept.look([])
        ray.now(ray.started[-1][0], live=False, running=False, message="no module named jobs")
    assert bench.get(tune).error["message"].endswith("the last one: no module named jobs")
    assert len(ray.started) == 2


def test_one_that_rests_has_no_job_and_costs_no_looks(bench, ray):
    tune = create(bench)
    bench.store.fine_tunes.pause(tune.id)
    kept = keeper(bench, ray)
    assert kept.look([]) == (False, False) and ray.started == []
    assert bench.get(tune).reason is None
    bench.store.fine_tunes.resume(tune.id)
    assert kept.look([]) == (True, False) and len(ray.started) == 1


def test_of_one_that_was_cancelled_nothing_is_left(bench, ray):
    tune = create(bench)
    kept = keeper(bench, ray)
    kept.look([])
    bench.storage.put(f"fine_tunes/{tune.id}/checkpoints/00000001-a/x", b"x")
    bench.store.fine_tunes.ask_cancel(tune.id)
    assert kept.look([]) == (False, False)
    assert bench.left_over(tune) == []
    assert ray.stopped == [tune.id]  # it still waited for CPUs


def test_where_ray_is_away_it_says_so(bench, ray):
    tune = create(bench)
    ray.away = True
    keeper(bench, ray).look([])
    assert "cannot be started now" in bench.get(tune).reason


# -- sweeps


def served(bench: Bench, tmp_path: Path, tune) -> str:
    folder = tmp_path / "folder"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "optimizer.pt").write_bytes(b"moments")
    worker = bench.store.fine_tunes.claim(tune.id, "w", -1)
    size, rank = adapters.measure(folder)
    record = adapters.AdapterRecord(
        adapters.new_adapter_id(), f"{tune.name}:ckpt", "ann", tune.base, tune.weights, rank, size,
        time.time(), tune.id, 1,
    )  # fmt: skip
    adapters.publish(bench.storage, folder, record)
    bench.store.fine_tunes.keep(worker, 1, record)
    return record.id


def test_a_deleted_adapter_loses_its_bytes_and_then_its_record(bench, tmp_path):
    adapter = served(bench, tmp_path, create(bench))
    assert adapters.sweep(bench.store, bench.storage) == 0
    assert {each.key.rpartition("/")[2] for each in bench.storage.list("adapters/")} == {
        "adapter_config.json", "adapter_model.safetensors", "manifest.json",
    }  # fmt: skip
    bench.store.adapters.delete(adapter)
    assert adapters.sweep(bench.store, bench.storage) == 1
    assert list(bench.storage.list("adapters/")) == [] == bench.store.adapters.deleted()


def test_what_killed_jobs_have_left_goes_and_nothing_else(bench, tmp_path, monkeypatch):
    tune, ended = create(bench), create(bench)
    adapter = served(bench, tmp_path, tune)
    for each in (tune, ended):
        bench.storage.put(f"fine_tunes/{each.id}/checkpoints/00000001-a/x", b"x")
    bench.storage.put("adapters/adapter-orphan/adapter_config.json", b"{}")
    bench.store.fine_tunes.ask_cancel(ended.id)
    assert adapters.sweep_orphans(bench.store, bench.storage) == 1  # it may be being published
    monkeypatch.setattr(adapters, "ORPHAN_S", -1.0)
    assert adapters.sweep_orphans(bench.store, bench.storage) == 1
    assert bench.left_over(tune) and not bench.left_over(ended)
    assert {each.key.split("/")[1] for each in bench.storage.list("adapters/")} == {adapter}


def test_expired_responses_and_chats_go_however_many_and_nothing_else(bench, monkeypatch):
    now = time.time()
    ended = ResponseState.COMPLETED
    for number in range(7):
        until = now - 1 if number else now + 60
        response = ResponseRecord(f"resp_{number}", "ann", "openai", "m", ended, now, until)
        bench.store.responses.add(response)
        bench.store.chats.add(StoredChat(f"chatcmpl-{number}", "ann", "m", now, until))
    for kind in ("responses", "chats"):
        sweep = getattr(bench.store, kind).sweep
        monkeypatch.setattr(
            getattr(bench.store, kind), "sweep", lambda when, sweep=sweep: sweep(when, limit=2)
        )
    monkeypatch.setattr(keeper_module, "SWEEP_ROUNDS", 2)
    swept = [keeper_module.forget_expired(bench.store, now) for _ in range(3)]
    assert swept == [8, 4, 0]
    assert bench.store.responses.get("resp_0") and bench.store.chats.get("chatcmpl-0")


# -- batches


def kept_batches(bench: Bench, ray: Any) -> KeptBatches:
    return KeptBatches(bench.settings, bench.store, ray)


def test_ray_is_not_asked_again_and_again_of_batches_that_wait_their_turn(bench, ray):
    waiting = [bench.store.batches.create(batch_record(), 99).id for _ in range(20)]
    kept = kept_batches(bench, ray)
    kept.look([])
    running = [name for name, _ in ray.started]
    ray.asked = 0
    kept.look([])
    assert ray.asked == len(running) == bench.settings.batches.max_running
    # Another keeper's job, of the time when there were two, is found once it has claimed its batch.
    other = next(each for each in waiting if each not in running)
    bench.store.batches.claim(other, "w", 60)
    ray.now(other, live=False, running=False, message="killed")
    assert kept.look([]) == (True, True)


def with_rows(bench: Bench, **facts: Any) -> BatchRecord:
    """Whose five rows are finished, but not its results."""
    batches = bench.store.batches
    record = batches.create(batch_record(total=5, **facts), 9)
    held = batches.claim(record.id, "w", 60)
    key = f"{folder_of(record.id)}000001-w.jsonl"
    bench.storage.put(key, b"{}\n" * 5)
    batches.add_part(held, BatchPart(1, key, (0, 1, 2, 3, 4), 0))
    batches.move(held, [record.state], BatchState.FINALIZING, outcome="completed")
    batches.release(held, "it died")
    return record


def lose_jobs(bench: Bench, ray: FakeLauncher, kept: KeptBatches, times: int) -> None:
    for number in range(times):
        kept.look([])
        name = ray.started[-1][0]
        held = bench.store.batches.claim(name.rsplit("-", 1)[0], f"w{number}", 60)
        bench.store.batches.release(held, "it died")
        ray.now(name, live=False, running=False, message="no space left on device")


def test_results_that_cannot_be_put_together_now_are_later(bench, ray, monkeypatch):
    record = with_rows(bench)
    kept = kept_batches(bench, ray)
    lose_jobs(bench, ray, kept, 5)
    kept.look([])
    told = bench.store.batches.get(record.id)
    assert (told.state, told.idle_starts) == (BatchState.FINALIZING, 5) and len(ray.started) == 5
    assert "later; the last: no space left" in told.reason
    assert len(bench.store.batches.parts(record.id)) == 1
    monkeypatch.setattr(keeping, "REST_S", 0.0)
    kept.look([])
    assert len(ray.started) == 6


def test_rows_that_were_given_up_long_after_the_window_are_kept_for_a_while(bench, ray):
    record = with_rows(bench, window_s=-90_000.0)
    kept = kept_batches(bench, ray)
    lose_jobs(bench, ray, kept, 5)
    kept.look([])
    ended = bench.store.batches.get(record.id)
    assert ended.state is BatchState.FAILED and "5 finished rows for 30 days" in ended.reason
    assert ended.errors[0]["message"] == ended.reason
    assert parts.sweep(bench.store, bench.storage) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "GIVEN_UP_S", -1)
        assert parts.sweep(bench.store, bench.storage) == 1


def test_a_batch_that_is_given_up_names_no_files_that_there_are_not(bench):
    """Its jobs died while they put its results together."""
    record = batch_record(state=BatchState.FINALIZING, output_file_id="file-half", idle_starts=2)
    bench.store.batches.create(record, 9)
    KeptBatches(bench.settings, bench.store, FakeLauncher())._end(record, Deed.GIVE_UP, "why")
    ended = bench.store.batches.get(record.id)
    assert (ended.state, ended.output_file_id) == (BatchState.FAILED, None)


def test_a_keeper_that_hangs_says_so(monkeypatch):
    stuck = object.__new__(keeper_module.JobKeeper.func_or_class)
    stuck._loop = Future()
    stuck._looked_at = time.monotonic()
    asyncio.run(stuck.check_health())
    stuck._looked_at -= keeper_module.LOOK_LIMIT_S + 1
    with pytest.raises(RuntimeError, match="hangs"):
        asyncio.run(stuck.check_health())


def test_what_another_store_has_recorded_is_not_cleaned_up(bench, tmp_path, monkeypatch):
    """As after a lost database, or where two platforms were given one prefix."""
    for module in (adapters, files):
        monkeypatch.setattr(module, "ORPHAN_S", -1.0)
    theirs = ["adapters/a/manifest.json", "batches/b/parts/1", "files/file-1", "fine_tunes/f/x"]
    for key in theirs:
        bench.storage.put(key, b"x")
    other = Bench(tmp_path / "other")
    assert ownership.claim(bench.storage, other.store.database.identity()) is None
    sweep = keeper_of(bench)._sweep_orphans
    sweep()
    assert [each.key for each in bench.storage.list("")] == [*theirs, ownership.KEY]
    bench.storage.put(ownership.KEY, bench.store.database.identity().encode())
    sweep()
    assert [each.key for each in bench.storage.list("")] == [ownership.KEY]
    other.close()


def keeper_of(bench: Bench) -> Any:
    made = object.__new__(keeper_module.JobKeeper.func_or_class)
    made._store, made._storage = bench.store, bench.storage
    return made
