"""The gateway: one ASGI application, its mount table, and what holds for every request.

The token path (`hot`) goes straight to its handler; all else is a FastAPI application a dialect.
"""

import logging
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.responses import Response
from fastapi.routing import APIRoute

from llm_engine import metrics, records
from llm_engine.api import admin, downloads, llm_engine_api, root_signals, sference
from llm_engine.api.auth import Keyring, Scheme
from llm_engine.api.cold import PRINCIPAL, SERVER_ERROR, Render, build_cold, having
from llm_engine.api.decisions import Decisions
from llm_engine.api.dispatch import Dispatcher
from llm_engine.api.http import Call, ClientGone, Receive, Scope, Send, openai_error
from llm_engine.api.openai import (
    batches,
    conversations,
    files,
    fine_tuning,
    models,
    responses,
    stored_chats,
    uploads,
)
from llm_engine.api.openai.inference import Inference
from llm_engine.api.requests import Kind
from llm_engine.api.responses.operations import Responses
from llm_engine.errors import APIError, InternalError, MethodNotAllowed, Overloaded
from llm_engine.services import Services
from llm_engine.statuses import EndpointState

logger = logging.getLogger("llm_engine.api")

OPEN_PATHS = frozenset({"/health"})
Handler = Callable[[Call], Awaitable[None]]


@dataclass(frozen=True)
class Mount:
    """A dialect: where it lies, how its clients send their key and read an error."""

    prefix: str
    schemes: Collection[Scheme]
    render: Render
    cold: FastAPI
    hot: dict[str, Handler] = field(default_factory=dict)  # by path; POST only
    open: frozenset[str] = frozenset()  # paths that need no key


def build_app(services: Services) -> "Gateway":
    dispatcher = Dispatcher(services)
    background = Responses(services, dispatcher)
    return Gateway(
        services,
        background,
        [
            _mount_llm_engine(services, dispatcher),
            _mount_root_signals(services),
            _mount_sference(services, dispatcher, background, "/sference", legacy=False),
            _mount_sference(services, dispatcher, background, "/sference-legacy", legacy=True),
            _mount_openai(services, dispatcher, background),  # last: its prefix is everybody's
        ],
    )


def _mount_openai(services: Services, dispatcher: Dispatcher, kept: Responses) -> Mount:
    cold = build_cold(openai_error)
    cold.include_router(models.build_router(services))
    cold.include_router(batches.build_router(services))
    cold.include_router(files.build_router(services))
    cold.include_router(uploads.build_router(services))
    cold.include_router(fine_tuning.build_router(services))
    cold.include_router(responses.build_router(services, dispatcher, kept))
    cold.include_router(conversations.build_router(services))
    cold.include_router(stored_chats.build_router(services))
    cold.include_router(downloads.build_router(services))
    cold.include_router(admin.build_router(services))
    _add_operations(cold, services)
    return Mount(
        prefix="/",
        schemes=(Scheme.BEARER, Scheme.HEADER),
        render=openai_error,
        cold=cold,
        hot={
            "/v1/chat/completions": Inference(services, dispatcher, Kind.CHAT),
            "/v1/completions": Inference(services, dispatcher, Kind.COMPLETIONS),
            "/v1/embeddings": Inference(services, dispatcher, Kind.EMBEDDINGS),
            "/v1/responses": responses.CreateResponse(services, kept),
            "/v1/decisions": Decisions(services, dispatcher),
        },
    )


def _mount_llm_engine(services: Services, dispatcher: Dispatcher) -> Mount:
    prefix = "/llm-engine"
    cold = build_cold(llm_engine_api.render_error)
    cold.include_router(llm_engine_api.build_router(services), prefix=prefix)
    return Mount(
        prefix=f"{prefix}/",
        schemes=(Scheme.BASIC, Scheme.BEARER, Scheme.HEADER),
        render=llm_engine_api.render_error,
        cold=cold,
        hot={
            f"{prefix}{path}": handler
            for path, handler in llm_engine_api.build_hot(services, dispatcher).items()
        },
    )


def _mount_root_signals(services: Services) -> Mount:
    prefix = "/rootsignals"
    cold = build_cold(root_signals.render_error)
    cold.include_router(root_signals.build_router(services), prefix=prefix)
    return Mount(
        prefix=f"{prefix}/",
        schemes=(Scheme.API_KEY, Scheme.BEARER),
        render=root_signals.render_error,
        cold=cold,
    )


def _mount_sference(
    services: Services, dispatcher: Dispatcher, kept: Responses, prefix: str, *, legacy: bool
) -> Mount:
    cold = build_cold(sference.render_error)
    cold.include_router(sference.build_router(services, kept, legacy), prefix=prefix)
    return Mount(
        prefix=f"{prefix}/",
        schemes=(Scheme.BEARER, Scheme.HEADER),
        render=sference.render_error,
        cold=cold,
        hot={
            f"{prefix}{path}": handler
            for path, handler in sference.build_hot(services, dispatcher, kept, legacy).items()
        },
        open=frozenset(f"{prefix}{path}" for path in sference.open_paths(legacy)),
    )


class Gateway:
    """Keys, request ids and error objects for every path, whoever answers it."""

    def __init__(self, services: Services, responses: Responses, mounts: list[Mount]) -> None:
        self._mounts = mounts
        self._responses = responses
        self._hot = {path: mount for mount in mounts for path in mount.hot}
        routes = [route for mount in mounts for route in mount.cold.routes]
        self._cold_paths = {route.path for route in routes if isinstance(route, APIRoute)}
        self._keys = Keyring(services)
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
            logger.exception("request %s failed", call.request_id.decode("latin-1"))
            if not call.started_answer:
                await self._fail(call, InternalError(SERVER_ERROR))
        finally:
            self._in_flight -= 1
            call.close()

    async def _answer(self, call: Call) -> None:
        path, method = call.scope["path"], call.scope["method"]
        mount = self._hot.get(path) or self._mount_of(path)
        call.render = mount.render
        if method == "OPTIONS":
            return await call.reply(200, b"{}", [(b"allow", b"GET, POST, OPTIONS")])
        is_open = path in OPEN_PATHS or path in mount.open
        if not is_open and not downloads.is_signed(call.scope):
            call.principal = await self._keys.identify(call, mount.schemes)
        handler = mount.hot.get(path)
        if handler is not None and method != "POST":
            if path not in self._cold_paths:
                raise MethodNotAllowed(f"{path} takes POST, not {method}.")
            handler = None
        if handler is None:
            call.scope[PRINCIPAL] = call.principal
            return await mount.cold(call.scope, call.receive, _with_headers(call))
        if self._in_flight > self._limit:
            raise Overloaded(
                f"This server carries at most {self._limit} requests at once "
                "(gateway.max_in_flight). Retry later.",
                retry_after=self._retry_after_s,
            )
        await handler(call)

    def _mount_of(self, path: str) -> Mount:
        return next(mount for mount in self._mounts if f"{path}/".startswith(mount.prefix))

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
            return await self._live(receive, send)
        await receive()
        await send({"type": "websocket.close", "code": 1003})

    def retire(self, within_s: float) -> None:
        """Other gateways take up what is in the background; what runs here has so long to end."""
        self._responses.retire(within_s)

    async def _live(self, receive: Receive, send: Send) -> None:
        """ASGI's lifespan: what goes on besides requests."""
        while True:
            word = (await receive())["type"]
            if word == "lifespan.startup":
                await self._responses.start()
            else:
                await self._responses.stop()
            await send({"type": f"{word}.complete"})
            if word == "lifespan.shutdown":
                return


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
        table = services.balancer.table
        wanted = [
            e for e in table.endpoints.values() if e.state is not EndpointState.DELETE_IN_PROGRESS
        ]
        # One that sleeps is ready too: it answers whoever asks.
        ready = [
            e
            for e in wanted
            if table.replicas.get(e.name) or (e.sleeps and e.state is EndpointState.READY)
        ]
        return {
            "status": "healthy" if len(ready) == len(wanted) else "degraded",
            "agents": sum(e.task == "generate" for e in ready),
        }

    @app.get("/metrics", dependencies=[Depends(having(records.Scope.METRICS))])
    async def prometheus() -> Response:
        text = await services.all_metrics()
        if text is None:
            table = services.balancer.table
            text = metrics.render(services.metrics.samples(), table.endpoints.values())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
