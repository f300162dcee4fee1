"""A request to a model from within: no client, but whoever wants to know."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from llm_engine.api.dispatch import Dispatcher
from llm_engine.api.http import Call, Receive
from llm_engine.api.openai.answers import engine_error
from llm_engine.api.requests import EngineRequest, Form
from llm_engine.errors import APIError
from llm_engine.records import Principal

#: With the call within: its headers tell who answers.
Progress = Callable[[Call], Awaitable[None]]


class Whole:
    """A `Form` that keeps an engine's answer, which is never streamed."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def answer(self, request: EngineRequest, body: bytes) -> bytes:
        self.found = orjson.loads(body)
        return b""

    def event(self, request: EngineRequest, payload: bytes) -> bytes:
        raise NotImplementedError("it is never streamed")

    def error(self, status: int, body: bytes, request: EngineRequest) -> APIError:
        return engine_error(status, body, request)

    def failure(self, error: APIError) -> bytes:
        return b""


async def stays() -> dict[str, Any]:
    """What an ASGI application hears from a client that never leaves."""
    return await asyncio.Event().wait()  # type: ignore[return-value]


async def ask(
    dispatcher: Dispatcher,
    who: Principal,
    request: EngineRequest,
    form: Form,
    receive: Receive,
    progress: Progress | None = None,
) -> Call:
    """As if `who` had sent it. Whatever comes goes through `form`; `progress` is awaited whenever
    something has. Raises APIError where there is no answer, and ClientGone once `receive` tells of
    a disconnect."""

    async def send(message: dict[str, Any]) -> None:
        if progress is not None:
            await progress(call)

    scope = {"type": "http", "method": "POST", "path": request.path, "headers": []}
    call = Call(scope, receive, send, tell_id=False)
    call.principal = who
    try:
        await dispatcher.serve(call, request, form)
    finally:
        call.close()
    return call
