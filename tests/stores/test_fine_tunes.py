"""Fine-tunes as records: one worker at a time, no end that is not the last, nothing told twice."""

import time
from dataclasses import replace
from typing import Any

import pytest

from llm_engine.config import MERGED, EndpointSettings
from llm_engine.errors import Conflict, LeaseLost, NotFound
from llm_engine.ids import new_id
from llm_engine.records import AdapterRecord, FileRecord, FineTuneRecord
from llm_engine.statuses import FineTuneState
from llm_engine.store import fine_tunes
from llm_engine.store.idempotency import Once
from llm_engine.store.sql import Store
from tests.stores.making import LIMIT, codes, kinds, race, race_of
from tests.support.fine_tunes import fine_tune_record

EACH = 6  # racers of each of two stores
LEASE_S = 30.0
_S = FineTuneState
OPEN = [state for state in _S if not state.is_final]
ENDED = [state for state in _S if state.is_final]
WORKED_ON = [_S.VALIDATING, _S.QUEUED, _S.RUNNING]
PLAN = {"n_epochs": 3, "total_steps": 30}
ERROR = {"code": "job_failed", "message": "no luck", "param": None}


def create(store: Store, **facts: Any) -> FineTuneRecord:
    return store.fine_tunes.create(fine_tune_record(**facts), LIMIT)


def claimed(store: Store, worker: str = "w1", lease_s: float = LEASE_S) -> FineTuneRecord:
    return store.fine_tunes.claim(create(store).id, worker, lease_s)


def running(store: Store) -> FineTuneRecord:
    record = claimed(store)
    moved = store.fine_tunes.move(record, [_S.VALIDATING], _S.QUEUED, "queued", plan=PLAN)
    assert moved is not None
    moved = store.fine_tunes.move(moved, [_S.QUEUED], _S.RUNNING, "started", total_steps=30)
    assert moved is not None
    return moved


def taken_over(store: Store) -> tuple[FineTuneRecord, FineTuneRecord]:
    """A worker that was silent for too long, and the one that works now."""
    zombie = claimed(store, "zombie", lease_s=-1)
    return zombie, store.fine_tunes.claim(zombie.id, "alive", LEASE_S)


def adapter(of: FineTuneRecord, step: int | None = None, **facts: Any) -> AdapterRecord:
    given = {
        "id": new_id("adapter", "-"), "owner": of.owner, "base": of.base, "weights": of.weights,
        "name": of.name if step is None else f"{of.name}:ckpt-step-{step}", "rank": 8, "bytes": 10,
        "created_at": time.time(), "fine_tune": of.id, "step": step,
        "metrics": {"train_loss": 0.5},
    }  # fmt: skip
    return AdapterRecord(**given | facts)


def results(owner: str = "ann") -> FileRecord:
    file = new_id("file", "-")
    return FileRecord(file, owner, "fine-tune-results", "a.csv", 10, time.time(), f"files/{file}")


def finish(store: Store, record: FineTuneRecord) -> FineTuneRecord:
    return store.fine_tunes.finish(record, adapter(record), results(), 100)


def messages(store: Store, record: FineTuneRecord) -> list[str]:
    return [each.message for each in store.fine_tunes.events(record.id, None, 1000)[0]][::-1]


def into(store: Store, state: FineTuneState) -> FineTuneRecord:
    """One in that state, that nobody works on."""
    if state is _S.VALIDATING:
        return create(store)
    record = running(store)
    if state is _S.SUCCEEDED:
        return finish(store, record)
    if state is _S.FAILED:
        return store.fine_tunes.fail(record, ERROR)
    if state is _S.CANCELLED:
        return store.fine_tunes.ask_cancel(record.id)
    if state is not _S.RUNNING:
        store.fine_tunes.pause(record.id)
    if state is _S.QUEUED:
        store.fine_tunes.resume(record.id)
    store.fine_tunes.release(record, "it died")
    return store.fine_tunes.get(record.id)


# -- create, get


def test_what_was_created_is_read_back_as_it_was_written(store, other):
    wanted = fine_tune_record(
        metadata={"team": "ü\n"}, suffix="s", parent="adapter-1", validation_file_id="file-2",
        hyperparameters={"n_epochs": "auto", "batch_size": 4}, extras={"k": [1]}, sees_all=True,
    )  # fmt: skip
    made = store.fine_tunes.create(wanted, LIMIT)
    assert made == replace(wanted, times={"validating_files": wanted.created_at})
    assert other.fine_tunes.get(made.id) == made
    assert kinds(store, made.id) == ["validating_files"]
    assert messages(store, made) == [f"Created fine-tuning job: {made.id}"]


def test_the_limit_counts_those_of_the_owner_that_have_not_ended(store):
    first = store.fine_tunes.create(fine_tune_record(), 2)
    create(store)
    with pytest.raises(Conflict, match=r"fine_tunes\.max_open") as refused:
        store.fine_tunes.create(fine_tune_record(), 2)
    assert (refused.value.code, refused.value.status) == ("too_many_fine_tunes", 429)
    store.fine_tunes.create(fine_tune_record(owner="ben"), 2)
    store.fine_tunes.ask_cancel(first.id)
    store.fine_tunes.create(fine_tune_record(), 2)


def test_the_limit_is_kept_by_those_who_create_at_once(store, other):
    stores = [store, other] * EACH
    given = race_of(stores, lambda each, _: each.fine_tunes.create(fine_tune_record(), 3))
    assert codes(given) == ["too_many_fine_tunes"] * (len(stores) - 3)
    assert len(store.fine_tunes.open()) == 3


def test_a_request_with_a_key_makes_one_however_often_it_comes(store, other):
    once = Once("ann", fine_tunes.ROUTE, "key", b"\1" * 32)
    given = race_of(
        [store, other] * EACH,
        lambda each, _: each.fine_tunes.create(fine_tune_record(), 99, once),
    )
    assert len({record.id for record in given}) == 1
    assert store.fine_tunes.open() == [given[0]]
    with pytest.raises(Conflict) as refused:
        store.fine_tunes.create(fine_tune_record(), 99, once._replace(digest=b"\2" * 32))
    assert refused.value.code == "idempotency_key_reused"


@pytest.mark.parametrize("unknown", ["ftjob-0", "", "\0", "x" * 5000, "é"])
def test_there_is_none_that_nobody_made(store, unknown):
    for attempt in (
        lambda: store.fine_tunes.get(unknown),
        lambda: store.fine_tunes.ask_cancel(unknown),
        lambda: store.fine_tunes.pause(unknown),
        lambda: store.fine_tunes.resume(unknown),
        lambda: store.fine_tunes.page(None, unknown, 5),
    ):
        with pytest.raises(NotFound, match="Could not find fine tune"):
            attempt()


# -- cancel, pause, resume


@pytest.mark.parametrize("state", sorted(_S))
def test_cancel(store, state):
    before = into(store, state)
    if state in (_S.SUCCEEDED, _S.FAILED):
        with pytest.raises(Conflict, match=f"Cannot cancel a fine-tune with status '{state}'"):
            store.fine_tunes.ask_cancel(before.id)
        assert store.fine_tunes.get(before.id) == before
        return
    asked = store.fine_tunes.ask_cancel(before.id)
    assert (asked.state, asked.worker, asked.reason) == (_S.CANCELLED, None, None)
    assert store.fine_tunes.ask_cancel(before.id) == asked
    assert messages(store, before).count("The job was cancelled") == 1
    assert store.fine_tunes.open() == []


def test_of_many_who_cancel_one_does_and_all_are_told_so(store, other):
    record = create(store)
    given = race_of([store, other] * EACH, lambda each, _: each.fine_tunes.ask_cancel(record.id))
    assert given == [store.fine_tunes.get(record.id)] * len(given)
    assert kinds(store, record.id).count("cancelled") == 1


@pytest.mark.parametrize("state", sorted(_S))
def test_pause(store, state):
    before = into(store, state)
    if state.is_final:
        with pytest.raises(Conflict, match=f"Cannot pause a fine-tune with status '{state}'"):
            store.fine_tunes.pause(before.id)
        assert store.fine_tunes.get(before.id) == before
        return
    paused = store.fine_tunes.pause(before.id)
    assert paused.state is _S.PAUSED and paused.began(_S.PAUSED)
    assert store.fine_tunes.pause(before.id) == paused
    with pytest.raises(LeaseLost):
        store.fine_tunes.claim(before.id, "w", LEASE_S)


@pytest.mark.parametrize("state", sorted(set(_S) - {_S.PAUSED}))
def test_only_what_rests_can_be_resumed(store, state):
    before = into(store, state)
    with pytest.raises(Conflict, match=f"Cannot resume a fine-tune with status '{state}'"):
        store.fine_tunes.resume(before.id)
    assert store.fine_tunes.get(before.id) == before


def test_it_goes_on_where_it_was(store):
    unread = store.fine_tunes.pause(create(store).id)
    assert store.fine_tunes.resume(unread.id).state is _S.VALIDATING
    paused = into(store, _S.PAUSED)
    resumed = store.fine_tunes.resume(paused.id)
    assert (resumed.state, resumed.idle_starts) == (_S.QUEUED, 0)
    assert store.fine_tunes.claim(paused.id, "w", LEASE_S).state is _S.QUEUED


def test_its_worker_may_keep_what_it_has_before_it_rests(store):
    record = running(store)
    store.fine_tunes.pause(record.id)
    assert store.fine_tunes.beat(record, LEASE_S).state is _S.PAUSED
    assert store.fine_tunes.move(record, WORKED_ON, _S.RUNNING, "no") is None
    assert store.fine_tunes.keep(record, 7).step == 7
    store.fine_tunes.leave(record, None, tried=False)
    found = store.fine_tunes.get(record.id)
    assert (found.state, found.step, found.worker) == (_S.PAUSED, 7, None)


def test_one_that_is_paused_at_its_very_end_has_succeeded(store):
    record = running(store)
    store.fine_tunes.pause(record.id)
    assert finish(store, record).state is _S.SUCCEEDED


# -- who works on it


def test_of_many_who_claim_it_one_is_its_worker(store, other):
    record = create(store)

    def claim(each: Store, number: int) -> FineTuneRecord | None:
        try:
            return each.fine_tunes.claim(record.id, f"w{number}", LEASE_S)
        except LeaseLost:
            return None

    given = race_of([store, other] * EACH, claim)
    (won,) = [each for each in given if each is not None]
    assert store.fine_tunes.get(record.id) == won
    assert (won.starts, won.idle_starts) == (1, 1)


@pytest.mark.parametrize("state", ENDED)
def test_what_has_ended_has_no_worker(store, state):
    record = into(store, state)
    with pytest.raises(LeaseLost):
        store.fine_tunes.claim(record.id, "w", LEASE_S)


def deeds(store: Store, record: FineTuneRecord) -> list[Any]:
    """All that a worker can do."""
    tunes = store.fine_tunes
    return [
        lambda: tunes.beat(record, LEASE_S, {"steps_per_s": 1.0}),
        lambda: tunes.note(record, total_steps=99),
        lambda: tunes.leave(record, "from the grave", False),
        lambda: tunes.move(record, OPEN, _S.RUNNING, "from the grave"),
        lambda: tunes.tell(record, "from the grave"),
        lambda: tunes.keep(record, 9, adapter(record, 9)),
        lambda: finish(store, record),
        lambda: tunes.fail(record, ERROR),
    ]


@pytest.mark.parametrize("deed", range(8))
def test_a_zombie_changes_nothing(store, deed):
    zombie, alive = taken_over(store)
    told = messages(store, alive)
    with pytest.raises(LeaseLost):
        deeds(store, zombie)[deed]()
    assert store.fine_tunes.get(alive.id) == alive and messages(store, alive) == told
    assert store.adapters.all() == []


@pytest.mark.parametrize("deed", range(8))
@pytest.mark.parametrize("state", [*ENDED, _S.VALIDATING])
def test_nothing_changes_where_nobody_works_on_it(store, deed, state):
    record = into(store, state)
    adapters, told = store.adapters.all(), messages(store, record)
    for told_as in (record, replace(record, worker="w1")):
        with pytest.raises(LeaseLost):
            deeds(store, told_as)[deed]()
    assert store.fine_tunes.get(record.id) == record
    assert store.adapters.all() == adapters and messages(store, record) == told


@pytest.mark.parametrize("deed", range(8))
def test_a_worker_that_is_late_goes_on_where_nobody_took_over(store, deed):
    record = claimed(store, lease_s=-1)
    deeds(store, record)[deed]()
    told = messages(store, record)
    assert store.fine_tunes.get(record.id) != record or told[-1] == "from the grave"


# -- states and events


def test_a_fine_tune_goes_its_way(store):
    record = running(store)
    assert (record.state, record.plan, record.total_steps) == (_S.RUNNING, PLAN, 30)
    ended = finish(store, record)
    times = [ended.began(s) for s in (*WORKED_ON, _S.SUCCEEDED)]
    assert times == sorted(times) and None not in times
    assert (ended.worker, ended.lease_until, ended.step) == (None, 0.0, 30)
    assert kinds(store, record.id) == [
        "validating_files", "fine_tune.claimed", "queued", "running", "succeeded"
    ]  # fmt: skip
    assert messages(store, record) == [
        f"Created fine-tuning job: {record.id}", "queued", "started",
        f"New fine-tuned model created: {record.name}", "The job has successfully completed",
    ]  # fmt: skip


def test_a_move_from_another_state_does_nothing_and_tells_nothing(store):
    record = running(store)
    assert store.fine_tunes.move(record, [_S.QUEUED], _S.RUNNING, "again") is None
    assert messages(store, record)[-1] == "started"


def test_the_end_the_model_and_its_results_become_visible_together(store):
    record = running(store)
    made, file = adapter(record), results()
    store.files.add(file)  # the same file twice cannot be
    with pytest.raises(Exception, match=r"(?i)unique"):
        store.fine_tunes.finish(record, made, file, 100)
    assert store.fine_tunes.get(record.id) == record and store.adapters.all() == []
    file = results()
    ended = store.fine_tunes.finish(record, made, file, 100)
    assert (ended.adapter, ended.result_file_id, ended.trained_tokens) == (made.id, file.id, 100)
    assert store.adapters.get(record.name) == made and store.files.get(file.id) == file


def test_a_model_whose_name_is_taken_is_a_failure_with_a_cause(store):
    first = running(store)
    store.fine_tunes.keep(first, 10, adapter(first, 10))
    second = running(store)
    ended = store.fine_tunes.finish(
        second, adapter(second, name=f"{first.name}:ckpt-step-10"), results(), 1
    )
    assert (ended.state, ended.error["code"]) == (_S.FAILED, "name_taken")


def test_of_a_cancel_and_an_end_at_once_one_happens(store, other):
    for _ in range(5):
        record = running(store)

        def end(record: FineTuneRecord = record) -> FineTuneRecord | None:
            try:
                return finish(store, record)
            except LeaseLost:
                return None

        ended, asked = race(end, lambda record=record: other.fine_tunes.ask_cancel(record.id))
        found = store.fine_tunes.get(record.id)
        cancelled = isinstance(asked, FineTuneRecord)
        assert cancelled == (ended is None) == (found.state is _S.CANCELLED)
        assert cancelled != bool(store.adapters.of(record.id))


def test_a_step_is_told_once_however_often_it_is_trained(store):
    record = running(store)
    for step in (1, 2, 3, 2, 3, 4, 4):
        store.fine_tunes.tell(record, f"Step {step}", data={"step": step, "train_loss": 0.5})
        store.fine_tunes.tell(record, "Training goes on")
    told = store.fine_tunes.events(record.id, None, 100)[0][::-1]
    assert [each.data["step"] for each in told if each.type == "metrics"] == [1, 2, 3, 4]
    assert messages(store, record).count("Training goes on") == 1
    store.fine_tunes.tell(record, "something else", level="warn")
    store.fine_tunes.tell(record, "Training goes on")
    assert messages(store, record).count("Training goes on") == 2


def test_steps_that_are_told_at_once_are_told_once(store, other):
    record = running(store)
    race_of(
        [store, other] * EACH,
        lambda each, number: each.fine_tunes.tell(record, "Step 1", data={"step": 1}),
    )
    assert messages(store, record).count("Step 1") == 1


def test_events_come_in_pages_newest_first_and_the_oldest_go(store, monkeypatch):
    monkeypatch.setattr(fine_tunes, "MOST_EVENTS", 10)
    record = running(store)
    for step in range(1, 21):
        store.fine_tunes.tell(record, f"Step {step}", data={"step": step})
    seen: list[str] = []
    before, more = None, True
    while more:
        page, more = store.fine_tunes.events(record.id, before, 4)
        seen += [event.message for event in page]
        before = page[-1].id
    assert seen == [f"Step {step}" for step in range(20, 10, -1)]


# -- checkpoints


def test_what_is_kept_counts_and_can_be_served(store):
    record = running(store)
    made = adapter(record, 10)
    told = store.fine_tunes.keep(record, 10, made)
    assert (told.step, told.idle_starts) == (10, 0)
    assert store.adapters.of(record.id) == [made] == store.adapters.all()
    assert messages(store, record)[-1] == "Checkpoint created at step 10"
    assert store.fine_tunes.keep(record, 10, made).step == 10
    assert messages(store, record).count("Checkpoint created at step 10") == 1


def test_a_step_that_is_trained_again_makes_no_second_checkpoint(store):
    record = running(store)
    first, second = adapter(record, 10), adapter(record, 10)
    store.fine_tunes.keep(record, 10, first)
    store.fine_tunes.keep(record, 10, second)
    store.adapters.delete(first.id)
    store.fine_tunes.keep(record, 10, second)  # whoever has deleted it does not want it back
    assert store.adapters.of(record.id) == []


def test_steps_only_go_up_and_older_ones_are_no_progress(store):
    record = running(store)
    store.fine_tunes.keep(record, 10)
    store.fine_tunes.release(record, "it died")
    again = store.fine_tunes.claim(record.id, "next", LEASE_S)
    assert (again.idle_starts, again.step) == (1, 10)
    kept = store.fine_tunes.keep(again, 5)
    assert (kept.step, kept.idle_starts) == (10, 1)
    assert store.fine_tunes.keep(again, 11).idle_starts == 0


def test_an_adapter_that_is_deleted_has_no_name_until_it_is_forgotten(store):
    record = running(store)
    made = adapter(record, 10)
    store.fine_tunes.keep(record, 10, made)
    assert store.adapters.delete(made.id) and not store.adapters.delete(made.id)
    with pytest.raises(NotFound):
        store.adapters.get(made.name)
    (gone,) = store.adapters.deleted()
    assert gone.id == made.id and store.adapters.all() == store.adapters.of(record.id) == []
    store.adapters.forget(made.id)
    assert store.adapters.deleted() == []


def test_an_adapter_that_a_fine_tune_goes_on_from_stays_until_that_has_ended(store):
    record = running(store)
    made = adapter(record, 10)
    store.fine_tunes.keep(record, 10, made)
    later = create(store, parent=made.id)
    with pytest.raises(Conflict, match=later.id) as refused:
        store.adapters.delete(made.id)
    assert refused.value.code == "model_in_use"
    assert store.adapters.find(made.id) == made and "adapter.deleted" not in kinds(store, made.id)
    store.fine_tunes.ask_cancel(later.id)
    assert store.adapters.delete(made.id)


def test_an_adapter_that_an_endpoint_is_made_of_stays_as_long_as_that(store):
    record = running(store)
    made = adapter(record, 10)
    store.fine_tunes.keep(record, 10, made)
    settings = EndpointSettings(name="own", model=f"{MERGED}{made.id}")
    endpoint = store.endpoints.create(settings, "ann", {}, LIMIT)
    with pytest.raises(Conflict, match="'own'") as refused:
        store.adapters.delete(made.id)
    assert refused.value.code == "model_in_use" and store.adapters.find(made.id) == made
    store.endpoints.remove(endpoint)
    assert store.adapters.delete(made.id)


def test_of_many_who_delete_an_adapter_one_does(store, other):
    record = running(store)
    made = adapter(record, 10)
    store.fine_tunes.keep(record, 10, made)
    given = race_of([store, other] * EACH, lambda each, _: each.adapters.delete(made.id))
    assert given.count(True) == 1 and kinds(store, made.id).count("adapter.deleted") == 1


# -- the keeper


def test_open_ones_are_told_oldest_first_and_those_that_rest_are_open(store):
    made = sorted((create(store) for _ in range(3)), key=lambda record: record.id)
    store.fine_tunes.ask_cancel(made[1].id)
    store.fine_tunes.pause(made[2].id)
    assert [record.id for record in store.fine_tunes.open()] == [made[0].id, made[2].id]


def test_a_dead_worker_is_released_and_only_that_one(store):
    zombie, alive = taken_over(store)
    assert not store.fine_tunes.release(zombie, "it died")
    assert store.fine_tunes.release(alive, "it died")
    assert kinds(store, alive.id)[-1] == "fine_tune.interrupted"
    assert store.fine_tunes.claim(alive.id, "next", LEASE_S).starts == 3


def test_without_a_worker_it_can_be_ended_and_with_one_it_cannot(store):
    record = claimed(store)
    assert store.fine_tunes.end(record, ERROR) is None
    store.fine_tunes.release(record, "it died")
    ended = store.fine_tunes.end(record, ERROR)
    assert ended is not None and (ended.state, ended.error) == (_S.FAILED, ERROR)
    assert messages(store, record)[-1] == "The job failed: no luck"
    assert store.fine_tunes.end(ended, ERROR) is None


def test_who_leaves_for_no_fault_of_its_own_has_not_tried(store):
    record = claimed(store)
    store.fine_tunes.leave(record, "its storage is away", tried=False)
    found = store.fine_tunes.get(record.id)
    assert (found.worker, found.starts, found.idle_starts) == (None, 1, 0)
    again = store.fine_tunes.claim(record.id, "next", LEASE_S)
    store.fine_tunes.leave(again, "its trainer died", tried=True)
    assert store.fine_tunes.get(record.id).idle_starts == 1


def test_of_a_claim_and_a_pause_at_once_the_pause_is_seen(store, other):
    for _ in range(5):
        record = create(store)

        def claim(record: FineTuneRecord = record) -> FineTuneRecord | None:
            try:
                return store.fine_tunes.claim(record.id, "w", LEASE_S)
            except LeaseLost:
                return None

        worker, _ = race(claim, lambda record=record: other.fine_tunes.pause(record.id))
        assert store.fine_tunes.get(record.id).state is _S.PAUSED
        if worker is not None:
            assert store.fine_tunes.beat(worker, LEASE_S).state is _S.PAUSED
