"""Scale's LLM Engine dialect, for its client `llmengine`. A view: it decides and stores nothing."""

from collections.abc import Awaitable, Callable

import orjson
from fastapi import APIRouter

from llm_engine.api.dispatch import Dispatcher
from llm_engine.api.http import Call
from llm_engine.errors import APIError
from llm_engine.services import Services


def render_error(error: APIError) -> bytes:
    return orjson.dumps({"detail": error.message})


def build_router(services: Services) -> APIRouter:
    return APIRouter()


def build_hot(
    services: Services, dispatcher: Dispatcher
) -> dict[str, Callable[[Call], Awaitable[None]]]:
    return {}
