"""A request to a model from within: no client, but whoever wants to know."""

from collections.abc import Awaitable, Callable
from typing import Any

from llm_engine.api.dispatch import Dispatcher
from llm_engine.api.http import Call, Receive
from llm_engine.api.requests import EngineRequest, Form
from llm_engine.records import Principal

Progress = Callable[[], Awaitable[None]]


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
            await progress()

    scope = {"type": "http", "method": "POST", "path": request.path, "headers": []}
    call = Call(scope, receive, send, tell_id=False)
    call.principal = who
    try:
        await dispatcher.serve(call, request, form)
    finally:
        call.close()
    return call
