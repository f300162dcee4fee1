"""The database itself: migrations, durability, marks of change, and being away."""

import contextlib
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from llm_engine.errors import ConfigError, LLMEngineError, StoreUnavailable
from llm_engine.statuses import EndpointState
from llm_engine.store import database, journal, tables
from llm_engine.store.sql import Store
from tests.stores.making import (
    ENGINE,
    LIGHT,
    LIMIT,
    create,
    declare,
    key,
    kinds,
    model,
    race,
    ready,
    settle,
    spec,
    to,
)
from tests.support.postgres import Postgres

READY, FAILED = EndpointState.READY, EndpointState.UPDATE_FAILED
SECRET = "hunter2"
#: Of a server that takes connections and says nothing: the old one, then two new ones.
HANGS_AT_MOST_S = 15.0
ANSWERS_WITHIN_S = 5
MIGRATE = """
import sys
from llm_engine.store.sql import Store

print(Store.open(sys.argv[1]).database.identity())
"""
WRITE = """
import sys
from llm_engine.store.sql import Store
from tests.stores.making import key

store = Store.open(sys.argv[1])
while True:
    record = key()
    store.keys.add(record, 10**9)
    print(record.id, flush=True)
"""


def python(code: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


# -- which database it is


@pytest.mark.parametrize(
    "url",
    [
        f"mysql://ann:{SECRET}@db.example/le",
        f"postgres://ann:{SECRET}@db.example/le",
        "sqlite://",
        "sqlite:///:memory:",
        "nonsense",
        "",
        f"://ann:{SECRET}@db.example/le",
        f"postgresql:/ann:{SECRET}@db.example/le",
        f"host=db.example user=ann password={SECRET}",  # libpq's own form
        f"postgresql://ann:{SECRET}@db.example:port/le",
        f"postgresql://ann:p@ss:{SECRET}@db.example/le",  # an @ that should have been %40
        "sqlite://folder/store.db",  # a slash too few
    ],
)
def test_what_can_not_be_a_store_is_refused_in_words_without_the_password(
    url, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as refused:
        Store.open(url)
    assert "store.url" in str(refused.value)
    assert SECRET not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_can_not_be_is_the_configurations_fault(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError):
        Store.open(f"sqlite:///{tmp_path / 'file' / 'store.db'}")


def test_a_file_that_is_no_database_is_an_error_in_words_and_is_left_alone(tmp_path):
    path = tmp_path / "store.db"
    path.write_text("something else, and long enough to be looked at by whoever opens it\n" * 99)
    before = path.read_bytes()
    with pytest.raises(LLMEngineError):
        Store.open(f"sqlite:///{path}")
    assert path.read_bytes() == before


def test_any_driver_may_be_written_and_ours_is_used():
    store = Store(f"postgresql+asyncpg://ann:{SECRET}@db.example/le")
    assert store.database.url.drivername == "postgresql+psycopg"
    assert SECRET not in store.database.shown
    store.close()


# -- migrations


def test_migrating_again_changes_nothing_and_the_identity_stays(new_url):
    with contextlib.closing(Store(new_url)) as store:
        identity = store.database.migrate()
        record = create(store)
        assert store.database.migrate() == store.database.identity() == identity
    with contextlib.closing(Store.open(new_url)) as reopened:
        assert reopened.database.identity() == identity
        assert reopened.endpoints.all() == [record]


def test_before_the_first_migration_there_is_no_identity(new_url):
    with contextlib.closing(Store(new_url)) as unmigrated:
        assert unmigrated.database.identity() is None


def test_a_newer_llm_engines_store_is_left_alone_and_the_way_out_is_told(new_url):
    with contextlib.closing(Store.open(new_url)) as store:
        with store.database.writing() as connection:
            connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
        for use in (store.database.migrate, store.database.is_current):
            with pytest.raises(ConfigError, match=r"newer llm-engine.*9999.*backup"):
                use()
        assert SECRET not in store.database.shown


def test_two_databases_are_not_the_same(tmp_path):
    found = []
    for name in ("a", "b"):
        with contextlib.closing(Store.open(f"sqlite:///{tmp_path / name}")) as store:
            found.append(store.database.identity())
    assert found[0] != found[1]


def test_many_who_migrate_at_once_agree(new_url):
    def migrate() -> str:
        with contextlib.closing(Store(new_url)) as store:
            return store.database.migrate()

    assert len(set(race(*[migrate] * 6))) == 1


@pytest.mark.slow
def test_processes_that_migrate_at_once_agree(new_url):
    processes = [python(MIGRATE, new_url) for _ in range(3)]
    told = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert told[0].startswith("store_") and len(set(told)) == 1


def test_the_migrations_make_the_tables_that_the_code_means(store):
    with store.database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, tables.metadata) == []


# -- durability


def test_the_file_is_its_owners_alone_and_so_are_those_beside_it(tmp_path):
    with contextlib.closing(Store.open(f"sqlite:///{tmp_path / 'store.db'}")) as store:
        create(store)
        files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert {"store.db", "store.db-wal"} <= set(files)
    for name in ("store.db", "store.db-wal", "store.db-shm"):
        assert files[name] == 0o600, name


def test_a_folder_that_is_made_for_the_store_is_its_owners_alone(tmp_path):
    Store(f"sqlite:///{tmp_path / 'new' / 'store.db'}").close()
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


@pytest.mark.slow
def test_what_was_acknowledged_survives_the_writers_death(store, store_url):
    writer = python(WRITE, store_url)
    assert writer.stdout is not None
    acknowledged = [writer.stdout.readline().strip() for _ in range(50)]
    os.kill(writer.pid, signal.SIGKILL)  # in the middle of a later one
    *rest, _ = writer.stdout.read().split("\n")
    writer.wait(10)
    writer.stdout.close()
    acknowledged += rest
    ids = [record.id for record in store.keys.all()]
    assert acknowledged[-1] and set(acknowledged) <= set(ids)
    assert len(ids) - len(acknowledged) <= 1, "more than the one that was under way"
    assert all(kinds(store, each) == ["key.created"] for each in ids)
    store.keys.add(key(), LIMIT * 100)


def test_readers_do_not_wait_for_a_writer(store, other):
    record = ready(store)
    with store.database.writing() as connection:
        connection.execute(tables.endpoints.update().values(reason="not yet"))
        began = time.monotonic()
        (seen,) = race(lambda: other.endpoints.get("m"))
        assert time.monotonic() - began < database.BUSY_TIMEOUT_MS / 1000
    assert seen == record
    assert other.endpoints.get("m").reason == "not yet"


def test_a_transaction_that_is_broken_off_leaves_nothing(store):
    with pytest.raises(KeyError), store.database.writing() as connection:
        connection.execute(tables.identity.insert().values(id="store_2"))
        raise KeyError
    with store.database.reading() as connection:
        found = connection.execute(sa.select(sa.func.count()).select_from(tables.identity))
        assert found.scalar() == 1


# -- events and marks


def test_events_are_read_from_where_one_has_come_to(store):
    record = ready(store)
    create(store, "another")
    events = store.events(record.id)
    assert [event.kind for event in events] == ["created", "UPDATE_PENDING", "READY"]
    assert store.events(record.id, after=events[0].id) == events[1:]
    assert store.events(record.id, limit=2) == events[:2]
    assert store.events(record.id, after=events[-1].id) == []
    assert store.events("nobody") == []


def fill(store: Store, subject: str, count: int) -> None:
    rows = [{"subject": subject, "at": float(n), "kind": f"k{n}"} for n in range(count)]
    with store.database.writing() as connection:
        connection.execute(tables.events.insert(), rows)


def test_of_each_record_the_latest_events_are_kept(store):
    record, another = create(store), create(store, "another")
    fill(store, record.id, journal.MOST_EVENTS)
    settle(store, record)
    events = store.events(record.id, limit=2 * journal.MOST_EVENTS)
    assert len(events) == journal.MOST_EVENTS
    assert events[-1].kind == "READY" and events[0].kind == "k1"
    assert kinds(store, another.id) == ["created", "UPDATE_PENDING"]


def _note_deployed(store: Store) -> None:
    store.endpoints.note_deployed(store.endpoints.get("m").id, "abc")


def _settle_only(store: Store) -> None:
    store.endpoints.observe(store.endpoints.get("m"), READY, None, False, None)


MUTATIONS: dict[str, Callable[[Store], Any]] = {
    "create": lambda store: create(store, "new"),
    "update": lambda store: store.endpoints.ask_change("m", to(**ENGINE)),
    "light update": lambda store: store.endpoints.ask_change("m", to(**LIGHT)),
    "delete": lambda store: store.endpoints.ask_delete("m"),
    "declare": lambda store: store.endpoints.declare([spec("new")]),
    "state": lambda store: settle(store, store.endpoints.get("m"), "UPDATE_FAILED"),
    "reason": lambda store: settle(store, store.endpoints.get("m"), "READY", "asleep"),
    "settled": _settle_only,
    "deployed": _note_deployed,
    "remove": lambda store: store.endpoints.remove(store.endpoints.get("m")),
    "add key": lambda store: store.keys.add(key(), LIMIT),
    "revoke key": lambda store: store.keys.revoke(store.keys.all()[0].id),
    "add model": lambda store: store.registered.add(model(name="new"), LIMIT),
    "change model": lambda store: store.registered.change(store.registered.all()[0].id, model="z"),
    "remove model": lambda store: store.registered.remove(store.registered.all()[0].id),
}


def furnish(store: Store) -> None:
    """One record of each kind."""
    ready(store)
    store.keys.add(key(), LIMIT)
    store.registered.add(model(), LIMIT)


@pytest.mark.parametrize(
    "mutation", [name for name in MUTATIONS if not name.endswith((" key", "model"))]
)
def test_the_mark_changes_with_every_change_of_an_endpoint(store, other, mutation):
    furnish(store)
    mark = other.mark()
    assert other.mark() == mark
    MUTATIONS[mutation](store)
    assert other.mark() != mark


@pytest.mark.parametrize(
    "mutation", [name for name in MUTATIONS if name.endswith((" key", "model"))]
)
def test_the_directorys_mark_changes_with_every_key_and_model(store, other, mutation):
    furnish(store)
    mark, told = other.directory_mark(), other.directory()
    assert other.directory_mark() == mark
    MUTATIONS[mutation](store)
    assert other.directory_mark() != mark
    now = other.directory()
    assert (now.keys, now.models) != (told.keys, told.models) and now.version > told.version


def test_the_directorys_mark_changes_whatever_another_hosts_clock_says(store):
    ahead = time.time() + 60
    store.registered.add(model(name="a", created_at=ahead, updated_at=ahead), LIMIT)
    behind = model(name="b")
    store.registered.add(behind, LIMIT)
    mark = store.directory_mark()
    store.registered.change(behind.id, model="other")
    assert store.directory_mark() != mark


def test_the_mark_changes_with_a_transaction_that_took_longer(on_postgresql):
    store = on_postgresql
    slow, quick = create(store, "slow"), create(store, "quick")
    with store.database.writing() as connection:
        bump = tables.endpoints.update().where(tables.endpoints.c.id == slow.id)
        connection.execute(bump.values(revision=1))
        settle(store, quick)
        mark = store.mark()
    assert store.mark() != mark


def test_the_directory_knows_keys_by_digest_and_models_by_owner_and_name(store):
    revoked, mine, theirs = key(), model("ann", "fast"), model("ben", "fast")
    store.keys.add(revoked, LIMIT)
    store.registered.add(mine, LIMIT)
    store.registered.add(theirs, LIMIT)
    revoked = store.keys.revoke(revoked.id)
    found = store.directory()
    assert found.keys == {revoked.digest: revoked}
    assert found.models == {"ann": {"fast": mine}, "ben": {"fast": theirs}}


# -- a database that is away


@pytest.fixture
def furnished(on_postgresql: Store) -> Iterator[Store]:
    furnish(on_postgresql)
    yield on_postgresql


READINGS: dict[str, Callable[[Store], Any]] = {
    "get": lambda store: store.endpoints.get("m"),
    "all": lambda store: store.endpoints.all(),
    "starts": lambda store: store.endpoints.starts(),
    "keys": lambda store: store.keys.all(),
    "find": lambda store: store.keys.find([b"digest"]),
    "models": lambda store: store.registered.all(),
    "model": lambda store: store.registered.get("model_0"),
    "mark": lambda store: store.mark(),
    "directory mark": lambda store: store.directory_mark(),
    "directory": lambda store: store.directory(),
    "events": lambda store: store.events("m"),
    "identity": lambda store: store.database.identity(),
}


def test_while_the_server_is_away_every_call_says_so_at_once_and_then_all_is_well(
    furnished, postgres
):
    store, record = furnished, furnished.endpoints.get("m")
    writings: dict[str, Callable[[Store], Any]] = {
        "create": lambda store: create(store, "new"),
        "ask_change": lambda store: store.endpoints.ask_change("m", to(**LIGHT)),
        "ask_delete": lambda store: store.endpoints.ask_delete("m"),
        "declare": lambda store: store.endpoints.declare([]),
        "observe": lambda store: store.endpoints.observe(record, FAILED, None, True, None),
        "note_deployed": lambda store: store.endpoints.note_deployed(record.id, "abc"),
        "remove": lambda store: store.endpoints.remove(record),
        "add_start": lambda store: store.endpoints.add_start("same", 1),
        "add key": lambda store: store.keys.add(key(), LIMIT),
        "revoke": lambda store: store.keys.revoke("key_0"),
        "add model": lambda store: store.registered.add(model(name="new"), LIMIT),
        "change model": lambda store: store.registered.change("model_0", model="y"),
        "remove model": lambda store: store.registered.remove("model_0"),
        "migrate": lambda store: store.database.migrate(),
    }
    with postgres.stopped():
        for name, attempt in (READINGS | writings).items():
            began = time.monotonic()
            with pytest.raises(StoreUnavailable) as refused:
                attempt(store)
            assert time.monotonic() - began < ANSWERS_WITHIN_S, name
            assert (refused.value.status, refused.value.code) == (503, "store_unavailable")
            assert refused.value.retry_after
            for private in ("postgres", "/tmp", str(store.database.url.database)):
                assert private not in refused.value.message, name
    assert store.endpoints.get("m") == record
    create(store, "new")


def test_a_transaction_that_the_server_breaks_off_is_unavailable_and_changes_nothing(
    furnished, postgres
):
    record = furnished.endpoints.get("m")

    def change(found):
        postgres.stop()
        return to(**LIGHT)(found)

    try:
        with pytest.raises(StoreUnavailable):
            furnished.endpoints.ask_change("m", change)
    finally:
        postgres.start()
    assert furnished.endpoints.get("m") == record


@pytest.mark.slow
def test_a_server_that_hangs_is_unavailable_too(furnished, postgres):
    given: list[Exception] = []

    def attempt() -> None:
        try:
            furnished.endpoints.all()
        except Exception as error:
            given.append(error)

    asking = threading.Thread(target=attempt, daemon=True)
    with postgres.frozen():
        asking.start()
        asking.join(HANGS_AT_MOST_S)
        hung = asking.is_alive()
    asking.join(10)
    assert not hung, f"no word within {HANGS_AT_MOST_S} s"
    assert [type(error) for error in given] == [StoreUnavailable]


def test_a_server_that_only_reads_is_unavailable_for_changes(postgres: Postgres):
    """What is left after a failover, for whoever is still connected to the old server."""
    url = postgres.new_database()
    with contextlib.closing(Store.open(url)) as store:
        record = ready(store)
    with psycopg.connect(url, autocommit=True) as connection:
        name = connection.info.dbname
        connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    with contextlib.closing(Store(url)) as store:
        assert store.endpoints.all() == [record]
        with pytest.raises(StoreUnavailable):
            store.endpoints.ask_delete("m")


def test_more_callers_than_connections_wait_their_turn(on_postgresql):
    declare(on_postgresql)
    names = {record.name for found in race(*[on_postgresql.endpoints.all] * 20) for record in found}
    assert names == {"m"}


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://ann:{SECRET}@127.0.0.1:1/le",
        f"postgresql://ann:{SECRET}/x@127.0.0.1:1/le",
        f"postgresql://127.0.0.1:1/le?user=ann&password={SECRET}",
    ],
)
def test_what_operators_read_of_an_outage_has_no_password(caplog, url):
    with (
        caplog.at_level(logging.WARNING, "llm_engine.store"),
        pytest.raises(StoreUnavailable) as refused,
    ):
        Store.open(url)
    assert "127.0.0.1" in caplog.text and SECRET not in caplog.text
    for private in ("127.0.0.1", "ann", SECRET):
        assert private not in refused.value.message


def test_a_file_that_another_process_writes_for_too_long_is_unavailable(sqlite_url, monkeypatch):
    monkeypatch.setattr(database, "BUSY_TIMEOUT_MS", 500)
    with contextlib.closing(Store.open(sqlite_url)) as store:
        record = ready(store)
        with contextlib.closing(Store(sqlite_url)) as other, other.database.writing():
            began = time.monotonic()
            with pytest.raises(StoreUnavailable):
                store.endpoints.ask_delete("m")
            assert 0.5 <= time.monotonic() - began < 10
        assert store.endpoints.get("m") == record
        store.endpoints.ask_delete("m")
