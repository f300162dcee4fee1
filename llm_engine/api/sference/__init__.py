"""sference's dialect, for `sference-sdk` and `sference-cli`. A view: it decides and stores nothing.

Its clients read every answer as JSON, follow no redirect, and refuse a whole list for one word
that they don't know.
"""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Request

from llm_engine.api import cold
from llm_engine.api.dispatch import Dispatcher
from llm_engine.api.http import Call
from llm_engine.api.openai.inference import Inference
from llm_engine.api.requests import Kind
from llm_engine.api.sference import batches, models
from llm_engine.errors import APIError
from llm_engine.records import Principal, Scope
from llm_engine.services import Services

Anyone = Annotated[Principal, Depends(cold.principal)]

#: What sference has and this platform has not yet: refused by name, as opposed to a wrong URL.
_NOT_YET = ("auth/login", "decisions", "messages", "oauth", "responses", "streams")
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


def render_error(error: APIError) -> bytes:
    """Litestar's form, which sference's own server speaks."""
    extra = {"code": error.code, "param": error.param}
    return orjson.dumps({"status_code": error.status, "detail": error.message, "extra": extra})


def build_router(services: Services) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/auth/me")
    async def get_me(who: Anyone) -> dict[str, Any]:
        return {
            "id": who.owner,
            "username": who.owner,
            "role": "admin" if who.may(Scope.ADMIN) else "user",
            "scopes": sorted(who.scopes),
            "realtime_enabled": who.may(Scope.INFERENCE),
        }

    router.include_router(models.build_router(services))
    router.include_router(batches.build_router(services))
    for path in _NOT_YET:
        router.add_api_route(f"/v1/{path}", _refuse, methods=_METHODS)
        router.add_api_route(f"/v1/{path}/{{rest:path}}", _refuse, methods=_METHODS)
    return router


def build_hot(
    services: Services, dispatcher: Dispatcher
) -> dict[str, Callable[[Call], Awaitable[None]]]:
    return {
        "/v1/chat/completions": Inference(services, dispatcher, Kind.CHAT),
        "/v1/embeddings": Inference(services, dispatcher, Kind.EMBEDDINGS),
    }


async def _refuse(request: Request) -> None:
    raise APIError(
        f"{request.method} {request.url.path} is not served here yet.",
        status=501,
        code="not_implemented",
    )
