"""/v1/responses: answered while the client waits or later, read, cancelled; and what has ended."""

import asyncio
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Query, Request

from llm_engine.api import cold
from llm_engine.api.http import Call
from llm_engine.api.once import once
from llm_engine.api.responses.operations import NewResponse, Responses
from llm_engine.api.sference import shown
from llm_engine.api.sference.requests import parse
from llm_engine.api.sference.streams import Streams
from llm_engine.errors import Forbidden, InvalidRequest
from llm_engine.records import Principal, Scope
from llm_engine.services import Services
from llm_engine.store.responses import ROUTE

Asker = Annotated[Principal, Depends(cold.having(Scope.INFERENCE))]
Limit = Annotated[int, Query(ge=1, le=100)]
Wait = Annotated[int, Query(ge=0)]
Values = dict[str, Any]

PATH = "/v1/responses"
#: Readers that wait for events at a gateway; any more get their empty page at once.
MOST_WAITING = 1_000


class CreateResponse:
    def __init__(
        self, services: Services, responses: Responses, streams: Streams, legacy: bool
    ) -> None:
        self._responses = responses
        self._streams = streams
        self._legacy = legacy
        self._limit = services.settings.gateway.max_body_bytes
        self._within_s = services.settings.responses.max_wait_s

    async def __call__(self, call: Call) -> None:
        """Answers the call, or raises APIError while nothing has been sent yet."""
        body = await call.body(self._limit)
        new = parse(body, self._legacy)
        call.require(Scope.INFERENCE)
        if new.streamed:
            return await self._responses.tell(call, new)
        if new.background:
            await self._check_place(call.principal, new)
            first = once(Request(call.scope), call.principal, ROUTE, body)
            record = await self._responses.submit(call.principal, new, first)
        else:
            record = await self._responses.answer(call, new, self._within_s)
        await call.reply(200, orjson.dumps(shown.response_row(record, self._legacy, new.store)))

    async def _check_place(self, who: Principal, new: NewResponse) -> None:
        """Raises InvalidRequest, NotFound, Forbidden. Whether the stream is open shows when the
        response is put into it."""
        window = new.request.get("metadata", {}).get("completion_window")
        if window is not None:
            self._streams.check_window(window, "metadata.completion_window")
        if new.stream is not None:
            stream = await self._streams.find(who, new.stream)
            if stream.owner != who.owner:  # an operator: their responses are not the owner's
                raise Forbidden(f"Only '{stream.owner}' puts responses into this stream.")


def build_router(
    services: Services, responses: Responses, streams: Streams, legacy: bool
) -> APIRouter:
    router = APIRouter()
    feed = _Feed(services, responses, streams, legacy)

    @router.get(PATH)
    async def list_responses(
        who: Asker, limit: Limit = 100, stream_id: str | None = None
    ) -> Values:
        if stream_id is not None:
            await streams.find(who, stream_id)
        found, more = await responses.page(who, limit, stream=stream_id)
        data = [shown.list_row(record, legacy) for record in found]
        return {"object": "list", "data": data, "has_more": more}

    @router.get(PATH + "/events")
    async def list_events(
        who: Asker,
        limit: Limit = 20,
        wait_ms: Wait = 0,
        starting_after: str | None = None,
        ending_before: str | None = None,
        stream_id: str | None = None,
    ) -> Values:
        return await feed.page(who, stream_id, limit, wait_ms, starting_after, ending_before)

    if legacy:  # where 0.0.1 looks for them

        @router.get("/v1/streams/{stream}/events")
        async def list_stream_events(
            stream: str,
            who: Asker,
            limit: Limit = 20,
            wait_ms: Wait = 0,
            starting_after: str | None = None,
            ending_before: str | None = None,
        ) -> Values:
            return await feed.page(who, stream, limit, wait_ms, starting_after, ending_before)

    @router.get(PATH + "/{response}")
    async def get_response(response: str, who: Asker) -> Values:
        return shown.response_row(await responses.get(who, response), legacy)

    @router.delete(PATH + "/{response}")
    async def cancel_response(response: str, who: Asker) -> Values:
        return shown.response_row(await responses.cancel(who, response), legacy)

    return router


class _Feed:
    """Of a stream, or of all that is in none."""

    def __init__(
        self, services: Services, responses: Responses, streams: Streams, legacy: bool
    ) -> None:
        self._store = services.store.responses
        self._longest_s = services.settings.responses.max_wait_s
        self._responses = responses
        self._streams = streams
        self._legacy = legacy
        self._waiting = 0

    async def page(
        self,
        who: Principal,
        stream: str | None,
        limit: int,
        wait_ms: int,
        after: str | None,
        before: str | None,
    ) -> Values:
        """Raises InvalidRequest, NotFound."""
        if after is not None and before is not None:
            raise InvalidRequest(
                "Invalid 'ending_before': it is not allowed together with 'starting_after'.",
                param="ending_before",
                code="mutually_exclusive_parameters",
            )
        if stream is not None:
            await self._streams.find(who, stream)
        first = await self._serial("starting_after", after)
        last = await self._serial("ending_before", before)
        wait_s = min(wait_ms, self._longest_s * 1000) / 1000
        if self._waiting >= MOST_WAITING:
            wait_s = 0
        self._waiting += wait_s > 0
        try:
            found, more = await self._responses.feed(
                who, stream, limit=limit, after=first, before=last, wait_s=wait_s
            )
        finally:
            self._waiting -= wait_s > 0
        data = [shown.event_row(entry, self._legacy) for entry in found]
        return {"object": "list", "data": data, "has_more": more}

    async def _serial(self, param: str, cursor: str | None) -> int | None:
        """One that was given out, though its event may be gone. Raises InvalidRequest."""
        if cursor is None:
            return None
        serial = shown.serial_of(cursor)
        if serial is None or serial > await asyncio.to_thread(self._store.last_serial):
            raise InvalidRequest(
                f"Invalid '{param}': there is no event '{cursor[:64]}'.",
                param=param,
                code="unknown_cursor",
            )
        return serial
