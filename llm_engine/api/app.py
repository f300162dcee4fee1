"""The gateway: one ASGI application, its mount table, and what holds for every request.

The token path (`hot`) goes straight to its handler; all else is a FastAPI application.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from llm_engine import __version__, metrics
from llm_engine.api.auth import Keyring
from llm_engine.api.http import Call, ClientGone, Receive, Scope, Send
from llm_engine.api.openai import models
from llm_engine.api.openai.inference import Inference
from llm_engine.api.openai.requests import Kind
from llm_engine.errors import (
    APIError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    Overloaded,
)
from llm_engine.services import Services
from llm_engine.statuses import EndpointState

logger = logging.getLogger("llm_engine.api")

SERVER_ERROR = "The server had an error while processing your request."
OPEN_PATHS = frozenset({"/health"})
Handler = Callable[[Call], Awaitable[None]]


def build_app(services: Services) -> "Gateway":
    hot: dict[str, Handler] = {
        "/v1/chat/completions": Inference(services, Kind.CHAT),
        "/v1/completions": Inference(services, Kind.COMPLETIONS),
        "/v1/embeddings": Inference(services, Kind.EMBEDDINGS),
    }
    cold = FastAPI(
        title="llm-engine", version=__version__, redirect_slashes=False, openapi_url=None
    )
    cold.include_router(models.build_router(services))
    _add_operations(cold, services)
    _add_error_handlers(cold)
    return Gateway(services, hot, cold)


class Gateway:
    """Keys, request ids and error objects for every path, whoever answers it."""

    def __init__(self, services: Services, hot: dict[str, Handler], cold: FastAPI) -> None:
        self._hot = hot
        self._cold = cold
        self._keys = Keyring(services.settings.gateway.api_keys)
        self._limit = services.settings.gateway.max_in_flight
        self._retry_after_s = services.settings.gateway.retry_after_s
        self._metrics = services.metrics
        self._tell_id = services.tell_request_id
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._refuse_protocol(scope, receive, send)
        call = Call(scope, receive, send, tell_id=self._tell_id)
        self._in_flight += 1
        try:
            await self._answer(call)
        except ClientGone:
            call.gone = True
        except APIError as error:
            await self._fail(call, error)
        except Exception:
            if not call.started_answer:
                logger.exception("request %s failed", call.request_id.decode("latin-1"))
                await self._fail(call, InternalError(SERVER_ERROR))
        finally:
            self._in_flight -= 1
            call.close()

    async def _answer(self, call: Call) -> None:
        path, method = call.scope["path"], call.scope["method"]
        if method == "OPTIONS":
            return await call.reply(200, b"{}", [(b"allow", b"GET, POST, OPTIONS")])
        if path not in OPEN_PATHS:
            self._keys.check(call.header(b"authorization"))
        handler = self._hot.get(path)
        if handler is None:
            return await self._cold(call.scope, call.receive, _with_headers(call))
        if method != "POST":
            raise MethodNotAllowed(f"{path} takes POST, not {method}.")
        if self._in_flight > self._limit:
            raise Overloaded(
                f"This server carries at most {self._limit} requests at once "
                "(gateway.max_in_flight). Retry later.",
                retry_after=self._retry_after_s,
            )
        await handler(call)

    async def _fail(self, call: Call, error: APIError) -> None:
        if call.started_answer:
            # Too late for a status: cutting the connection is the only honest end left.
            raise error
        if call.status == 0:  # nobody has counted it yet
            path = call.scope["path"] if call.scope["path"] in self._hot else "other"
            self._metrics.requests.labels("unknown", path, error.status).inc()
        await call.fail(error)

    async def _refuse_protocol(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._cold(scope, receive, send)
        await receive()
        await send({"type": "websocket.close", "code": 1003})


def _with_headers(call: Call) -> Send:
    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            call.started_answer = True
            call.status = message["status"]
            headers = [*message.get("headers", []), *call.fixed_headers]
            message = {**message, "headers": headers}
        await call.send(message)

    return send


def _add_operations(app: FastAPI, services: Services) -> None:
    @app.get("/health")
    async def health() -> dict[str, Any]:
        """calute's shape: `agents` is how many models are ready for chat."""
        endpoints = services.balancer.table.endpoints.values()
        ready = [e for e in endpoints if e.state is EndpointState.READY]
        return {
            "status": "healthy" if len(ready) == len(endpoints) else "degraded",
            "agents": sum(e.task == "generate" for e in ready),
        }

    @app.get("/metrics")
    async def prometheus() -> Response:
        text = await services.all_metrics()
        if text is None:
            table = services.balancer.table
            text = metrics.render(services.metrics.samples(), table.endpoints.values())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_error_handlers(app: FastAPI) -> None:
    def answer(error: APIError) -> Response:
        return Response(orjson.dumps(error.body()), error.status, media_type="application/json")

    @app.exception_handler(APIError)
    async def ours(request: Request, error: APIError) -> Response:
        return answer(error)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        return answer(InternalError(SERVER_ERROR))  # Starlette logs it

    @app.exception_handler(HTTPException)
    async def framework(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path}"
        if error.status_code == 404:
            return answer(NotFound(f"Invalid URL ({where})", code="unknown_url"))
        if error.status_code == 405:
            return answer(MethodNotAllowed(f"Not allowed to {where}."))
        return answer(InvalidRequest(str(error.detail), status=error.status_code))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:])
        return answer(InvalidRequest(f"Invalid '{param}': {first['msg']}.", param=param))
