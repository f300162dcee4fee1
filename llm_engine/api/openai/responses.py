"""/v1/responses: created (whole, streamed, in the background), read, cancelled, deleted."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response, StreamingResponse

from llm_engine.api.cold import having, read_body
from llm_engine.api.dispatch import Dispatcher
from llm_engine.api.http import Call
from llm_engine.api.once import once
from llm_engine.api.openai.files import list_row
from llm_engine.api.openai.requests import check
from llm_engine.api.replicas import STREAM_HEADERS
from llm_engine.api.requests import Kind
from llm_engine.api.responses import items
from llm_engine.api.responses.counting import count_tokens
from llm_engine.api.responses.engine import CHANGES
from llm_engine.api.responses.operations import NewResponse, Responses, framed
from llm_engine.api.responses.shown import show
from llm_engine.errors import InvalidRequest, NotFound
from llm_engine.records import Principal, Scope
from llm_engine.responses import ResponseRecord
from llm_engine.services import Services
from llm_engine.store.responses import ROUTE

Asker = Annotated[Principal, Depends(having(Scope.INFERENCE))]
Values = dict[str, Any]

DIALECT = "openai"
PATH = "/v1/responses"
SIGN_OF_LIFE = b": \n\n"  # a comment, which clients skip


class CreateResponse:
    def __init__(self, services: Services, responses: Responses) -> None:
        self._responses = responses
        self._limit = services.settings.gateway.max_body_bytes

    async def __call__(self, call: Call) -> None:
        """Answers the call, or raises APIError while nothing has been sent yet."""
        body = await call.body(self._limit)
        new = parse(body)
        if call.principal.batch is not None:
            new = _of_batch(new)
        if new.background:
            await self._submit(call, new, body)
        elif new.streamed:
            await self._responses.tell(call, new)
        else:
            record = await self._responses.answer(call, new)
            await call.reply(200, orjson.dumps(show(record, new.store)))

    async def _submit(self, call: Call, new: NewResponse, body: bytes) -> None:
        call.require(Scope.INFERENCE)
        first = once(Request(call.scope), call.principal, ROUTE, body)
        record = await self._responses.submit(call.principal, new, first)
        if not new.streamed:
            return await call.reply(200, orjson.dumps(show(record)))
        call.when_gone(lambda: None)
        await call.start(200, STREAM_HEADERS)
        async for piece in _events(self._responses, record, -1):
            if call.gone:  # it goes on without them
                return
            await call.write(piece)
        await call.write(b"", more=False)


def parse(body: bytes) -> NewResponse:
    """Raises InvalidRequest."""
    data, changes = check(Kind.RESPONSES, body)
    talk = data.pop("conversation", None)
    given = data.pop("input")
    store = data.get("store")
    return NewResponse(
        dialect=DIALECT,
        model=data.pop("model"),
        input=items.whole(given),
        background=data.pop("background", None) is True,
        streamed=data.pop("stream", None) is True,
        store=store is not False,
        previous=data.pop("previous_response_id", None),
        conversation=talk["id"] if isinstance(talk, dict) else talk,
        request=data | {CHANGES: changes},
    )


def _of_batch(new: NewResponse) -> NewResponse:
    """A row's: the batch keeps what it says, so it is stored only where the row asks for it."""
    if new.background:
        raise InvalidRequest(
            "Requests of a batch cannot be in the background: leave 'background' out.",
            param="background",
            code="invalid_value",
        )
    return replace(new, store=new.request.get("store") is True)


def build_router(services: Services, dispatcher: Dispatcher, responses: Responses) -> APIRouter:
    router = APIRouter()

    @router.post(PATH + "/input_tokens")
    async def count(request: Request, who: Asker) -> Values:
        body = await read_body(request, services.settings.gateway.max_body_bytes)
        tokens = await count_tokens(services, dispatcher, who, parse(body))
        return {"object": "response.input_tokens", "input_tokens": tokens}

    @router.get(PATH + "/{response}")
    async def retrieve(
        response: str,
        who: Asker,
        stream: bool = False,
        starting_after: Annotated[int, Query(ge=0, le=2**31 - 1)] | None = None,
    ) -> Response:
        record = await responses.get(who, response)
        if not stream:
            if starting_after is not None:
                raise InvalidRequest(
                    "'starting_after' is only allowed when 'stream' is true.",
                    param="starting_after",
                    code="invalid_value",
                )
            return _answer(record)
        if not record.streamed:
            raise InvalidRequest(
                "Only a response that was created with 'background' and 'stream' has a stream.",
                param="stream",
                code="invalid_value",
            )
        after = -1 if starting_after is None else starting_after
        headers = {name.decode(): value.decode() for name, value in STREAM_HEADERS}
        return StreamingResponse(_events(responses, record, after), headers=headers)

    @router.post(PATH + "/{response}/cancel")
    async def cancel(response: str, who: Asker) -> Response:
        record = await responses.get(who, response)
        if not record.background:
            raise InvalidRequest("Cannot cancel a synchronous response.", code="invalid_value")
        return _answer(await responses.cancel(who, response))

    @router.delete(PATH + "/{response}")
    async def delete(response: str, who: Asker) -> Values:
        await responses.delete(who, response)
        return {"id": response, "object": "response", "deleted": True}

    @router.get(PATH + "/{response}/input_items")
    async def input_items(
        response: str,
        who: Asker,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> Values:
        record = await responses.get(who, response)
        found = record.input if order == "asc" else record.input[::-1]
        if after is not None:
            places = [place for place, item in enumerate(found) if item["id"] == after]
            if not places:
                raise NotFound(f"Item with id '{after[:100]}' not found.", param="after")
            found = found[places[0] + 1 :]
        return list_row(found[:limit], len(found) > limit)

    return router


async def _events(responses: Responses, record: ResponseRecord, after: int) -> AsyncIterator[bytes]:
    async for events in responses.events(record, after):
        yield b"".join(map(framed, events)) or SIGN_OF_LIFE


def _answer(record: ResponseRecord) -> Response:
    return Response(orjson.dumps(show(record)), media_type="application/json")
