"""The store: all records behind one URL. Each kind has a module of its own."""

import time
from collections import defaultdict

import sqlalchemy as sa

from llm_engine.records import Directory, Event, ModelRecord
from llm_engine.store import tables
from llm_engine.store.adapters import Adapters
from llm_engine.store.batches import Batches
from llm_engine.store.chats import Chats
from llm_engine.store.conversations import Conversations
from llm_engine.store.database import Database
from llm_engine.store.endpoints import Endpoints
from llm_engine.store.files import Files
from llm_engine.store.fine_tunes import FineTunes
from llm_engine.store.idempotency import Idempotency
from llm_engine.store.keys import Keys
from llm_engine.store.registered import Registered
from llm_engine.store.responses import Responses
from llm_engine.store.streams import Streams
from llm_engine.store.uploads import Uploads


class Store:
    """Opens nothing by itself: the first use connects. `open` migrates too."""

    def __init__(self, url: str) -> None:
        self.database = Database(url)
        self.keys = Keys(self.database)
        self.endpoints = Endpoints(self.database)
        self.registered = Registered(self.database)
        self.files = Files(self.database)
        self.uploads = Uploads(self.database)
        self.idempotency = Idempotency(self.database)
        self.batches = Batches(self.database)
        self.fine_tunes = FineTunes(self.database)
        self.adapters = Adapters(self.database)
        self.responses = Responses(self.database)
        self.conversations = Conversations(self.database)
        self.streams = Streams(self.database, self.responses)
        self.chats = Chats(self.database)

    @classmethod
    def open(cls, url: str) -> "Store":
        """Raises ConfigError for a URL that can't be, StoreUnavailable for a silent database."""
        store = cls(url)
        store.database.migrate()
        return store

    def mark(self) -> tuple[object, ...]:
        """Another one after every change of an endpoint."""
        return self._mark(tables.endpoints.c.id, sa.func.sum(tables.endpoints.c.revision))

    def directory_mark(self) -> tuple[object, ...]:
        """Another one after every change of what `directory` tells."""
        keys, models = tables.keys.c, tables.models.c
        changes = sa.func.sum(models.revision)
        adapters = tables.adapters.c
        return (
            self._mark(keys.id, sa.func.count(keys.revoked_at))
            + self._mark(models.id, changes)
            + self._mark(adapters.id, sa.func.count(adapters.deleted_at))
        )

    def _mark(self, key: sa.ColumnElement, changes: sa.ColumnElement) -> tuple[object, ...]:
        """Of numbers that no clock has made, and that a late commit cannot leave as they were."""
        with self.database.reading() as connection:
            row = connection.execute(sa.select(sa.func.count(), sa.func.max(key), changes)).one()
            return tuple(row)

    def directory(self) -> Directory:
        """What every ingress replica has in memory."""
        models: dict[str, dict[str, ModelRecord]] = defaultdict(dict)
        for model in self.registered.all():
            models[model.owner][model.name] = model
        keys = {key.digest: key for key in self.keys.all()}
        adapters = {adapter.name: adapter for adapter in self.adapters.all()}
        return Directory(time.time_ns(), keys, dict(models), adapters)

    def events(self, subject: str, after: int = 0, limit: int = 100) -> list[Event]:
        """Of one record, oldest first."""
        table = tables.events.c
        wanted = (
            sa.select(tables.events)
            .where(table.subject == subject, table.id > after)
            .order_by(table.id)
            .limit(limit)
        )
        with self.database.reading() as connection:
            return [Event(**row._mapping) for row in connection.execute(wanted)]

    def close(self) -> None:
        self.database.close()
