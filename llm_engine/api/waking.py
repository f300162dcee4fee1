"""Requests for a sleeping endpoint are held until its first replica is ready, for a bounded time.

Every ingress replica says each second how many it holds; the controller starts a replica for all
of them together.
"""

import asyncio
import logging
from collections import Counter

from llm_engine.api.http import Call, ClientGone
from llm_engine.errors import APIError, Overloaded, Unavailable
from llm_engine.records import EndpointStatus
from llm_engine.services import Services
from llm_engine.statuses import EndpointState

logger = logging.getLogger("llm_engine.api")

REPEAT_S = 1.0
_CANNOT_COME = (EndpointState.UPDATE_FAILED, EndpointState.DELETE_IN_PROGRESS)


class Waker:
    """Of one ingress replica; shared by all that ask replicas."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._balancer = services.balancer
        self._retry_after_s = services.settings.gateway.retry_after_s
        self._held: Counter[str] = Counter()
        self._alarms: dict[str, asyncio.Task[None]] = {}

    def is_asleep(self, endpoint: EndpointStatus) -> bool:
        """Whether it has no replica, but gets one when it is asked for."""
        return (
            endpoint.sleeps
            and endpoint.state not in _CANNOT_COME
            and not self._balancer.table.replicas.get(endpoint.name)
        )

    async def wait(self, call: Call, endpoint: EndpointStatus) -> EndpointStatus:
        """The endpoint once it has a replica. Raises Unavailable after its wake_timeout_s, or
        Overloaded where too many wait already."""
        name = endpoint.name
        if self._held[name] >= endpoint.max_queue:
            raise Overloaded(
                f"'{name}' is waking, and {endpoint.max_queue} requests (max_queue) wait for it "
                "here already. Retry later.",
                param="model",
                retry_after=self._retry_after_s,
            )
        self._held[name] += 1
        gone = asyncio.Event()
        call.when_gone(gone.set)
        try:
            if name not in self._alarms:
                self._alarms[name] = asyncio.create_task(self._ring(name))
            async with asyncio.timeout(endpoint.wake_timeout_s):
                return await self._until_awake(name, gone)
        except TimeoutError:
            raise self._too_late(name, endpoint.wake_timeout_s) from None
        finally:
            call.when_gone(None)
            self._held[name] -= 1

    async def _until_awake(self, name: str, gone: asyncio.Event) -> EndpointStatus:
        leaving = asyncio.create_task(gone.wait())
        try:
            while True:
                changed = asyncio.create_task(self._balancer.changed.wait())
                await asyncio.wait([changed, leaving], return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                if gone.is_set():
                    raise ClientGone
                endpoint = self._balancer.table.endpoints.get(name)
                if endpoint is None or not self.is_asleep(endpoint):
                    return self._balancer.endpoint(name)
        finally:
            leaving.cancel()

    async def _ring(self, name: str) -> None:
        """Tell the controller as long as requests are held."""
        try:
            while self._held[name] > 0:
                try:
                    await self._services.wake(name, self._held[name])
                except APIError as error:
                    logger.warning("cannot wake %s: %s", name, error)
                await asyncio.sleep(REPEAT_S)
        finally:
            self._alarms.pop(name, None)

    def _too_late(self, name: str, waited_s: float) -> Unavailable:
        endpoint = self._balancer.table.endpoints.get(name)
        why = endpoint.reason if endpoint and endpoint.reason else "its first replica is starting"
        return Unavailable(
            f"The model '{name}' was asleep and has not come up within {waited_s:g} s "
            f"(wake_timeout_s): {why}.",
            param="model",
            retry_after=self._retry_after_s,
        )
