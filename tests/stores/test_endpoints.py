"""Endpoints as records: who wins a race, what an operation changes, which events it leaves."""

import pytest
from sqlalchemy.exc import SQLAlchemyError

from llm_engine.config import EndpointSettings
from llm_engine.endpoints import OPERATOR, declaration
from llm_engine.errors import Conflict, NotFound, StoreUnavailable
from llm_engine.records import EndpointRecord
from llm_engine.statuses import EndpointState
from llm_engine.store.endpoints import LEARNED_FROM
from llm_engine.store.sql import Store
from tests.stores.making import (
    ENGINE,
    LIGHT,
    LIMIT,
    codes,
    create,
    declare,
    during_a_change,
    kinds,
    race,
    race_of,
    ready,
    settle,
    spec,
    to,
)

PENDING, READY = EndpointState.UPDATE_PENDING, EndpointState.READY
FAILED, DELETING = EndpointState.UPDATE_FAILED, EndpointState.DELETE_IN_PROGRESS
PHASES = {"queued": 0.25, "scheduling": 1.5, "loading": None, "warming": None}
EACH = 6  # racers of each of two stores


# -- create


def test_what_was_created_is_read_back_as_it_was_written(store, other):
    extras = {"metadata": {"ü": [1, 2.5, None, "\n"]}, "labels": {}}
    made = store.endpoints.create(spec(**ENGINE, public=False), "ann", extras, LIMIT)
    assert (made.owner, made.origin, made.extras) == ("ann", "api", extras)
    assert (made.state, made.settled, made.revision) == (PENDING, False, 0)
    assert EndpointSettings.model_validate(made.spec) == spec(**ENGINE, public=False)
    assert made.created_at == made.requested_at == made.updated_at
    assert other.endpoints.get("m") == made
    assert other.endpoints.all() == [made]


def test_a_name_is_taken_once_whoever_owns_it(store):
    made = create(store)
    with pytest.raises(Conflict) as refused:
        store.endpoints.create(spec(), "ben", {}, LIMIT)
    assert (refused.value.code, refused.value.param) == ("name_taken", "name")
    assert store.endpoints.all() == [made]


def test_of_many_who_create_the_same_name_one_does(store, other):
    stores = [store, other] * EACH
    given = race_of(stores, lambda each, _: create(each))
    assert codes(given) == ["name_taken"] * (len(stores) - 1)
    (made,) = store.endpoints.all()
    assert kinds(store, made.id) == ["created", "UPDATE_PENDING"]


def test_the_limit_is_kept_and_one_that_goes_makes_room(store):
    create(store, "a")
    last = create(store, "b")
    with pytest.raises(Conflict) as refused:
        store.endpoints.create(spec("c"), "ann", {}, 2)
    assert refused.value.code == "too_many_endpoints"
    store.endpoints.remove(store.endpoints.ask_delete(last.name))
    assert store.endpoints.create(spec("c"), "ann", {}, 2).name == "c"


def test_the_limit_is_kept_by_those_who_create_at_once(store, other):
    limit = 3

    def attempt(each: Store, number: int) -> EndpointRecord:
        return each.endpoints.create(spec(f"m{number}"), "ann", {}, limit)

    race_of([store, other] * EACH, attempt)
    assert len(store.endpoints.all()) == limit


def test_there_is_no_endpoint_that_nobody_made(store):
    for attempt in (
        lambda: store.endpoints.get("m"),
        lambda: store.endpoints.ask_change("m", to()),
        lambda: store.endpoints.ask_delete("m"),
    ):
        with pytest.raises(NotFound) as refused:
            attempt()
        assert refused.value.code == "endpoint_not_found"


# -- compare and set


def test_of_many_who_observe_one_revision_one_is_believed(store, other):
    record = create(store)

    def observe(each: Store, number: int) -> EndpointRecord | None:
        return each.endpoints.observe(record, READY, f"from {number}", True, None)

    given = race_of([store, other] * EACH, observe)
    (won,) = [each for each in given if each is not None]
    assert store.endpoints.get("m") == won
    assert won.revision == record.revision + 1
    assert kinds(store, record.id) == ["created", "UPDATE_PENDING", "READY"]


def test_of_many_who_ask_for_an_update_one_begins(store, other):
    record = ready(store)
    stores = [store, other] * EACH

    def change(each: Store, number: int) -> EndpointRecord:
        return each.endpoints.ask_change("m", to(vllm_args={"seed": number}))

    given = race_of(stores, change)
    (won,) = [each for each in given if isinstance(each, EndpointRecord)]
    assert codes(given) == ["operation_in_progress"] * (len(stores) - 1)
    assert store.endpoints.get("m") == won
    assert won.revision == record.revision + 1
    assert kinds(store, record.id)[3:] == ["update.requested", "UPDATE_PENDING"]


def test_of_many_who_ask_to_delete_one_is_told_yes(store, other):
    record = ready(store)
    stores = [store, other] * EACH
    given = race_of(stores, lambda each, _: each.endpoints.ask_delete("m"))
    assert codes(given) == ["operation_in_progress"] * (len(stores) - 1)
    assert store.endpoints.get("m").revision == record.revision + 1
    assert kinds(store, record.id)[3:] == ["DELETE_IN_PROGRESS"]


def test_changes_that_do_not_exclude_each_other_all_count(store, other):
    record = ready(store)
    stores = [store, other] * EACH

    def change(each: Store, number: int) -> EndpointRecord:
        return each.endpoints.ask_change(
            "m", lambda found: (spec(), found.extras | {f"by {number}": True})
        )

    given = race_of(stores, change)
    assert codes(given) == []
    now = store.endpoints.get("m")
    assert now.revision == record.revision + len(stores)
    assert len(now.extras) == len(stores), "one has overwritten another's change"


def test_whoever_wins_between_a_client_and_the_controller_every_winner_counts(store, other):
    record = ready(store)
    given = race(
        lambda: store.endpoints.observe(record, FAILED, "died", True, None),
        lambda: other.endpoints.observe(record, READY, "well", True, None),
        lambda: store.endpoints.ask_change("m", to(**LIGHT)),
        lambda: other.endpoints.ask_delete("m"),
    )
    won = [each for each in given if isinstance(each, EndpointRecord)]
    now = store.endpoints.get("m")
    assert now.revision == record.revision + len(won)
    assert now in won and now.revision == max(each.revision for each in won)
    assert len({each.revision for each in won}) == len(won)


def test_what_was_seen_of_an_earlier_revision_is_not_believed(store):
    record = ready(store)
    store.endpoints.ask_change("m", to(**LIGHT))
    assert store.endpoints.observe(record, FAILED, "died", True, None) is None
    now = store.endpoints.get("m")
    assert now.state is READY and kinds(store, record.id)[-1] == "update.requested"
    deleting = store.endpoints.ask_delete("m")
    assert store.endpoints.observe(now, READY, None, True, None) is None
    store.endpoints.remove(deleting)
    assert store.endpoints.observe(deleting, READY, None, True, None) is None


def test_a_declaration_does_not_overwrite_a_change_that_is_about_to_be_committed(on_postgresql):
    store = on_postgresql
    record = settle(store, declare(store))
    taken = during_a_change(store, lambda: store.endpoints.declare([spec(max_queue=7)]), **LIGHT)
    assert taken == []
    now = store.endpoints.get("m")
    assert now.spec["max_queue"] == 7
    assert now.revision == record.revision + 2, "two changes made the same revision"


def test_a_deletion_waits_for_a_change_that_is_about_to_be_committed(on_postgresql):
    store = on_postgresql
    record = ready(store)
    deleted = during_a_change(store, lambda: store.endpoints.ask_delete("m"), **ENGINE)
    assert (deleted.state, deleted.revision) == (DELETING, record.revision + 2)
    assert deleted.spec["vllm_args"] == ENGINE["vllm_args"]


# -- events


def test_every_transition_leaves_one_event_and_their_order_is_what_happened(store):
    record = create(store)
    for state, reason in (
        ("UPDATE_IN_PROGRESS", "a replica is being placed"),
        ("UPDATE_IN_PROGRESS", "a replica is warming up"),
        ("READY", None),
    ):
        record = settle(store, record, state, reason)
    record = settle(store, store.endpoints.ask_change("m", to(**ENGINE)), "UPDATE_FAILED", "died")
    store.endpoints.remove(store.endpoints.ask_delete("m"))
    events = store.events(record.id)
    assert [(event.kind, event.message) for event in events] == [
        ("created", None),
        ("UPDATE_PENDING", None),
        ("UPDATE_IN_PROGRESS", "a replica is being placed"),
        ("UPDATE_IN_PROGRESS", "a replica is warming up"),
        ("READY", None),
        ("update.requested", None),
        ("UPDATE_PENDING", None),
        ("UPDATE_FAILED", "died"),
        ("DELETE_IN_PROGRESS", None),
        ("deleted", None),
    ]
    assert events == sorted(events, key=lambda event: (event.id, event.at))


def test_nothing_new_is_no_event(store):
    record = settle(store, create(store), "UPDATE_FAILED", "died")
    seen = store.endpoints.observe(record, FAILED, "died", False, PHASES)
    assert seen.phases == PHASES and not seen.settled
    assert seen.revision == record.revision + 1
    assert kinds(store, record.id) == ["created", "UPDATE_PENDING", "UPDATE_FAILED"]


@pytest.mark.parametrize(
    "operation",
    [
        lambda store, _: create(store, "another"),
        lambda store, _: store.endpoints.ask_change("m", to(**ENGINE)),
        lambda store, _: store.endpoints.ask_delete("m"),
        lambda store, _: store.endpoints.declare([spec("another")]),
        lambda store, record: store.endpoints.observe(record, FAILED, "died", True, None),
        lambda store, record: store.endpoints.remove(record),
    ],
    ids=["create", "ask_change", "ask_delete", "declare", "observe", "remove"],
)
def test_what_leaves_no_event_has_not_happened(store, operation):
    record = ready(store)
    with store.database.writing() as connection:
        connection.exec_driver_sql("ALTER TABLE events RENAME TO elsewhere")
    try:
        with pytest.raises((StoreUnavailable, SQLAlchemyError)):
            operation(store, record)
    finally:
        with store.database.writing() as connection:
            connection.exec_driver_sql("ALTER TABLE elsewhere RENAME TO events")
    assert store.endpoints.all() == [record]


def test_a_change_that_fails_changes_nothing(store):
    record = ready(store)
    events = store.events(record.id)
    with pytest.raises(ValueError, match="max_queue"):
        store.endpoints.ask_change("m", to(max_queue=0))
    assert store.endpoints.get("m") == record
    assert store.events(record.id) == events
    assert store.endpoints.ask_change("m", to(**LIGHT)).revision == record.revision + 1


def test_what_an_engine_said_last_is_kept_whatever_it_said(store):
    words = "RuntimeError: bad bytes \x00\ufffd in " + "a very long line, " * 5000
    record = settle(store, create(store), "UPDATE_FAILED", words)
    assert store.endpoints.get("m").reason == record.reason
    assert record.reason.startswith("RuntimeError: bad bytes")
    assert record.reason.endswith("a very long line, ")


# -- changes


@pytest.mark.parametrize("state", ["UPDATE_PENDING", "UPDATE_IN_PROGRESS", "READY"])
def test_no_change_while_another_operation_is_under_way(store, state):
    record = store.endpoints.observe(create(store), EndpointState(state), None, False, None)
    with pytest.raises(Conflict) as refused:
        store.endpoints.ask_change("m", to(**LIGHT))
    assert refused.value.code == "operation_in_progress"
    assert store.endpoints.get("m") == record


def test_no_change_of_what_is_being_deleted(store):
    ready(store)
    record = store.endpoints.ask_delete("m")
    with pytest.raises(Conflict) as refused:
        store.endpoints.ask_change("m", to(**LIGHT))
    assert refused.value.code == "operation_in_progress"
    assert store.endpoints.get("m") == record


@pytest.mark.parametrize(
    "light", [{"autoscaling": {"max_replicas": 3}}, {"public": False}, {"fallback": "other"}]
)
def test_what_needs_no_other_engine_leaves_an_endpoint_ready(store, light):
    record = ready(store)
    changed = store.endpoints.ask_change("m", to(**light))
    assert (changed.state, changed.settled) == (READY, True)
    assert (changed.requested_at, changed.revision) == (record.requested_at, record.revision + 1)
    assert EndpointSettings.model_validate(changed.spec) == spec(**light)
    assert kinds(store, record.id)[3:] == ["update.requested"]


@pytest.mark.parametrize("heavy", [ENGINE, {"model": "y"}, {"env": {"A": "1"}}, {"num_cpus": 2}])
def test_what_needs_another_engine_begins_an_update(store, heavy):
    record = settle(store, create(store), reason="asleep")
    changed = store.endpoints.ask_change("m", to(**heavy))
    assert (changed.state, changed.reason, changed.settled) == (PENDING, None, False)
    assert changed.requested_at > record.requested_at
    assert changed.created_at == record.created_at
    assert kinds(store, record.id)[3:] == ["update.requested", "UPDATE_PENDING"]


def test_after_a_failure_every_change_tries_again(store):
    settle(store, create(store), "UPDATE_FAILED", "died")
    changed = store.endpoints.ask_change("m", to(**LIGHT))
    assert (changed.state, changed.reason, changed.settled) == (PENDING, None, False)


def test_what_a_dialect_keeps_is_replaced_with_the_settings(store):
    ready(store)
    changed = store.endpoints.ask_change("m", lambda record: (spec(), {"labels": {"team": "a"}}))
    assert changed.extras == store.endpoints.get("m").extras == {"labels": {"team": "a"}}


def test_what_the_cluster_has_is_noted_and_stays(store):
    record = store.endpoints.note_deployed(create(store).id, "abc")
    assert store.endpoints.get("m") == record and record.deployed == "abc"
    assert settle(store, record).deployed == "abc"
    assert store.endpoints.note_deployed("ep_gone", "abc") is None


# -- deletion


def test_deleting_ends_an_operation_that_is_under_way(store):
    record = create(store)
    deleting = store.endpoints.ask_delete("m")
    assert (deleting.state, deleting.settled) == (DELETING, False)
    assert deleting.requested_at >= record.requested_at


def test_deleting_again_is_refused_and_leaves_no_event(store):
    record = ready(store)
    store.endpoints.ask_delete("m")
    with pytest.raises(Conflict) as refused:
        store.endpoints.ask_delete("m")
    assert refused.value.code == "operation_in_progress"
    assert kinds(store, record.id)[3:] == ["DELETE_IN_PROGRESS"]


def test_what_is_declared_in_the_configuration_is_deleted_there(store):
    record = settle(store, declare(store))
    with pytest.raises(Conflict) as refused:
        store.endpoints.ask_delete("m")
    assert refused.value.code == "declared_in_configuration"
    assert store.endpoints.get("m") == record


def test_a_name_is_free_once_its_endpoint_is_gone_and_not_before(store):
    first = ready(store)
    deleting = store.endpoints.ask_delete("m")
    with pytest.raises(Conflict):
        create(store)
    store.endpoints.remove(deleting)
    with pytest.raises(NotFound):
        store.endpoints.get("m")
    second = create(store)
    assert second.id != first.id and second.revision == 0
    assert kinds(store, second.id) == ["created", "UPDATE_PENDING"]
    assert kinds(store, first.id)[-1] == "deleted"
    store.endpoints.note_deployed(first.id, "late")
    assert store.endpoints.get("m") == second


def test_removing_what_is_gone_leaves_no_second_event(store):
    deleting = store.endpoints.ask_delete(create(store).name)
    store.endpoints.remove(deleting)
    store.endpoints.remove(deleting)
    assert kinds(store, deleting.id).count("deleted") == 1


# -- the configuration's endpoints


def test_what_is_declared_is_made(store):
    record = declare(store, **ENGINE)
    assert (record.owner, record.origin, record.extras) == (OPERATOR, "config", {})
    assert record.declared == declaration(spec(**ENGINE))
    assert (record.state, record.settled, record.revision) == (PENDING, False, 0)
    assert kinds(store, record.id) == ["created", "UPDATE_PENDING"]


def test_declaring_the_same_again_changes_nothing(store):
    record = settle(store, declare(store))
    mark = store.mark()
    assert declare(store) == record
    assert store.mark() == mark


def test_a_change_at_run_time_stays_until_the_entry_itself_changes(store):
    settle(store, declare(store))
    settle(store, store.endpoints.ask_change("m", to(max_queue=7)))
    assert declare(store).spec["max_queue"] == 7
    changed = declare(store, **ENGINE)
    assert changed.spec == spec(**ENGINE).model_dump(mode="json")
    assert changed.declared == declaration(spec(**ENGINE))
    assert (changed.state, changed.settled) == (PENDING, False)


def test_of_several_entries_only_those_that_changed_do(store):
    store.endpoints.declare([spec("a"), spec("b")])
    a, b = [settle(store, record) for record in store.endpoints.all()]
    store.endpoints.declare([spec("a"), spec("b", **LIGHT)])
    assert store.endpoints.get("a") == a
    now = store.endpoints.get("b")
    assert (now.state, now.settled, now.revision) == (READY, True, b.revision + 1)


def test_an_entry_may_change_while_its_endpoint_starts(store):
    declare(store)
    changed = declare(store, **ENGINE)
    assert (changed.state, changed.settled, changed.revision) == (PENDING, False, 1)
    assert changed.spec["vllm_args"] == ENGINE["vllm_args"]


def test_what_a_client_made_is_left_alone_and_its_name_is_told(store):
    record = ready(store)
    assert store.endpoints.declare([spec(**ENGINE), spec("free")]) == ["m"]
    assert store.endpoints.get("m") == record
    assert store.endpoints.declare([]) == []
    assert store.endpoints.get("m") == record
    assert store.endpoints.get("free").state is DELETING


def test_an_entry_that_went_is_deleted_once_and_made_anew_when_it_comes_back(store):
    first = settle(store, declare(store))
    for _ in range(2):
        store.endpoints.declare([])
    leaving = store.endpoints.get("m")
    assert (leaving.state, leaving.revision) == (DELETING, first.revision + 1)
    assert declare(store, **ENGINE) == leaving, "what is on its way out comes back first when gone"
    store.endpoints.remove(leaving)
    again = declare(store, **ENGINE)
    assert again.id != first.id and again.state is PENDING


def test_of_many_who_declare_the_same_at_once_one_makes_it(store, other):
    names = ["a", "b", "c"]

    def attempt(each: Store, _: int) -> list[str]:
        return each.endpoints.declare([spec(name) for name in names])

    given = race_of([store, other] * 3, attempt)
    assert given == [[]] * 6
    found = store.endpoints.all()
    assert sorted(record.name for record in found) == names
    assert all(record.revision == 0 for record in found)


# -- how long starts take


def test_the_last_few_starts_of_each_kind_are_kept(store):
    store.endpoints.add_start("other", 99.5)
    for seconds in range(LEARNED_FROM + 3):
        store.endpoints.add_start("same", seconds)
    kept = [float(seconds) for seconds in range(3, LEARNED_FROM + 3)]
    assert store.endpoints.starts() == {"other": [99.5], "same": kept}


@pytest.mark.parametrize("name", ["a\0b", "", "x" * 5000, "'; --"])
def test_a_name_that_is_none_is_not_found(store, name):
    with pytest.raises(NotFound):
        store.endpoints.get(name)
