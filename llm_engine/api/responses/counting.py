"""How many tokens a request would be for its model."""

import asyncio
from dataclasses import replace
from typing import Any

import orjson

from llm_engine.api.dispatch import Dispatcher
from llm_engine.api.openai.answers import engine_error
from llm_engine.api.requests import EngineRequest, Kind
from llm_engine.api.responses.asking import ask
from llm_engine.api.responses.context import context
from llm_engine.api.responses.engine import engine_request
from llm_engine.api.responses.operations import NewResponse
from llm_engine.errors import APIError
from llm_engine.ids import new_id
from llm_engine.records import Principal
from llm_engine.responses import ResponseRecord
from llm_engine.services import Services
from llm_engine.statuses import ResponseState

#: vLLM's: what a request becomes, and nothing is generated.
_RENDER = "/v1/responses/render"


class _Rendered:
    """A `Form` that keeps a count."""

    tokens = 0

    def answer(self, request: EngineRequest, body: bytes) -> bytes:
        self.tokens = len(orjson.loads(body)["token_ids"])
        return b""

    def event(self, request: EngineRequest, payload: bytes) -> bytes:
        raise NotImplementedError("it is never streamed")

    def error(self, status: int, body: bytes, request: EngineRequest) -> APIError:
        return engine_error(status, body, request)

    def failure(self, error: APIError) -> bytes:
        return b""


async def count_tokens(
    services: Services, dispatcher: Dispatcher, who: Principal, new: NewResponse
) -> int:
    """With all that came before. Raises APIError as a request to the model does."""
    await services.route(who, new.model, Kind.RESPONSES.task)
    before = await context(services, who, new.previous, new.conversation)
    record = ResponseRecord(
        new_id("resp"), who.owner, new.dialect, new.model, ResponseState.QUEUED, 0, 0,
        request=new.request, input=new.input,
    )  # fmt: skip
    request = replace(engine_request(record, before, False), path=_RENDER)
    form = _Rendered()
    await ask(dispatcher, who, request, form, _stays)
    return form.tokens


async def _stays() -> dict[str, Any]:
    return await asyncio.Event().wait()  # type: ignore[return-value]
