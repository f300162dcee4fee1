"""Batches as records: one worker at a time, no row counted twice, no end that is not the last."""

import time
from dataclasses import replace
from typing import Any

import pytest

from llm_engine.errors import Conflict, LeaseLost, NotFound
from llm_engine.ids import new_id
from llm_engine.records import BatchOptions, BatchPart, BatchRecord, FileRecord, Usage
from llm_engine.statuses import BatchState
from llm_engine.store.idempotency import Once
from llm_engine.store.sql import Store
from tests.stores.making import LIMIT, batch, codes, kinds, race, race_of

EACH = 6  # racers of each of two stores
LEASE_S = 30.0
OPEN = [state for state in BatchState if not state.is_final]
ENDED = [state for state in BatchState if state.is_final]
STATES = sorted(BatchState)


def create(store: Store, **facts: Any) -> BatchRecord:
    return store.batches.create(batch(**facts), LIMIT)


def claimed(store: Store, worker: str = "w1", lease_s: float = LEASE_S) -> BatchRecord:
    return store.batches.claim(create(store).id, worker, lease_s)


def running(store: Store) -> BatchRecord:
    record = claimed(store)
    moved = store.batches.move(record, [BatchState.VALIDATING], BatchState.IN_PROGRESS, total=10)
    assert moved is not None
    return moved


def taken_over(store: Store) -> tuple[BatchRecord, BatchRecord]:
    """A worker that was silent for too long, and the one that works now."""
    zombie = claimed(store, "zombie", lease_s=-1)
    return zombie, store.batches.claim(zombie.id, "alive", LEASE_S)


def part(number: int, *rows: int, failed: int = 0, **usage: int) -> BatchPart:
    return BatchPart(number, f"batches/b/parts/{number:05}", rows, failed, Usage(**usage))


def result(owner: str = "ann") -> FileRecord:
    file = new_id("file", "-")
    return FileRecord(file, owner, "batch_output", "out.jsonl", 10, time.time(), f"files/{file}")


# -- create, get, page


def test_what_was_created_is_read_back_as_it_was_written(store, other):
    wanted = batch(
        metadata={"team": "ü\n"},
        sees_all=True,
        model="m",
        usage=Usage(1, 2, 3, 4),
        errors=[{"code": "invalid_url", "message": "x", "param": "url", "line": 3}],
        options=BatchOptions(
            output_expires_after_s=3600, own_engine={"name": "x", "vllm_args": {"seed": 1}},
            output_path="out.json", output_form="scale_v1", labels={"a": "b"}, extras={"k": [1]},
        ),
    )  # fmt: skip
    made = store.batches.create(wanted, LIMIT)
    assert made == replace(wanted, times={"validating": wanted.created_at})
    assert other.batches.get(made.id) == made
    assert kinds(store, made.id) == ["validating"]


def test_the_limit_counts_those_of_the_owner_that_have_not_ended(store):
    first = store.batches.create(batch(), 2)
    create(store)
    with pytest.raises(Conflict, match=r"batches\.max_open") as refused:
        store.batches.create(batch(), 2)
    assert (refused.value.code, refused.value.status) == ("too_many_batches", 429)
    store.batches.create(batch("ben"), 2)
    assert store.batches.end(first, BatchState.EXPIRED)
    store.batches.create(batch(), 2)


def test_the_limit_is_kept_by_those_who_create_at_once(store, other):
    stores = [store, other] * EACH
    given = race_of(stores, lambda each, _: each.batches.create(batch(), 3))
    assert codes(given) == ["too_many_batches"] * (len(stores) - 3)
    assert len(store.batches.open()) == 3


def test_a_request_with_a_key_makes_one_batch_however_often_it_comes(store, other):
    once = Once("ann", "batches", "key", b"\1" * 32)
    given = race_of([store, other] * EACH, lambda each, _: each.batches.create(batch(), 99, once))
    assert len({record.id for record in given}) == 1
    assert store.batches.open() == [given[0]]
    with pytest.raises(Conflict) as refused:
        store.batches.create(batch(), 99, once._replace(digest=b"\2" * 32))
    assert refused.value.code == "idempotency_key_reused"


def test_a_batch_that_was_refused_leaves_its_key_free(store):
    once = Once("ann", "batches", "key", b"\1" * 32)
    first = create(store)
    with pytest.raises(Conflict):
        store.batches.create(batch(), 1, once)
    store.batches.end(first, BatchState.FAILED)
    assert store.batches.create(batch(), 1, once).id != first.id


@pytest.mark.parametrize("unknown", ["batch_0", "", "\0", "x" * 5000, "é"])
def test_there_is_no_batch_that_nobody_made(store, unknown):
    for attempt in (
        lambda: store.batches.get(unknown),
        lambda: store.batches.ask_cancel(unknown),
        lambda: store.batches.page(None, unknown, 5),
    ):
        with pytest.raises(NotFound, match="No batch found"):
            attempt()


def test_pages_hold_every_batch_of_the_owner_once_newest_first(store):
    made = sorted(create(store).id for _ in range(5))
    others = create(store, owner="ben").id
    seen: list[str] = []
    more = True
    while more:
        found, more = store.batches.page("ann", seen[-1] if seen else None, 2)
        seen += [record.id for record in found]
    assert seen == made[::-1]
    everybody, more = store.batches.page(None, None, 100)
    assert [record.id for record in everybody] == [others, *made[::-1]] and not more
    with pytest.raises(NotFound):
        store.batches.page("ann", others, 2)


# -- cancel


def into(store: Store, record: BatchRecord, state: BatchState) -> BatchRecord:
    if state is BatchState.CANCELLING:
        return store.batches.ask_cancel(record.id)
    if state.is_final:
        ended = store.batches.end(record, state)
        assert ended is not None
        return ended
    if state is not BatchState.VALIDATING:
        worker = store.batches.claim(record.id, "w", LEASE_S)
        store.batches.move(worker, [BatchState.VALIDATING], state, outcome="completed")
    return store.batches.get(record.id)


@pytest.mark.parametrize("state", STATES)
def test_cancel(store, state):
    before = into(store, create(store), state)
    if state in (BatchState.COMPLETED, BatchState.FAILED, BatchState.EXPIRED):
        with pytest.raises(Conflict, match=f"Cannot cancel a batch with status '{state}'"):
            store.batches.ask_cancel(before.id)
        assert store.batches.get(before.id) == before
        return
    asked = store.batches.ask_cancel(before.id)
    if state in (BatchState.CANCELLING, BatchState.CANCELLED):
        assert asked == before
        return
    assert (asked.state, asked.outcome) == (BatchState.CANCELLING, "cancelled")
    assert asked.began(BatchState.CANCELLING) and asked.began(BatchState.VALIDATING)
    assert store.batches.ask_cancel(before.id) == asked
    assert kinds(store, before.id)[-1] == "cancelling"


def test_of_many_who_cancel_one_does_and_all_are_told_so(store, other):
    record = create(store)
    given = race_of([store, other] * EACH, lambda each, _: each.batches.ask_cancel(record.id))
    assert given == [store.batches.get(record.id)] * len(given)
    assert kinds(store, record.id).count("cancelling") == 1


def test_a_batch_that_was_cancelled_while_it_ended_is_cancelled(store):
    record = running(store)
    final = store.batches.move(record, [BatchState.IN_PROGRESS], BatchState.FINALIZING)
    assert final is not None
    store.batches.ask_cancel(record.id)
    file = result()
    ended = store.batches.finish(
        final, BatchState.COMPLETED, [file], output_file_id=file.id, completed=10
    )
    assert (ended.state, ended.output_file_id, ended.completed) == ("cancelled", file.id, 10)
    assert ended.began(BatchState.COMPLETED) is None


# -- who works on it


def test_of_many_who_claim_it_one_is_its_worker(store, other):
    record = create(store)

    def claim(each: Store, number: int) -> BatchRecord | None:
        try:
            return each.batches.claim(record.id, f"w{number}", LEASE_S)
        except LeaseLost:
            return None

    given = race_of([store, other] * EACH, claim)
    (won,) = [each for each in given if each is not None]
    assert store.batches.get(record.id) == won
    assert (won.starts, won.idle_starts) == (1, 1)
    assert won.lease_until == pytest.approx(time.time() + LEASE_S, abs=10)


def test_whose_lease_has_ended_may_be_replaced_and_nobody_else(store):
    zombie, alive = taken_over(store)
    assert (alive.worker, alive.starts, alive.idle_starts) == ("alive", 2, 2)
    with pytest.raises(LeaseLost):
        store.batches.claim(zombie.id, "third", LEASE_S)


@pytest.mark.parametrize("state", ENDED)
def test_what_has_ended_has_no_worker(store, state):
    record = into(store, create(store), state)
    with pytest.raises(LeaseLost):
        store.batches.claim(record.id, "w", LEASE_S)


def test_a_claim_ends_the_wait(store):
    record = create(store)
    store.batches.say(record, "it waits its turn")
    assert store.batches.get(record.id).reason == "it waits its turn"
    assert store.batches.claim(record.id, "w", LEASE_S).reason is None


def deeds(store: Store, record: BatchRecord) -> list[Any]:
    """All that a worker can do."""
    batches = store.batches
    return [
        lambda: batches.beat(record, LEASE_S, {"rows_per_s": 1.0}),
        lambda: batches.move(record, OPEN, BatchState.FINALIZING),
        lambda: batches.note(record, reason="from the grave"),
        lambda: batches.add_part(record, part(7, 1, 2)),
        lambda: batches.finish(record, BatchState.COMPLETED, [result()]),
        lambda: batches.leave(record, "from the grave", False),
    ]


@pytest.mark.parametrize("deed", range(6))
def test_a_zombie_changes_nothing(store, deed):
    zombie, alive = taken_over(store)
    with pytest.raises(LeaseLost):
        deeds(store, zombie)[deed]()
    assert store.batches.get(alive.id) == alive and store.batches.parts(alive.id) == []


@pytest.mark.parametrize("deed", range(6))
def test_who_never_claimed_it_is_not_its_worker(store, deed):
    record = create(store)
    with pytest.raises(LeaseLost):
        deeds(store, record)[deed]()
    assert store.batches.get(record.id) == record


@pytest.mark.parametrize("deed", range(6))
def test_nothing_changes_once_it_has_ended(store, deed):
    record = running(store)
    ended = store.batches.finish(record, BatchState.COMPLETED, [])
    with pytest.raises(LeaseLost):
        deeds(store, record)[deed]()
    assert store.batches.get(record.id) == ended


@pytest.mark.parametrize("deed", range(6))
def test_a_worker_that_is_late_goes_on_where_nobody_took_over(store, deed):
    record = claimed(store, lease_s=-1)
    deeds(store, record)[deed]()
    assert store.batches.get(record.id) != record


def test_a_heartbeat_tells_of_a_cancellation_and_is_no_change(store):
    record = claimed(store)
    told = store.batches.beat(record, 60, {"rows_per_s": 2.5})
    assert told.lease_until > record.lease_until and told.progress == {"rows_per_s": 2.5}
    assert told.revision == record.revision
    assert store.batches.beat(record, 60).progress == {"rows_per_s": 2.5}
    store.batches.ask_cancel(record.id)
    assert store.batches.beat(record, 60).state is BatchState.CANCELLING


# -- states


def test_a_batch_goes_its_way(store):
    record = running(store)
    assert (record.state, record.total) == (BatchState.IN_PROGRESS, 10)
    after = store.batches.move(
        record, [BatchState.IN_PROGRESS], BatchState.FINALIZING, outcome="completed"
    )
    assert after is not None
    ended = store.batches.finish(after, BatchState.COMPLETED, [])
    times = [ended.began(BatchState(s)) for s in ("validating", "in_progress", "finalizing",
                                                  "completed")]  # fmt: skip
    assert times == sorted(times) and None not in times
    assert (ended.worker, ended.lease_until) == (None, 0.0)
    assert kinds(store, record.id) == [
        "validating", "batch.claimed", "in_progress", "finalizing", "completed"
    ]  # fmt: skip
    assert store.batches.open() == []


def test_a_move_from_another_state_does_nothing(store):
    record = running(store)
    store.batches.ask_cancel(record.id)
    assert store.batches.move(record, [BatchState.IN_PROGRESS], BatchState.FINALIZING) is None
    assert store.batches.get(record.id).state is BatchState.CANCELLING


def test_usage_and_other_columns_are_noted(store):
    record = store.batches.note(claimed(store), usage=Usage(1, 2, 3, 4), model="m", reason="x")
    assert (record.usage, record.model, record.reason) == (Usage(1, 2, 3, 4), "m", "x")
    assert store.batches.get(record.id) == record


# -- parts


def test_rows_count_as_finished_with_the_part_that_holds_them(store):
    record = running(store)
    store.batches.add_part(record, part(0, 3, 1, 2, failed=1, prompt_tokens=5, cached_tokens=2))
    told = store.batches.add_part(record, part(1, 0, completion_tokens=7))
    assert (told.completed, told.failed, told.idle_starts) == (3, 1, 0)
    assert told.usage == Usage(prompt_tokens=5, cached_tokens=2, completion_tokens=7)
    assert store.batches.parts(record.id) == [
        part(0, 3, 1, 2, failed=1, prompt_tokens=5, cached_tokens=2),
        part(1, 0, completion_tokens=7),
    ]


def test_a_part_that_is_told_twice_counts_once(store):
    record = running(store)
    first = store.batches.add_part(record, part(0, 0, 1))
    assert store.batches.add_part(record, part(0, 0, 1)) == first
    assert (first.completed, len(store.batches.parts(record.id))) == (2, 1)


def test_parts_that_come_at_once_are_all_counted(store, other):
    record = running(store)
    given = race_of(
        [store, other] * EACH,
        lambda each, number: each.batches.add_part(
            record, part(number, 2 * number, 2 * number + 1, failed=1, prompt_tokens=3)
        ),
    )
    told = store.batches.get(record.id)
    assert (told.completed, told.failed, told.usage.prompt_tokens) == (12, 12, 36)
    assert max(each.completed for each in given) == 12


def test_parts_are_taken_while_it_is_being_cancelled(store):
    record = running(store)
    store.batches.ask_cancel(record.id)
    assert store.batches.add_part(record, part(0, 0)).completed == 1


def test_the_end_and_its_files_become_visible_together(store):
    record = running(store)
    store.batches.add_part(record, part(0, 0, 1))
    good, bad = result(), result()
    store.files.add(bad)  # the same file twice cannot be
    with pytest.raises(Exception, match=r"(?i)unique"):
        store.batches.finish(record, BatchState.COMPLETED, [good, bad])
    assert store.batches.get(record.id).state is BatchState.IN_PROGRESS
    assert len(store.batches.parts(record.id)) == 1
    with pytest.raises(NotFound):
        store.files.get(good.id)
    ended = store.batches.finish(
        record, BatchState.EXPIRED, [good], output_file_id=good.id, reason="too late"
    )
    assert (ended.state, ended.output_file_id, ended.reason) == ("expired", good.id, "too late")
    assert store.files.get(good.id) == good and store.batches.parts(record.id) == []


# -- the keeper


def test_open_ones_are_told_oldest_first(store):
    made = sorted((create(store) for _ in range(3)), key=lambda record: record.id)
    store.batches.end(made[1], BatchState.FAILED)
    assert [record.id for record in store.batches.open()] == [made[0].id, made[2].id]


def test_a_dead_worker_is_released_and_only_that_one(store):
    zombie, alive = taken_over(store)
    assert not store.batches.release(zombie, "it died")
    assert store.batches.get(alive.id) == alive
    assert store.batches.release(alive, "it died")
    assert not store.batches.release(store.batches.get(alive.id), "again")
    assert kinds(store, alive.id)[-1] == "batch.interrupted"
    assert store.batches.claim(alive.id, "next", LEASE_S).starts == 3
    with pytest.raises(LeaseLost):
        store.batches.beat(alive, LEASE_S)


def test_without_a_worker_it_can_be_ended_and_with_one_it_cannot(store):
    record = claimed(store)
    assert store.batches.end(record, BatchState.FAILED) is None
    store.batches.release(record, "it died")
    error = {"code": "job_failed", "message": "m", "param": None, "line": None}
    ended = store.batches.end(record, BatchState.FAILED, reason="m", errors=[error])
    assert ended is not None
    assert (ended.state, ended.reason, ended.errors) == ("failed", "m", [error])
    assert store.batches.end(ended, BatchState.EXPIRED) is None
    store.batches.say(ended, "nothing more to say")
    assert store.batches.get(record.id) == ended


def test_without_a_worker_what_has_finished_can_be_concluded(store):
    record = running(store)
    store.batches.add_part(record, part(1, 1, 2))
    reason = {"reason": "m", "errors": [{"code": "job_failed", "message": "m"}]}
    assert store.batches.conclude(record, **reason) is None
    store.batches.release(record, "it died")
    concluded = store.batches.conclude(record, **reason)
    assert concluded is not None
    assert (concluded.state, concluded.outcome, concluded.idle_starts) == (
        "finalizing", "completed", 0,
    )  # fmt: skip
    assert concluded.reason == "m" and len(store.batches.parts(record.id)) == 1
    assert store.batches.conclude(record, **reason) is None
    store.batches.end(concluded, BatchState.FAILED)
    assert store.batches.parts(record.id) == []


def test_who_leaves_for_no_fault_of_its_own_has_not_tried(store):
    record = claimed(store)
    store.batches.leave(record, "its storage is away", tried=False)
    found = store.batches.get(record.id)
    assert (found.worker, found.starts, found.idle_starts) == (None, 1, 0)
    assert found.reason == "its storage is away"
    assert store.batches.claim(record.id, "next", LEASE_S).starts == 2


def test_who_leaves_and_could_have_got_somewhere_has_tried(store):
    record = claimed(store)
    store.batches.leave(record, "its storage is away", tried=True)
    assert store.batches.get(record.id).idle_starts == 1


def test_of_a_claim_and_an_end_at_once_one_happens(store, other):
    for _ in range(5):
        record = create(store)

        def claim(record: BatchRecord = record) -> BatchRecord | None:
            try:
                return store.batches.claim(record.id, "w", LEASE_S)
            except LeaseLost:
                return None

        worker, ended = race(
            claim, lambda record=record: other.batches.end(record, BatchState.EXPIRED)
        )
        assert (worker is None) != (ended is None)
