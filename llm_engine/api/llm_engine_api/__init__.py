"""Scale's LLM Engine dialect, for its client `llmengine`. A view: it decides and stores nothing."""

from collections.abc import Awaitable, Callable

import orjson
from fastapi import APIRouter

from llm_engine.api.dispatch import Dispatcher
from llm_engine.api.http import Call
from llm_engine.api.llm_engine_api import batches, endpoints, files, fine_tunes
from llm_engine.api.llm_engine_api.completions import Completions
from llm_engine.errors import APIError
from llm_engine.services import Services


def render_error(error: APIError) -> bytes:
    """The client shows `detail` as it is, so it must be a sentence."""
    return orjson.dumps({"detail": error.message})


def build_router(services: Services) -> APIRouter:
    router = endpoints.build_router(services)
    router.include_router(batches.build_router(services))
    router.include_router(files.build_router(services))
    router.include_router(fine_tunes.build_router(services))
    return router


def build_hot(
    services: Services, dispatcher: Dispatcher
) -> dict[str, Callable[[Call], Awaitable[None]]]:
    return {
        "/v1/llm/completions-sync": Completions(services, dispatcher, stream=False),
        "/v1/llm/completions-stream": Completions(services, dispatcher, stream=True),
    }
