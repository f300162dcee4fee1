"""What clients can do with batches, whatever dialect they speak.

A batch is a record and a file of requests, one JSON line each in OpenAI's form: {"custom_id",
"method", "url", "body"}. Dialects that bring their requests inline write such a file first, so that
every batch can be seen and run in the same way. Its results are two files in OpenAI's form, both in
the input's order; the number at the end of a line's id is its row's place in the input.
"""

import asyncio
import heapq
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from llm_engine import files
from llm_engine.batches.rows import row_of, split_lines
from llm_engine.config import EndpointSettings
from llm_engine.errors import APIError, Conflict, InvalidRequest, Overloaded, StoreUnavailable
from llm_engine.ids import new_id
from llm_engine.records import BatchOptions, BatchRecord, Principal
from llm_engine.services import Services
from llm_engine.statuses import BatchState
from llm_engine.storage.base import NoSuchObject
from llm_engine.store.batches import no_batch
from llm_engine.store.files import no_file
from llm_engine.store.idempotency import Once

_PLAIN = BatchOptions()


@dataclass(frozen=True, slots=True)
class NewBatch:
    """What is asked for; see BatchRecord."""

    dialect: str
    endpoint: str
    window_s: float
    model: str | None = None
    metadata: dict[str, str] | None = None
    options: BatchOptions = _PLAIN


class Batches:
    """Shared by the dialects."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._store = services.store
        self._storage = services.storage
        self._limits = services.settings.batches

    async def create(
        self, who: Principal, new: NewBatch, input_file_id: str, once: Once | None = None
    ) -> BatchRecord:
        """A batch over a file that is there, or is said to be: its job will tell. Or what `once`
        has made before.

        Raises Overloaded where its owner has too many open, Conflict where `once` was something
        else.
        """
        now = time.time()
        record = BatchRecord(
            id=new_id("batch"),
            owner=who.owner,
            dialect=new.dialect,
            endpoint=new.endpoint,
            input_file_id=input_file_id,
            window_s=new.window_s,
            state=BatchState.VALIDATING,
            created_at=now,
            expires_at=now + new.window_s,
            model=new.model,
            sees_all=who.sees_everything,
            metadata=new.metadata,
            options=new.options,
        )
        try:
            most = self._limits.max_open
            record = await asyncio.to_thread(self._store.batches.create, record, most, once)
        except Conflict as full:
            if full.code != "too_many_batches":
                raise
            retry = self._services.settings.gateway.retry_after_s
            raise Overloaded(full.message, code=full.code, retry_after=retry) from None
        await self._services.nudge_jobs()
        return record

    async def create_from_lines(
        self, who: Principal, new: NewBatch, lines: Iterable[bytes]
    ) -> BatchRecord:
        """`lines`: requests in OpenAI's form, each with its newline."""
        file = await asyncio.to_thread(
            lambda: files.keep(
                self._storage,
                self._store,
                owner=who.owner,
                purpose=files.BATCH,
                filename="requests.jsonl",
                pieces=lines,
            )
        )
        try:
            return await self.create(who, new, file.id)
        except StoreUnavailable:
            raise  # it may be there, and then needs its rows; they expire by themselves
        except APIError:  # nobody would ever learn of it
            await asyncio.to_thread(files.discard, self._storage, self._store, file.id)
            raise

    async def engine_like(self, who: Principal, model: str, task: str) -> EndpointSettings:
        """Of engines like those that serve `model` now, for a batch of its own. Their name is the
        job's to give.

        Raises NotFound for what does not exist or is not theirs to see, InvalidRequest for a model
        that is no endpoint or does not do `task`.
        """
        route = await self._services.route(who, model, task)
        if route.endpoint is None or route.registered or route.adapter:
            what = "an alias" if route.registered else "an adapter"
            what = what if route.endpoint else "an external model"
            raise InvalidRequest(
                f"The model '{model}' is {what}: only an endpoint can be run on engines of its "
                "own. Name the endpoint, or leave the engines to the platform.",
                param="model",
                code="model_not_supported",
            )
        served = await asyncio.to_thread(self._store.endpoints.get, route.endpoint.name)
        scaling = served.spec["autoscaling"]
        return EndpointSettings.model_validate(
            served.spec
            | {
                "public": False,
                "fallback": None,
                "autoscaling": scaling | {"min_replicas": max(1, scaling["min_replicas"])},
            }
        )

    async def get(self, who: Principal, batch: str) -> BatchRecord:
        """Raises NotFound, for another owner's too."""
        record = await asyncio.to_thread(self._store.batches.get, batch)
        if not who.sees(record.owner):
            raise no_batch(batch)
        return record

    async def page(
        self, who: Principal, after: str | None, limit: int
    ) -> tuple[list[BatchRecord], bool]:
        """Newest first, and whether there are more. Raises NotFound for an unknown `after`."""
        return await asyncio.to_thread(self._store.batches.page, who.whose, after, limit)

    async def cancel(self, who: Principal, batch: str) -> BatchRecord:
        """Its finished rows become its results. Again does nothing. Raises NotFound, or Conflict
        where it has ended otherwise."""
        await self.get(who, batch)
        record = await asyncio.to_thread(self._store.batches.ask_cancel, batch)
        await self._services.nudge_jobs()
        return record

    def results(self, record: BatchRecord) -> Iterator[bytes]:
        """Blocking. The lines of both result files, newlines and all, in the input's order.

        Raises NotFound where a file has been deleted or has expired.
        """
        found = [
            self._lines(file) for file in (record.output_file_id, record.error_file_id) if file
        ]
        return heapq.merge(*found, key=row_of)

    def _lines(self, file: str) -> Iterator[bytes]:
        record = self._store.files.get(file)
        try:
            pieces = self._storage.read(record.key)
        except NoSuchObject:
            raise no_file(file) from None
        return split_lines(pieces)
