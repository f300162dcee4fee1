"""One database behind one URL: connections, transactions, migrations, and its failures in words.

Blocking: asynchronous callers go through `asyncio.to_thread`.
"""

import contextlib
import fcntl
import logging
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import SQLAlchemyError

from llm_engine.errors import ConfigError, StoreUnavailable
from llm_engine.ids import new_id
from llm_engine.store import tables

logger = logging.getLogger("llm_engine.store")

#: PostgreSQL: connections of one process. SQLite has one writer at a time anyway.
POOL_SIZE = 5
CONNECT_TIMEOUT_S = 3
STATEMENT_TIMEOUT_MS = 10_000
RETRY_AFTER_S = 5
#: PostgreSQL: longest silence of a server that may hang: at the first word, in a transaction.
PING_LIMIT_S, TRANSACTION_LIMIT_S = 3.0, 15.0
#: SQLite: longest wait for another process's write.
BUSY_TIMEOUT_MS = 5_000
_MIGRATIONS = Path(__file__).parent / "migrations"


class Lock(IntEnum):
    """PostgreSQL's advisory locks: numbers that no other application is likely to use."""

    MIGRATION = 0x6C6C6D65
    KEYS = 0x6C6C6D66
    ENDPOINTS = 0x6C6C6D67
    MODELS = 0x6C6C6D68
    BATCHES = 0x6C6C6D69
    FINE_TUNES = 0x6C6C6D6A
    FEED = 0x6C6C6D6B


class Database:
    """`with database.reading() as connection`, `with database.writing() as connection`."""

    def __init__(self, url: str) -> None:
        self.url = _parse(url)
        self._engine = _engine(self.url)

    @property
    def is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """Raises StoreUnavailable where the database does not answer."""
        with _in_words(self), self._engine.connect() as connection, self._limited(connection):
            yield connection.execution_options(only_reads=True)

    @contextlib.contextmanager
    def writing(self, alone: Lock | None = None) -> Iterator[sa.Connection]:
        """One transaction: all of it is durable when the block ends, or none of it.

        `alone`: nobody else is in a transaction with the same lock. SQLite has one writer anyway.
        """
        with _in_words(self), self._engine.begin() as connection, self._limited(connection):
            if alone is not None:
                self.alone(connection, alone)
            yield connection

    def alone(self, connection: sa.Connection, lock: Lock) -> None:
        """From here to the end of this transaction that writes."""
        if not self.is_sqlite:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(lock)))

    def is_current(self) -> bool:
        """Whether its tables are the newest that are known here. Raises ConfigError where they are
        newer than that, StoreUnavailable."""
        with self.reading() as connection:
            current = MigrationContext.configure(connection).get_current_revision()
        known = ScriptDirectory(str(_MIGRATIONS))
        if current not in {None, *(each.revision for each in known.walk_revisions())}:
            raise ConfigError(
                f"the store {self.shown} was written by a newer llm-engine: its tables are of "
                f"version {current}, the newest known here is {known.get_current_head()}. Run "
                "that llm-engine, or restore the backup from before the upgrade."
            )
        return current == known.get_current_head()

    def migrate(self) -> str:
        """Bring the tables up to date; returns the database's identity. Safe to race. Raises as
        `is_current` does."""
        with _in_words(self), self._one_at_a_time():
            if not self.is_current():
                config = Config()
                config.set_main_option("script_location", str(_MIGRATIONS))
                logger.info("migrating the store %s", self.shown)
                with self._engine.begin() as connection:
                    if not self.is_sqlite:
                        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
                    config.attributes["connection"] = connection
                    command.upgrade(config, "head")
            with self._engine.begin() as connection:
                table = tables.identity
                found = connection.execute(sa.select(table.c.id)).scalar()
                if found is None:
                    found = new_id("store")
                    connection.execute(table.insert().values(id=found))
                connection.execute(
                    table.update()
                    .where(table.c.secret.is_(None))
                    .values(secret=secrets.token_bytes(32))
                )
                return found

    def identity(self) -> str | None:
        """Which database this is; None before its first migration."""
        with self.reading() as connection:
            if not sa.inspect(connection).has_table(tables.identity.name):
                return None
            return connection.execute(sa.select(tables.identity.c.id)).scalar()

    def secret(self) -> bytes:
        """What links and the tickets of jobs are signed with; raises StoreUnavailable."""
        with self.reading() as connection:
            found = connection.execute(sa.select(tables.identity.c.secret)).scalar()
        assert found is not None, "the store has not been migrated"
        return found

    @property
    def shown(self) -> str:
        url = self.url.difference_update_query(["password"])
        return url.render_as_string(hide_password=True)

    def close(self) -> None:
        self._engine.dispose()

    def labelled(
        self, column: sa.ColumnElement[Any], key: str, value: str
    ) -> sa.ColumnElement[bool]:
        """Whether the JSON object in a column has this pair."""
        if not self.is_sqlite:
            return column.op("->>", return_type=sa.Text())(sa.literal(key, sa.Text())) == value
        # Not by a JSON path: a key may hold what a path has no way to quote.
        pairs = sa.func.json_each(column).table_valued("key", "value", name="pairs")
        return sa.exists().where(pairs.c.key == key, pairs.c.value == value)

    @contextlib.contextmanager
    def _limited(self, connection: sa.Connection) -> Iterator[None]:
        """`statement_timeout` is the server's own: one that hangs does not look at its clock."""
        if self.is_sqlite:
            yield
            return
        with _cut_after(TRANSACTION_LIMIT_S, connection.connection.dbapi_connection):
            yield

    @contextlib.contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        if self.is_sqlite:
            if not self.url.database:
                yield
                return
            with Path(f"{self.url.database}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
            return
        with self._engine.connect() as connection:
            # Another one's migration may take its time.
            connection.exec_driver_sql("SET statement_timeout = 0")
            connection.execute(sa.select(sa.func.pg_advisory_lock(Lock.MIGRATION)))
            try:
                yield
            finally:
                connection.execute(sa.select(sa.func.pg_advisory_unlock(Lock.MIGRATION)))
                connection.exec_driver_sql("RESET statement_timeout")


def _parse(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
    except (SQLAlchemyError, ValueError):  # whose words may hold a piece of the password
        raise ConfigError(
            "store.url is not a database URL. It is sqlite:///FILE or "
            "postgresql://USER:PASSWORD@HOST/DATABASE, with %40 for a @ in a password."
        ) from None
    kind = parsed.get_backend_name()
    if kind == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if kind != "sqlite":
        raise ConfigError(f"store.url: '{kind}' is not supported; use sqlite:/// or postgresql://")
    if parsed.host:
        raise ConfigError("store.url: a SQLite URL has three slashes before the file, or four")
    if not parsed.database or parsed.database == ":memory:":
        raise ConfigError("store.url names no file; a store that is only in memory loses all")
    path = Path(parsed.database).expanduser().absolute()
    return parsed.set(drivername="sqlite+pysqlite", database=str(path))


def sqlite_file(url: str) -> Path | None:
    """Where the database lies; None: it is a server's. Raises ConfigError."""
    parsed = _parse(url)
    return Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None


def _engine(url: sa.URL) -> sa.Engine:
    return _postgresql(url) if url.get_backend_name() == "postgresql" else _sqlite(url)


def _postgresql(url: sa.URL) -> sa.Engine:
    engine = sa.create_engine(
        url,
        hide_parameters=True,  # errors are logged, and these are what people wrote
        pool_size=POOL_SIZE,
        max_overflow=0,
        pool_timeout=CONNECT_TIMEOUT_S,
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "options": f"-c statement_timeout={STATEMENT_TIMEOUT_MS}",
        },
    )

    @sa.event.listens_for(engine, "checkout")
    def ping(connection: Any, record: Any, _: Any) -> None:
        """A server that was restarted costs no request: the pool tries a new connection."""
        try:
            with _cut_after(PING_LIMIT_S, connection):
                connection.execute("SELECT 1")
                connection.rollback()
        except psycopg.Error as error:
            raise sa.exc.DisconnectionError(str(error)) from None

    return engine


@contextlib.contextmanager
def _cut_after(seconds: float, connection: Any) -> Iterator[None]:
    """Shut a connection's socket if what is inside takes longer; libpq then gives up waiting."""

    def cut() -> None:
        with contextlib.suppress(OSError, psycopg.Error):
            copy = socket.socket(fileno=os.dup(connection.fileno()))
            with copy:
                copy.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _sqlite(url: sa.URL) -> sa.Engine:
    assert url.database is not None
    path = Path(url.database)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
    except OSError as error:
        raise ConfigError(f"store.url: {path} cannot be written: {error.strerror}") from None
    timeout = {"timeout": BUSY_TIMEOUT_MS / 1000}
    engine = sa.create_engine(url, hide_parameters=True, connect_args=timeout)

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # we begin transactions ourselves, see below
        connection.execute("PRAGMA journal_mode=WAL")  # readers do not wait for the writer
        connection.execute("PRAGMA synchronous=FULL")  # what was acknowledged survives a power cut
        connection.execute("PRAGMA foreign_keys=ON")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # A transaction that reads first and writes later could fail at once, whatever the timeout.
        only_reads = connection.get_execution_options().get("only_reads")
        connection.exec_driver_sql("BEGIN" if only_reads else "BEGIN IMMEDIATE")

    return engine


@contextlib.contextmanager
def _in_words(database: Database) -> Iterator[None]:
    try:
        yield
    except (
        sa.exc.OperationalError,
        sa.exc.InterfaceError,
        sa.exc.InternalError,  # a server that only reads, as after a failover
        sa.exc.TimeoutError,
        sa.exc.DisconnectionError,
    ) as error:
        # The cause is for operators: it may name hosts and users.
        logger.warning("the store %s does not answer: %s", database.shown, _first_line(error))
        raise StoreUnavailable(
            "The store does not answer now, so nothing was read or changed. Models that are "
            "served answer on. Retry later.",
            retry_after=RETRY_AFTER_S,
        ) from error
    except sa.exc.DatabaseError as error:
        if "not a database" not in str(error.orig):
            raise
        raise ConfigError(f"store.url: {database.url.database} is not a SQLite database") from None


def _first_line(error: Exception) -> str:
    told = str(getattr(error, "orig", None) or error).strip() or type(error).__name__
    return told.splitlines()[0]
