"""Parts in any order become results in the input's order, with flat memory."""

import asyncio
import errno
import json
import tracemalloc

import pytest

from llm_engine import patience
from llm_engine.batches import outcomes
from llm_engine.batches.conclusion import Conclusion
from llm_engine.batches.job import Job
from llm_engine.batches.lease import Lease
from llm_engine.batches.parts import Parts
from llm_engine.batches.results import Spool, add_unfinished, write
from llm_engine.config import Settings, parse
from llm_engine.errors import LeaseLost, StorageUnavailable
from llm_engine.records import BatchPart
from llm_engine.statuses import BatchState
from llm_engine.storage.local import LocalStorage
from llm_engine.store.sql import Store
from tests.support.batches import Bench, batch_record, jsonl, row

BATCH = batch_record(id="batch_ab")


def part(storage, number, rows, failed=()):
    """Of rows that failed and rows that did not, as the job writes it."""
    order = [r for r in rows if r not in failed] + [r for r in rows if r in failed]
    lines = [outcomes.failure(BATCH.id, r, f"row-{r}", "c", f"end {r}").line for r in order]
    key = f"batches/{BATCH.id}/parts/{number}"
    storage.put(key, b"".join(lines))
    return BatchPart(number, key, tuple(order), len(failed))


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(tmp_path)


def ids(lines):
    return [json.loads(line)["custom_id"] for line in lines]


def test_rows_come_in_the_inputs_order_and_failed_ones_apart(storage):
    parts = [part(storage, 1, [5, 1], {1}), part(storage, 2, [0, 3, 2]), part(storage, 3, [4], {4})]
    with Spool(6) as spool:
        spool.collect(storage, parts)
        assert ids(spool.lines(failed=False)) == ["row-0", "row-2", "row-3", "row-5"]
        assert ids(spool.lines(failed=True)) == ["row-1", "row-4"]
        assert ids(spool.lines()) == [f"row-{i}" for i in range(6)]
        assert (spool.completed, spool.failed, list(spool.missing())) == (4, 2, [])


def test_rows_that_never_ran_get_an_error_under_their_own_id(storage):
    storage.put("files/in", b"\xef\xbb\xbf\r\n" + jsonl(row(i) for i in range(6)))
    with Spool(6) as spool:
        spool.collect(storage, [part(storage, 1, [4, 0])])
        add_unfinished(spool, BATCH, storage, "files/in", outcomes.EXPIRED)
        errors = [json.loads(line) for line in spool.lines(failed=True)]
    assert [each["custom_id"] for each in errors] == ["row-1", "row-2", "row-3", "row-5"]
    assert all(each["error"] == outcomes.EXPIRED for each in errors)
    assert all(each["response"] is None for each in errors)


@pytest.mark.parametrize("key", [None, "files/gone"])
def test_an_input_that_is_gone_costs_just_the_ids(storage, key):
    with Spool(2) as spool:
        add_unfinished(spool, BATCH, storage, key, outcomes.EXPIRED)
        assert ids(spool.lines()) == [None, None]


def test_a_part_that_is_short_of_a_line_is_an_error_and_not_a_lost_row(storage):
    broken = part(storage, 1, [0, 1])
    storage.put(broken.key, b"".join(storage.read(broken.key)).split(b"\n")[0])
    with Spool(2) as spool, pytest.raises(ValueError):
        spool.collect(storage, [broken])


def test_who_has_lost_the_lease_puts_nothing_in_place(storage):
    def lost():
        raise LeaseLost("another one")

    with pytest.raises(LeaseLost):
        write(storage, "files/out", [b"line\n"], lost)
    assert storage.stat("files/out") is None


def test_memory_does_not_grow_with_the_results(storage):
    line = b"x" * 100_000 + b"\n"
    parts = []
    for number in range(10):
        storage.put(f"p/{number}", line * 50)
        parts.append(BatchPart(number, f"p/{number}", tuple(range(number, 500, 10)), 0))
    tracemalloc.start()
    with Spool(500) as spool:
        spool.collect(storage, parts)
        size = write(storage, "files/out", spool.lines(), lambda: None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size == 500 * len(line) and peak < 10 * 2**20


class LostLease:
    """Another job has the batch; `there`: what it finds on record of this one's parts."""

    record, tag = batch_record(), "0"

    def __init__(self, there: bool) -> None:
        self.there = there

    async def add_part(self, part: BatchPart) -> None:
        raise LeaseLost("another one has it")

    async def has(self, part: BatchPart) -> bool:
        return self.there


@pytest.mark.parametrize("there", [False, True])
async def test_a_part_keeps_its_bytes_only_where_it_was_recorded_unheard(tmp_path, there):
    storage = LocalStorage(tmp_path)
    parts = Parts(LostLease(there), storage, 1, [])
    parts.add(outcomes.Finished(0, b"{}\n", False))
    with pytest.raises(LeaseLost):
        await parts.flush()
    assert len(list(storage.list("batches/"))) == there


@pytest.mark.parametrize("place", ["__init__", "add", "flush"])
def test_a_nodes_full_disk_is_no_fault_of_the_batchs(storage, tmp_path, monkeypatch, place):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Spool, place, full)
    monkeypatch.setattr(patience, "PATIENCE_S", 0.0)
    store = Store.open(f"sqlite:///{tmp_path}/store.db")
    record = store.batches.create(batch_record(total=1), 9)

    async def conclude():
        lease = Lease(store, 60)
        await lease.claim(record.id)
        await lease.add_part(part(storage, 1, [0]))
        await Conclusion(Settings(), store, storage, lease).write()

    with pytest.raises(StorageUnavailable, match=r"node's disk .* No space left on device"):
        asyncio.run(conclude())
    store.close()


def test_of_a_batch_that_no_job_began_in_its_time_every_row_has_a_line(tmp_path):
    settings = parse({"cluster": {"state_dir": str(tmp_path)}}, {})
    bench = Bench(settings, ["http://127.0.0.1:9"])  # nobody listens
    batch = bench.batch([row(i) for i in range(3)], window_s=-60.0)
    asyncio.run(Job(settings, bench.gateways, bench.store, bench.storage, print).run(batch.id))
    record = bench.get(batch)
    assert (record.state, record.total, record.failed) == (BatchState.EXPIRED, 3, 3)
    _, errors = bench.results(batch)
    assert [(each["custom_id"], each["error"]["code"]) for each in errors] == [
        (f"row-{number}", "batch_expired") for number in range(3)
    ]
    bench.close()
