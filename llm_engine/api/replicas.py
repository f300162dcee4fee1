"""Asks the replicas of an endpoint: chooses one, relays its answer. The token path.

Until the first byte has gone to the client, a lost replica is replaced by another, unseen.
After it, the stream ends with an error event.
"""

import logging
import time

from llm_engine.api import sse
from llm_engine.api.http import Call, ClientGone
from llm_engine.api.requests import EngineRequest, Form, Kind
from llm_engine.api.waking import Waker
from llm_engine.engine.base import AdapterProblem
from llm_engine.errors import (
    APIError,
    EngineFailed,
    InternalError,
    InvalidRequest,
    Overloaded,
    StorageUnavailable,
    TookTooLong,
    Unavailable,
)
from llm_engine.records import EndpointStatus, ReplicaReport
from llm_engine.relay import EngineAbsent, EngineConnection, EngineLost, EngineSilent, post
from llm_engine.services import Services

logger = logging.getLogger("llm_engine.api")

MAX_ATTEMPTS = 3
#: Events with which vLLM begins a response, whatever becomes of it.
WORDLESS = 2
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # asks reverse proxies not to hold events back
]


class _Refused(Exception):
    """An engine that could not answer, where another might. `well`: it is not its fault."""

    def __init__(self, error: APIError, well: bool = False) -> None:
        self.error = error
        self.well = well


class Replicas:
    """Sends requests to an endpoint's replicas."""

    def __init__(self, services: Services) -> None:
        self._balancer = services.balancer
        self._pool = services.pool
        self._metrics = services.metrics
        self._limits = services.settings.gateway
        self._waker = Waker(services)

    async def serve(
        self, call: Call, request: EngineRequest, form: Form, endpoint: EndpointStatus
    ) -> None:
        """Answers the call, or raises APIError while nothing has been sent yet."""
        _check_size(request, endpoint)
        in_flight = self._metrics.in_flight.labels(endpoint.name)
        in_flight.inc()
        try:
            if self._waker.is_asleep(endpoint):
                endpoint = await self._waker.wait(call, endpoint)
            await self._try_replicas(call, request, form, endpoint)
        finally:
            in_flight.dec()

    async def _try_replicas(
        self, call: Call, request: EngineRequest, form: Form, endpoint: EndpointStatus
    ) -> None:
        failed: set[str] = set()
        asked = False  # one that was lost
        last: APIError | None = None
        for _ in range(MAX_ATTEMPTS):
            try:
                replica = self._balancer.choose(endpoint, failed, request.adapter, request.session)
            except (Unavailable, Overloaded):
                if last is not None:
                    raise last from None
                raise
            self._balancer.acquire(replica)
            try:
                return await self._ask(call, request, form, endpoint, replica)
            except EngineSilent:
                raise self._took_too_long() from None
            except EngineLost as lost:
                logger.warning("replica %s was lost: %s", replica.replica, lost)
                self._balancer.suspect(replica)
                asked = asked or not isinstance(lost, EngineAbsent)
                last = None
            except _Refused as refused:
                last = refused.error
                if not refused.well:
                    self._balancer.suspect(replica)
            finally:
                self._balancer.release(replica)
            failed.add(replica.replica)
            self._metrics.retries.labels(endpoint.name).inc()
        raise last or self._lost(endpoint, asked)

    async def _ask(
        self,
        call: Call,
        request: EngineRequest,
        form: Form,
        endpoint: EndpointStatus,
        replica: ReplicaReport,
    ) -> None:
        """One attempt. EngineLost and _Refused mean that another replica may be tried."""
        connection = await self._send(call, request, replica)
        call.when_gone(lambda: connection.fail(EngineLost("the client left")))
        try:
            status = await connection.head()
            if status != 200:
                raise self._refusal(
                    form.error(status, await connection.read_all(), request), endpoint
                )
            if request.stream:
                await self._stream(call, request, form, endpoint, connection)
            else:
                answer = await connection.read_all()
                if request.rewrite:
                    answer = form.answer(request, answer)
                await call.reply(200, answer)
        except EngineLost:
            if call.gone:
                raise ClientGone from None
            raise
        finally:
            call.when_gone(None)  # the connection may carry another's request from here on
            self._pool.give_back(replica, connection)

    async def _send(
        self, call: Call, request: EngineRequest, replica: ReplicaReport
    ) -> EngineConnection:
        connection = await self._pool.take(replica)
        texts = request.choices if request.batch else 0
        message = post(replica, request.path, request.body, texts, request.adapter)
        waited = time.perf_counter() - call.started
        connection.ask(message, time.monotonic() + self._limits.request_timeout_s - waited)
        return connection

    async def _beginning(self, request: EngineRequest, connection: EngineConnection) -> bytes:
        """The events that say more than that the engine has the request. vLLM calls a response
        created and in progress before it has looked at it, and while it waits for its turn."""
        data = await connection.read()
        if request.kind is Kind.RESPONSES:
            while sse.count(data) <= WORDLESS and (more := await connection.read()):
                data += more
        return data

    async def _stream(
        self,
        call: Call,
        request: EngineRequest,
        form: Form,
        endpoint: EndpointStatus,
        connection: EngineConnection,
    ) -> None:
        """Relay events as they come. The first ones decide whether there is an answer at all."""
        data = await self._beginning(request, connection)
        for payload in sse.payloads(data):
            if payload.startswith(b'{"error"'):
                # The engine broke before anybody heard of it: another may still answer, unseen.
                raise self._refusal(form.error(500, payload, request), endpoint)
        idle, now = self._limits.idle_timeout_s, time.perf_counter
        whole, rewrite = sse.Whole(), request.rewrite
        gaps = self._metrics.inter_token.labels(endpoint.name)
        await call.start(200, STREAM_HEADERS)
        self._metrics.first_token.labels(endpoint.name).observe(now() - call.started)
        before = now()
        try:
            while data:
                data = whole.feed(data)
                rewrite = rewrite or sse.holds_failure(data)
                if rewrite:
                    data, ended = _rewrite(request, form, data)
                    if ended:
                        await call.write(data)
                        break
                await call.write(data)
                connection.deadline = time.monotonic() + idle
                data = await connection.read()
                after = now()
                if data:
                    gaps.observe((after - before) / (sse.count(data) or 1))
                before = after
        except EngineLost as lost:
            if call.gone:
                raise ClientGone from None
            logger.warning("a stream of %s broke off: %s", request.called, lost)
            broken = InternalError(
                "The replica that was answering was lost; the answer is incomplete. Send the "
                "request again.",
                code="stream_interrupted",
            )
            await call.write(form.failure(broken))
        await call.write(b"", more=False)

    def _refusal(self, error: APIError, endpoint: EndpointStatus) -> Exception:
        if isinstance(error, Overloaded):
            return _Refused(self._balancer.overloaded(endpoint), well=True)
        if error.code == AdapterProblem.BROKEN:
            return error
        if error.code in (AdapterProblem.ELSEWHERE, StorageUnavailable.code):
            return _Refused(error, well=True)
        # A dead engine still answers HTTP for a moment; another replica may do better.
        return _Refused(error) if error.status >= 500 else error

    def _took_too_long(self) -> TookTooLong:
        return TookTooLong(
            "No byte of the answer came within "
            f"{self._limits.request_timeout_s:g} s (gateway.request_timeout_s). Ask for fewer "
            "tokens, or stream."
        )

    def _lost(self, endpoint: EndpointStatus, asked: bool) -> APIError:
        return (EngineFailed if asked else Unavailable)(
            f"The model '{endpoint.name}' cannot answer now: the replicas that were asked failed "
            "before they answered.",
            param="model",
            code=Unavailable.code,
            status=Unavailable.status,
            retry_after=self._limits.retry_after_s,
        )


def _rewrite(request: EngineRequest, form: Form, data: bytes) -> tuple[bytes, bool]:
    """Whole events in the dialect's form, and whether one is an error, after which none comes."""
    out = []
    for payload in sse.payloads(data):
        if payload.startswith(b'{"error"'):
            return b"".join([*out, form.failure(form.error(500, payload, request))]), True
        try:
            out.append(form.event(request, payload))
        except APIError as error:
            return b"".join([*out, form.failure(error)]), True
    return b"".join(out), False


def _check_size(request: EngineRequest, endpoint: EndpointStatus) -> None:
    """An engine counts each text as a request of its own; some can never fit."""
    if request.choices > endpoint.max_queue:
        raise InvalidRequest(
            f"The request asks for {request.choices} texts (n times the prompts); "
            f"'{endpoint.name}' holds at most {endpoint.max_queue} at once (max_queue).",
            param="n",
            code="integer_above_max_value",
        )
