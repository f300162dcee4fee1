"""From a checked request to an answer: who is meant, within which limits, and who steps in.

A model that cannot answer before the first byte may name another one that answers in its place.
"""

import asyncio
import logging
import time

from llm_engine import background
from llm_engine.api import limits
from llm_engine.api.http import Call, ClientGone
from llm_engine.api.replicas import Replicas
from llm_engine.api.requests import EngineRequest, Form, aimed, defer
from llm_engine.api.upstream import Upstreams
from llm_engine.catalog import Route
from llm_engine.errors import APIError
from llm_engine.records import EndpointStatus, Principal, Scope
from llm_engine.services import Services

logger = logging.getLogger("llm_engine.api")

#: A model, its fallback, that one's fallback.
LONGEST_CHAIN = 3
CLIENT_CLOSED = 499  # nginx's word in metrics for a client that did not wait
SERVED_BY = b"x-llm-engine-served-by"
#: Told to batches: how many of their requests this model can have under way, all in all.
ROOM = b"x-llm-engine-room"
#: What another model may do better: not a mistake of the caller's.
_WORTH_A_FALLBACK = frozenset({429, 500, 502, 503, 504})


class Dispatcher:
    def __init__(self, services: Services) -> None:
        self._services = services
        self._balancer = services.balancer
        self._metrics = services.metrics
        self._replicas = Replicas(services)
        self._upstreams = Upstreams(services)

    async def serve(self, call: Call, request: EngineRequest, form: Form) -> None:
        """Answers the call, or raises APIError while nothing has been sent yet."""
        call.require(Scope.INFERENCE)
        who: Principal = call.principal
        route = await self._services.route(who, request.model, request.kind.task)
        first: APIError | None = None
        tried = [route.name]
        while True:
            try:
                return await self._serve(call, request, form, route, bool(first))
            except APIError as error:
                first = first or error
                next_one = await self._next(call, error, route, request, tried)
                if next_one is None:
                    # The caller asked for the first one: its reason is the one they know.
                    _say_who(call, None)
                    call.status = first.status
                    raise first from None
                logger.warning("%s cannot answer, %s does: %s", route.name, next_one.name, error)
                self._metrics.fallbacks.labels(route.name, next_one.name).inc()
                route = next_one

    async def _next(
        self, call: Call, error: APIError, route: Route, request: EngineRequest, tried: list[str]
    ) -> Route | None:
        name = route.fallback
        if call.started_answer or error.status not in _WORTH_A_FALLBACK:
            return None
        if name is None or name in tried or len(tried) >= LONGEST_CHAIN:
            return None
        tried.append(name)
        try:
            # Whoever set the fallback answers for it: it is resolved with their eyes.
            owner = Principal(route.owner, frozenset())
            return await self._services.route(owner, name, request.kind.task)
        except APIError as missing:
            logger.warning("the fallback of %s: %s", route.name, missing)
            return None

    async def _serve(
        self, call: Call, request: EngineRequest, form: Form, route: Route, instead: bool
    ) -> None:
        """One model's try, and its numbers."""
        if instead:
            _say_who(call, route.name)
            # Each has the whole time limit to itself, and its own status in the numbers.
            call.started, call.status = time.perf_counter(), 0
        label = route.endpoint.name if route.endpoint else route.name
        steps = [*route.registered, *([route.upstream] if route.upstream else [])]
        context = route.endpoint.max_model_len if route.endpoint else 0
        began = time.perf_counter()
        try:
            request = limits.hold(request, steps, context)
            if route.endpoint is not None:
                await self._ask(call, aimed(request, route), form, route.endpoint)
            else:
                assert route.upstream is not None
                await self._upstreams.serve(call, request, form, route.upstream, route.name)
        except APIError as error:
            call.status = error.status
            raise
        except ClientGone:
            call.gone = True
            call.status = call.status or CLIENT_CLOSED
            raise
        except asyncio.CancelledError:  # whoever has asked does not wait any longer
            call.status = call.status or CLIENT_CLOSED
            raise
        except BaseException:
            call.status = call.status or 500
            raise
        finally:
            if call.gone:
                self._metrics.disconnects.labels(label).inc()
            self._metrics.requests.labels(label, request.path, call.status).inc()
            self._metrics.duration.labels(label).observe(time.perf_counter() - began)

    async def _ask(
        self, call: Call, request: EngineRequest, form: Form, endpoint: EndpointStatus
    ) -> None:
        who: Principal = call.principal
        if who.batch is None:
            asking = self._balancer.online[endpoint.name]
            asking.enter()
            try:
                return await self._replicas.serve(call, request, form, endpoint)
            finally:
                asking.leave()
        replicas = self._balancer.table.replicas.get(endpoint.name, ())
        online = self._balancer.online[endpoint.name].recent
        room = background.room(endpoint, replicas, online, who.priority)
        call.fixed_headers.append((ROOM, b"%d" % room))
        request = defer(request, who.priority if endpoint.priorities else None)
        await self._replicas.serve(call, request, form, endpoint)


def served_by(call: Call) -> str | None:
    """The fallback that has answered it, if one has."""
    told = (value for name, value in call.fixed_headers if name == SERVED_BY)
    return next((value.decode() for value in told), None)


def _say_who(call: Call, name: str | None) -> None:
    """Put into the answer's headers who gives it; None: who was asked."""
    call.fixed_headers = [h for h in call.fixed_headers if h[0] != SERVED_BY]
    if name is not None:
        call.fixed_headers.append((SERVED_BY, name.encode("ascii", "replace")))
