"""What clients do to responses, whichever dialect they speak."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from llm_engine.api.dispatch import Dispatcher, served_by
from llm_engine.api.http import Call
from llm_engine.api.replicas import STREAM_HEADERS
from llm_engine.api.requests import EngineRequest, Kind
from llm_engine.api.responses.asking import ask
from llm_engine.api.responses.context import Context, context
from llm_engine.api.responses.engine import engine_request
from llm_engine.api.responses.tail import Tail
from llm_engine.api.responses.turn import Turn, ended
from llm_engine.api.responses.worker import Worker
from llm_engine.api.upstream import no_responses
from llm_engine.errors import APIError, NotFound, TookTooLong
from llm_engine.ids import new_id
from llm_engine.records import Principal, Scope
from llm_engine.responses import FeedEntry, Item, ResponseRecord
from llm_engine.services import Services
from llm_engine.statuses import ResponseState
from llm_engine.store.idempotency import Once
from llm_engine.store.responses import no_response

#: How long a cancellation is waited for, so that the answer tells of it.
CANCEL_S = 2.0


@dataclass(frozen=True, slots=True)
class NewResponse:
    """What is asked for. `request`: the fields of OpenAI's body besides those that are here."""

    dialect: str
    model: str
    input: list[Item]
    request: dict[str, Any] = field(default_factory=dict)
    background: bool = False
    streamed: bool = False
    store: bool = True
    previous: str | None = None
    conversation: str | None = None
    stream: str | None = None
    custom_id: str | None = None


class Responses:
    """What dialects do with responses. From `start` on those in the background are run, too."""

    def __init__(self, services: Services, dispatcher: Dispatcher) -> None:
        self._services = services
        self._store = services.store.responses
        self._limits = services.settings.responses
        self._dispatcher = dispatcher
        self._tail = Tail(services.store)
        self._worker = Worker(services, dispatcher, self._tail)

    async def start(self) -> None:
        """Take up what waits in the store."""
        self._worker.start()

    def retire(self, within_s: float) -> None:
        """This gateway is going to stop: others take up what waits."""
        self._worker.retire(within_s)

    async def stop(self) -> None:
        """Give back what is not finished."""
        await self._worker.stop()
        self._tail.stop()

    # -- made

    async def submit(
        self, who: Principal, new: NewResponse, once: Once | None = None
    ) -> ResponseRecord:
        """In the background: in the store, and so it will be done. Raises APIError."""
        route = await self._services.route(who, new.model, Kind.RESPONSES.task)
        if route.upstream is not None:
            raise no_responses(new.model)
        before = await context(self._services, who, new.previous, new.conversation)
        record = self._record(who, new, before)
        events: list[bytes] = []
        if new.streamed:
            turn = Turn(record)
            turn.begin("created", "queued")
            events = turn.take()
        adding = (record, events, self._limits.max_open, once)
        record = await asyncio.to_thread(self._store.add, *adding)
        self._worker.hurry()
        return record

    async def answer(
        self, call: Call, new: NewResponse, within_s: float | None = None
    ) -> ResponseRecord:
        """While the client waits: it has ended, and is in the store if it is to be. Raises
        APIError, ClientGone; TookTooLong if there is no answer `within_s`, and then it is given
        up."""
        turn, request = await self._prepare(call, new)
        try:
            async with asyncio.timeout(within_s) as limit:
                inner = await ask(self._dispatcher, call.principal, request, turn, call.receive)
        except TimeoutError:
            if not limit.expired():
                raise
            raise TookTooLong(
                f"The answer did not come within {within_s:g} s (responses.max_wait_s), and the "
                "request was cancelled. Ask for it in the background."
            ) from None
        turn.answered_by(served_by(inner))
        _pass_headers(inner, call)
        return await self._keep(turn, new)

    async def tell(self, call: Call, new: NewResponse) -> None:
        """While the client waits, and hears each event. Raises APIError while nothing was sent."""
        turn, request = await self._prepare(call, new)

        async def progress(inner: Call) -> None:
            if not call.started_answer:
                turn.answered_by(served_by(inner))
                turn.begin("created", "in_progress")
                _pass_headers(inner, call)
                await call.start(200, STREAM_HEADERS)
            if events := turn.take():
                await call.write(b"".join(map(framed, events)))

        inner = await ask(self._dispatcher, call.principal, request, turn, call.receive, progress)
        await progress(inner)
        try:
            record = await self._keep(turn, new)
        except APIError as error:  # it must not look as if it were there to be retrieved
            turn.fail(error)
            record = ended(turn.record, turn.close(), time.time())
        rest = [*turn.take(), turn.last(record)]
        await call.write(b"".join(map(framed, rest)))
        await call.write(b"", more=False)

    async def _prepare(self, call: Call, new: NewResponse) -> tuple[Turn, EngineRequest]:
        who: Principal = call.principal
        call.require(Scope.INFERENCE)
        await self._services.route(who, new.model, Kind.RESPONSES.task)
        before = await context(self._services, who, new.previous, new.conversation)
        record = self._record(who, new, before)
        return Turn(record, new.store), engine_request(record, before, new.streamed)

    async def _keep(self, turn: Turn, new: NewResponse) -> ResponseRecord:
        record = ended(turn.record, turn.close(), time.time())
        if new.store:
            await asyncio.to_thread(self._store.add, record)
            self._tail.poke()
        return record

    def _record(self, who: Principal, new: NewResponse, before: Context) -> ResponseRecord:
        now = time.time()
        record = ResponseRecord(
            id=new_id("resp"),
            owner=who.owner,
            dialect=new.dialect,
            model=new.model,
            state=ResponseState.QUEUED if new.background else ResponseState.IN_PROGRESS,
            created_at=now,
            expires_at=now + self._limits.expires_s,
            background=new.background,
            streamed=new.streamed and new.background,
            request=new.request,
            input=new.input,
            previous=new.previous,
            conversation=new.conversation,
            context_until=before.until,
            stream=new.stream,
            custom_id=new.custom_id,
            sees_all=who.sees_everything,
        )
        return record

    # -- afterwards

    async def get(self, who: Principal, response: str) -> ResponseRecord:
        """Raises NotFound."""
        record = await asyncio.to_thread(self._store.get, response)
        if not who.sees(record.owner):
            raise no_response(response)
        return record

    async def cancel(self, who: Principal, response: str) -> ResponseRecord:
        """One that has ended stays as it is. Raises NotFound."""
        record = await self.get(who, response)
        if record.state.is_final:
            return record
        record = await asyncio.to_thread(self._store.ask_cancel, response)
        self._worker.hurry()
        self._tail.poke()
        return await self.wait(who, response, CANCEL_S)

    async def delete(self, who: Principal, response: str) -> None:
        """Raises NotFound."""
        await self.get(who, response)
        await asyncio.to_thread(self._store.delete, response)
        self._worker.hurry()
        self._tail.poke()

    async def page(
        self, who: Principal, limit: int, after: str | None = None, stream: str | None = None
    ) -> tuple[list[ResponseRecord], bool]:
        """Theirs, newest first, and whether there are more."""
        return await asyncio.to_thread(
            lambda: self._store.page(who.whose, limit=limit, after=after, stream=stream)
        )

    async def wait(self, who: Principal, response: str, seconds: float) -> ResponseRecord:
        """Once it has ended, or after so many seconds. Raises NotFound, also when it goes."""
        record = await self.get(who, response)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not record.state.is_final:
                    await self._tail.change(response, (record.told, False))
                    record = await self.get(who, response)
        return record

    async def events(self, record: ResponseRecord, after: int) -> AsyncIterator[list[bytes]]:
        """Its events with a higher sequence number, in JSON, until the last one; an empty list
        now and then while there are none."""
        async for events in self._tail.follow(record.id, after):
            after += len(events)
            yield events
        # Where no gateway worked on it when it was cancelled, its log has no end.
        with contextlib.suppress(NotFound):
            record = await asyncio.to_thread(self._store.get, record.id)
            if record.state is ResponseState.CANCELLED and after < record.told:
                end = Turn(record).last(record)
                newest = await asyncio.to_thread(self._store.events, record.id, record.told - 2)
                if not newest or orjson.loads(newest[-1])["type"] != orjson.loads(end)["type"]:
                    yield [end]

    # -- the feed

    async def feed(
        self,
        who: Principal,
        stream: str | None,
        *,
        limit: int,
        after: int | None = None,
        before: int | None = None,
        wait_s: float = 0.0,
    ) -> tuple[list[FeedEntry], bool]:
        """As `store.responses.feed`; an empty page is waited for, up to `wait_s`."""

        whose = who.whose

        def read() -> tuple[list[FeedEntry], bool]:
            return self._store.feed(whose, stream, limit=limit, after=after, before=before)

        loop = asyncio.get_running_loop()
        until = loop.time() + (0 if before is not None else min(wait_s, self._limits.max_wait_s))
        while True:
            serial = self._tail.serial
            page = await asyncio.to_thread(read)
            if page[0] or loop.time() >= until:
                return page
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._tail.news(whose, stream, serial)


def framed(event: bytes) -> bytes:
    """As a server-sent event. `event`: a JSON object that begins with its type, or has one."""
    return b"event: " + orjson.loads(event)["type"].encode() + b"\ndata: " + event + b"\n\n"


def _pass_headers(inner: Call, outer: Call) -> None:
    """What the dispatcher tells of whoever answered."""
    known = {name for name, _ in outer.fixed_headers}
    outer.fixed_headers += [h for h in inner.fixed_headers if h[0] not in known]
