"""Fine-tunes by their names and by their metadata, their events, and adapters by their ids: on both
databases."""

import time
from typing import Any

import pytest

from llm_engine.errors import Conflict, NotFound
from llm_engine.ids import new_id
from llm_engine.records import AdapterRecord, FineTuneRecord
from llm_engine.statuses import FineTuneState
from llm_engine.store.sql import Store
from tests.stores.making import LIMIT, codes, file, race_of

ODD = 'we"i\\rd[]$.%_\n'


def record(**facts: Any) -> FineTuneRecord:
    made = new_id("ftjob", "-")
    given = {
        "id": made, "owner": "ann", "dialect": "openai", "base": "m", "weights": "w",
        "training_file_id": "file-1", "method": "supervised", "name": f"ft:m:ann::{made}",
        "seed": 1, "state": FineTuneState.VALIDATING, "created_at": time.time(),
    }  # fmt: skip
    return FineTuneRecord(**given | facts)


def create(store: Store, **facts: Any) -> FineTuneRecord:
    return store.fine_tunes.create(record(**facts), LIMIT)


def adapter(of: FineTuneRecord, **facts: Any) -> AdapterRecord:
    given = {"rank": 8, "bytes": 10, "created_at": time.time(), "fine_tune": of.id}
    return AdapterRecord(
        new_id("adapter", "-"), facts.pop("name", of.name), of.owner, of.base, of.weights,
        **given | facts,
    )  # fmt: skip


def test_fine_tunes_are_found_by_their_metadata(store: Store):
    found = store.fine_tunes
    labels: list[Any] = [{"team": "a", "n": "1"}, {"team": "a"}, {ODD: ODD, "e": ""}, None, {}]
    made = [create(store, metadata=each).id for each in labels]
    create(store, owner="ben", metadata={"team": "a"})

    def ids(metadata: dict[str, str] | None) -> list[str]:
        rows, _ = found.page("ann", None, 10, *found.labelled(metadata))
        return [row.id for row in rows]

    assert ids({"team": "a"}) == made[1::-1]
    assert ids({"team": "a", "n": "1"}) == [made[0]]
    assert ids({"team": "b"}) == ids({"": ""}) == ids({ODD: "x"}) == []
    assert ids({ODD: ODD}) == ids({"e": ""}) == [made[2]]
    assert ids(None) == [made[3]]
    assert ids({}) == made[::-1]
    rows, more = found.page(None, None, 2, *found.labelled({"team": "a"}))
    assert more and rows[0].owner == "ben"
    rows, more = found.page(None, rows[1].id, 2, *found.labelled({"team": "a"}))
    assert [row.id for row in rows] == [made[0]] and not more


def test_a_name_is_one_model_s(store: Store):
    first = create(store, name="x")
    with pytest.raises(Conflict) as caught:
        create(store, name="x")
    assert caught.value.code == "name_taken"
    store.fine_tunes.ask_cancel(first.id)
    again = create(store, name="x")  # nothing came of the first
    worked = store.fine_tunes.claim(again.id, "worker", 60)
    store.fine_tunes.finish(worked, adapter(again), file(), 1)
    with pytest.raises(Conflict):
        create(store, name="x")
    store.adapters.delete(store.adapters.get("x").id)
    with pytest.raises(Conflict):  # a name that has meant something once
        create(store, name="x")


def test_of_many_that_want_a_name_one_has_it(store: Store, other: Store):
    given = race_of([store, other] * 2, lambda each, _: create(each, name="x"))
    assert codes(given) == ["name_taken"] * 3


def test_an_adapter_is_found_by_its_id_until_it_is_deleted(store: Store):
    made = create(store)
    checkpoint = adapter(made, name=f"{made.name}:ckpt-step-5", step=5)
    worked = store.fine_tunes.claim(made.id, "worker", 60)
    store.fine_tunes.keep(worked, 5, checkpoint)
    assert store.adapters.find(checkpoint.id) == checkpoint
    assert store.adapters.find("nowhere") is store.adapters.find("a\0b") is None
    store.adapters.delete(checkpoint.id)
    assert store.adapters.find(checkpoint.id) is None


def test_events_are_told_newest_first_page_by_page(store: Store):
    made, other = create(store), create(store)
    worked = store.fine_tunes.claim(made.id, "worker", 60)
    for step in range(1, 6):
        store.fine_tunes.tell(worked, f"Step {step}", data={"step": step})
    store.fine_tunes.ask_cancel(other.id)
    found, more = store.fine_tunes.events(made.id, None, 4)
    assert more and [event.message for event in found] == [f"Step {n}" for n in (5, 4, 3, 2)]
    rest, more = store.fine_tunes.events(made.id, found[-1].id, 4)
    assert not more and [event.type for event in rest] == ["metrics", "message"]
    assert store.fine_tunes.events("nowhere", None, 4) == ([], False)
    with pytest.raises(NotFound):
        store.fine_tunes.get("nowhere")
