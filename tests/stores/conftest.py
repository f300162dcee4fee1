"""A fresh store on each of the databases: every test that takes `store` runs on both."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from llm_engine.store import tables
from llm_engine.store.sql import Store
from tests.support.postgres import Postgres


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with Postgres() as running:
        yield running


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def new_url(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database that no migration has seen."""
    if kind == "sqlite":
        return f"sqlite:///{tmp_path / 'store.db'}"
    return request.getfixturevalue("postgres").new_database()


# Migrated once: an empty copy, and emptied tables, are faster than a migration for every test.


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("migrated") / "store.db"
    Store.open(f"sqlite:///{path}").close()
    return path


@pytest.fixture(scope="session")
def migrated_database(postgres: Postgres) -> str:
    url = postgres.new_database()
    Store.open(url).close()
    return url


@pytest.fixture
def sqlite_url(migrated_file: Path, tmp_path: Path) -> str:
    shutil.copy(migrated_file, tmp_path / "store.db")
    return f"sqlite:///{tmp_path / 'store.db'}"


@pytest.fixture
def postgresql_url(migrated_database: str) -> str:
    names = sorted(set(tables.metadata.tables) - {tables.identity.name})
    with psycopg.connect(migrated_database) as connection:  # TRUNCATE makes new files for each
        connection.execute("; ".join(f"DELETE FROM {name}" for name in names))
    return migrated_database


@pytest.fixture
def store_url(kind: str, request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(f"{kind}_url")


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    with contextlib.closing(Store(store_url)) as opened:
        yield opened


@pytest.fixture
def other(store_url: str) -> Iterator[Store]:
    """Another process's view of the same database."""
    with contextlib.closing(Store(store_url)) as opened:
        yield opened


@pytest.fixture
def on_postgresql(postgresql_url: str) -> Iterator[Store]:
    """For what can happen only where transactions overlap, or a server goes away."""
    with contextlib.closing(Store(postgresql_url)) as opened:
        yield opened
