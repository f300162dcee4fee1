"""Sends a batch's rows to the gateways and sees each to its end: an answer, or the reason for none.

What is wrong with a row is final at once; what may be is tried a few times; and what is no row's
fault (a model that is busy, waking or restarting, a gateway that is away) is waited out.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from llm_engine.background import PRIORITY
from llm_engine.batches import outcomes
from llm_engine.batches.gateways import Answer, Broken, Gateways, Unreachable
from llm_engine.batches.outcomes import Finished, Verdict, judge
from llm_engine.batches.pace import Pace, priority
from llm_engine.batches.parts import Parts
from llm_engine.batches.progress import Progress
from llm_engine.batches.rows import Row, read_rows
from llm_engine.batches.validation import Problem
from llm_engine.config import Settings
from llm_engine.patience import backoff, patiently
from llm_engine.records import BatchRecord, FileRecord
from llm_engine.signing import Signer, Ticket
from llm_engine.storage.base import Storage

#: The input is read in pieces of so many rows or bytes, whichever is less.
ROWS_A_PIECE, BYTES_A_PIECE = 256, 2**20
#: Of requests that are held in memory, waiting rows included.
MOST_HELD_BYTES = 64 * 2**20
TICKET_S = 600.0
#: The gateway ends an answer itself; this is for one that does not.
GRACE_S = 30.0


class Tickets:
    """What rows show instead of a key, renewed in time."""

    def __init__(self, signer: Signer, record: BatchRecord) -> None:
        self.priority = PRIORITY
        self._signer = signer
        self._record = record
        self._made: tuple[float, int, str] = (0.0, 0, "")

    def renew(self) -> None:
        self._made = (0.0, 0, "")

    @property
    def text(self) -> str:
        until, level, text = self._made
        if until - time.time() < TICKET_S / 2 or level != self.priority:
            record, until, level = self._record, time.time() + TICKET_S, self.priority
            ticket = Ticket(record.id, record.owner, record.sees_all, level, until)
            text = self._signer.ticket(ticket)
            self._made = (until, level, text)
        return text


@dataclass(slots=True)
class _Request:
    row: int
    custom_id: str | None
    model: str | None  # what its answer shall call the model, where the engine calls it otherwise
    body: bytes
    attempts: int = 0  # that may have been the row's fault
    waits: int = 0  # that were not
    answered: int = 0  # rows of the batch, at the last time that nobody could answer this one

    @classmethod
    def of(cls, row: Row, engine: str | None) -> "_Request":
        """`engine`: the model that is asked, if not the one that the row names."""
        data = orjson.loads(row.data or b"")
        body: dict[str, Any] = data["body"]
        model = None
        if engine is not None:
            model, body = body.get("model"), body | {"model": engine}
        return cls(row.number, data.get("custom_id"), model, orjson.dumps(body))


@dataclass(frozen=True, slots=True)
class Stop:
    """Why rows run no more before all have: what becomes of the batch, and OpenAI's errors."""

    outcome: str  # expired | cancelled | completed | failed | interrupted
    errors: tuple[Problem, ...] = ()


class Runner:
    """`run` once; `stop` ends it early."""

    def __init__(
        self,
        record: BatchRecord,
        file: FileRecord,
        *,
        settings: Settings,
        storage: Storage,
        gateways: Gateways,
        tickets: Tickets,
        parts: Parts,
        progress: Progress,
    ) -> None:
        self.pace = Pace(settings.batches.max_concurrency)
        self.waiting_for: str | None = None  # in a sentence
        self.stopped: Stop | None = None
        self._batch = record
        self._file = file
        self._engine = record.id if record.options.own_engine is not None else None
        self._max_attempts = settings.batches.max_attempts
        self._most_tasks = 2 * settings.batches.max_concurrency
        self._longest = settings.gateway.max_body_bytes
        self._storage = storage
        self._gateways = gateways
        self._tickets = tickets
        self._parts = parts
        self._progress = progress
        self._answered = 0  # rows
        self._tasks = 0
        self._held = 0  # bytes of requests
        self._ended = asyncio.Event()
        self._sending: asyncio.Task[None] | None = None

    async def run(self, ready: Callable[[], Awaitable[None]] | None = None) -> None:
        """Until every row has its end, or `stop`. What has finished is durable then.

        `ready`: waits for what answers the rows; what it raises ends the run. Raises
        StorageUnavailable, StoreUnavailable, LeaseLost; NoSuchObject where the input is gone.
        """
        flushing = asyncio.create_task(self._parts.run())
        self._sending = asyncio.create_task(self._send(ready))
        if self.stopped is not None:
            self._sending.cancel()
        try:
            await asyncio.wait({flushing, self._sending}, return_when=asyncio.FIRST_COMPLETED)
            if flushing.done():
                await flushing
            await self._parts.flush()
            if not self._sending.cancelled():
                await self._sending
        finally:
            self._sending.cancel()
            flushing.cancel()
            await asyncio.gather(flushing, self._sending, return_exceptions=True)

    def stop(self, why: Stop) -> None:
        """Sends no more, and cuts what is under way. The first reason counts."""
        self.stopped = self.stopped or why
        if self._sending is not None:
            self._sending.cancel()

    def hurry(self, rows_left: int) -> None:
        """Rows become urgent as the deadline nears; now and then."""
        batch = self._batch
        left_s = batch.expires_at - time.time()
        rate = self._progress.rows_per_s
        self._tickets.priority = priority(left_s, batch.window_s, rows_left, rate)

    async def _send(self, ready: Callable[[], Awaitable[None]] | None) -> None:
        if ready is not None:
            await ready()
        try:
            async with asyncio.TaskGroup() as group:
                async for row in self._rows():
                    while self._tasks >= self._most_tasks or self._held >= MOST_HELD_BYTES:
                        self._ended.clear()
                        await self._ended.wait()
                    await self._parts.room()
                    await self.pace.slot()
                    request = _Request.of(row, self._engine)
                    self._tasks += 1
                    self._held += len(request.body)
                    group.create_task(self._see_through(request))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _rows(self) -> AsyncIterator[Row]:
        """Those that are not done yet."""
        following = 0
        rows: Iterator[Row] | None = None

        def read() -> tuple[list[Row], int]:
            nonlocal rows
            try:
                if rows is None:
                    rows = read_rows(self._storage.read(self._file.key), self._longest)
                return _piece(rows, following, self._parts.done)
            except BaseException:
                rows = None  # the next try begins anew
                raise

        while True:
            piece, following = await patiently(read)
            for row in piece:
                yield row
            if following < 0:
                return

    async def _see_through(self, request: _Request) -> None:
        """Has a slot when it begins."""
        try:
            while True:
                try:
                    end = await self._try(request)
                finally:
                    self.pace.release()
                if isinstance(end, Finished):
                    break
                await asyncio.sleep(end)
                await self.pace.slot(again=True)
            embeds = self._batch.endpoint == "/v1/embeddings"
            used = end.usage.prompt_tokens if embeds else end.usage.completion_tokens
            self._progress.count(used)
            self._parts.add(end)
        finally:
            self._tasks -= 1
            self._held -= len(request.body)
            self._ended.set()

    async def _try(self, request: _Request) -> Finished | float:
        """Its end, or the seconds until it may be tried again."""
        try:
            answer = await self._gateways.post(
                self._batch.endpoint, request.body, self._tickets.text
            )
        except Unreachable as away:
            return self._away(request, str(away), None)
        except Broken as broken:
            request.attempts += 1
            if request.attempts < self._max_attempts:
                return backoff(request.attempts)
            return outcomes.failure(
                self._batch.id,
                request.row,
                request.custom_id,
                "request_failed",
                f"Tried {request.attempts} times in vain; the last time: {broken}.",
            )
        return self._heard(request, answer)

    def _heard(self, request: _Request, answer: Answer) -> Finished | float:
        verdict, body = judge(answer)
        if verdict is Verdict.AWAY:
            self._suspect(request)
            if request.attempts < self._max_attempts:
                return self._away(request, _message(body), answer.retry_after_s)
        if verdict is Verdict.BUSY:
            self.pace.refused()
            request.waits += 1
            return backoff(request.waits) + (answer.retry_after_s or 0.0)
        if verdict is Verdict.STRANGER:
            self._tickets.renew()
        if verdict in (Verdict.STRANGER, Verdict.FAILED):
            request.attempts += 1
            if request.attempts < self._max_attempts:
                return backoff(request.attempts)
        elif verdict is not Verdict.AWAY:
            self.pace.answered(answer.room)
            self._answered += 1
            self.waiting_for = None
        return outcomes.result(
            self._batch.id, request.row, request.custom_id, answer, body, request.model
        )

    def _suspect(self, request: _Request) -> None:
        """Where others are answered, and this one never, it may be what kills the engines."""
        if self._answered > request.answered:
            if request.waits > 0:
                request.attempts += 1
            request.answered = self._answered

    def _away(self, request: _Request, reason: str, advice_s: float | None) -> float:
        """All rows wait, for none would fare better."""
        request.waits += 1
        pause = min(backoff(request.waits), advice_s) if advice_s else backoff(request.waits, 10)
        self.pace.refused()
        self.pace.close(pause)
        self.waiting_for = reason
        return 0.0


def _piece(rows: Iterator[Row], following: int, done: bytearray) -> tuple[list[Row], int]:
    """The next rows that are not done, and which row comes after them; -1: none."""
    piece: list[Row] = []
    size = 0
    for row in rows:
        if row.number < following:
            continue
        if row.number >= len(done):
            break
        if done[row.number]:
            continue
        piece.append(row)
        size += len(row.data or b"")
        if len(piece) >= ROWS_A_PIECE or size >= BYTES_A_PIECE:
            return piece, row.number + 1
    return piece, -1


def _message(body: Any) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    told = error.get("message") if isinstance(error, dict) else None
    return told if isinstance(told, str) else "no gateway can answer now"
