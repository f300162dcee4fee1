"""sference's dialect, for `sference-sdk` and `sference-cli`. A view: it decides and stores nothing.

Its clients read every answer as JSON, follow no redirect, and refuse a whole list for one word
that they don't know.
"""

from collections.abc import Awaitable, Callable

import orjson
from fastapi import APIRouter, Request

from llm_engine.api.decisions import Decisions
from llm_engine.api.dispatch import Dispatcher
from llm_engine.api.http import Call
from llm_engine.api.openai.inference import Inference
from llm_engine.api.requests import Kind
from llm_engine.api.responses.operations import Responses
from llm_engine.api.sference import account, batches, models, responses, streams
from llm_engine.errors import APIError
from llm_engine.services import Services

#: What sference has and this platform has not yet: refused by name, as opposed to a wrong URL.
_NOT_YET = ("auth/login", "messages", "oauth")
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


def render_error(error: APIError) -> bytes:
    """Litestar's form, which sference's own server speaks."""
    extra = {"code": error.code, "param": error.param}
    return orjson.dumps({"status_code": error.status, "detail": error.message, "extra": extra})


def open_paths(legacy: bool) -> frozenset[str]:
    """That need no key."""
    return frozenset({account.LOGIN}) if legacy else frozenset()


def build_router(services: Services, kept: Responses, legacy: bool) -> APIRouter:
    """`legacy`: for sference-sdk 0.0.1 to 0.0.6."""
    router = APIRouter()
    queues = streams.Streams(services, legacy)
    router.include_router(account.build_router(services, legacy))
    router.include_router(models.build_router(services))
    router.include_router(batches.build_router(services))
    router.include_router(responses.build_router(services, kept, queues, legacy))
    router.include_router(streams.build_router(queues))
    for path in _NOT_YET:
        router.add_api_route(f"/v1/{path}", _refuse, methods=_METHODS)
        router.add_api_route(f"/v1/{path}/{{rest:path}}", _refuse, methods=_METHODS)
    return router


def build_hot(
    services: Services, dispatcher: Dispatcher, kept: Responses, legacy: bool
) -> dict[str, Callable[[Call], Awaitable[None]]]:
    return {
        "/v1/chat/completions": Inference(services, dispatcher, Kind.CHAT),
        "/v1/embeddings": Inference(services, dispatcher, Kind.EMBEDDINGS),
        responses.PATH: responses.CreateResponse(
            services, kept, streams.Streams(services, legacy), legacy
        ),
        "/v1/decisions": Decisions(services, dispatcher),
    }


async def _refuse(request: Request) -> None:
    raise APIError(
        f"{request.method} {request.url.path} is not served here yet.",
        status=501,
        code="not_implemented",
    )
