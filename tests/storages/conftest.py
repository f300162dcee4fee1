"""A fresh storage of each kind: every test that takes `storage` runs on all of them."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_engine.config_data import StorageSettings
from llm_engine.storage.base import Storage
from llm_engine.storage.local import LocalStorage
from llm_engine.storage.s3 import S3Storage
from tests.support.s3 import CephServer, MotoServer, S3Server, ceph_is_wanted


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if ceph_is_wanted():
        for item in items:
            if item.get_closest_marker("s3real"):
                item.add_marker(pytest.mark.slow)
        return
    absent = [item for item in items if item.get_closest_marker("s3real")]
    if absent:
        config.hook.pytest_deselected(items=absent)
        items[:] = [item for item in items if item not in absent]


@pytest.fixture(autouse=True)
def nobodys_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine has for AWS is not for tests."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def moto() -> Iterator[MotoServer]:
    with MotoServer() as running:
        yield running


@pytest.fixture(scope="session")
def ceph() -> Iterator[CephServer]:
    with CephServer() as running:
        yield running


@pytest.fixture(params=["folder", "moto", pytest.param("ceph", marks=pytest.mark.s3real)])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["moto", pytest.param("ceph", marks=pytest.mark.s3real)])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """An S3 server, with its credentials where boto3 looks for them."""
    running: S3Server = request.getfixturevalue(request.param)
    give(monkeypatch, running)
    return running


def give(monkeypatch: pytest.MonkeyPatch, server: S3Server) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def storage(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Storage]:
    if kind == "folder":
        opened: Storage = LocalStorage(tmp_path / "storage")
    else:
        running: S3Server = request.getfixturevalue(kind)
        give(monkeypatch, running)
        opened = S3Storage(f"{running.new_bucket()}/some/prefix", running.settings())
    with contextlib.closing(opened):
        yield opened


@pytest.fixture
def s3(server: S3Server) -> Iterator[Callable[..., S3Storage]]:
    """Makes storages in fresh buckets, with further settings."""
    with contextlib.ExitStack() as opened:

        def make(**given: Any) -> S3Storage:
            settings: StorageSettings = server.settings(**given)
            return opened.enter_context(
                contextlib.closing(S3Storage(server.new_bucket(), settings))
            )

        yield make
