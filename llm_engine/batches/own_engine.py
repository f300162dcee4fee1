"""Engines of a batch's own: a private endpoint under the batch's id, while its rows run."""

import asyncio
import contextlib

from llm_engine.batches.lease import Lease
from llm_engine.config import EndpointSettings, Settings
from llm_engine.errors import Conflict, LLMEngineError, NotFound
from llm_engine.patience import patiently
from llm_engine.records import BatchRecord
from llm_engine.statuses import EndpointState
from llm_engine.store.sql import Store

LOOK_EVERY_S = 1.0


class EngineFailed(LLMEngineError):
    """It cannot serve the batch; the text says why."""


class OwnEngine:
    def __init__(self, store: Store, settings: Settings, lease: Lease) -> None:
        self._endpoints = store.endpoints
        self._limit = settings.store.max_endpoints
        self._lease = lease

    async def start(self) -> None:
        """Until it is ready. Raises EngineFailed."""
        await patiently(self._create, self._lease.record)
        while (waiting := await self._look()) is not None:
            if waiting != self._lease.record.reason:
                await self._lease.note(reason=waiting)
            await asyncio.sleep(LOOK_EVERY_S)
        await self._lease.note(reason=None)

    async def watch(self) -> None:
        """For ever. Raises EngineFailed."""
        while True:
            await self._look()
            await asyncio.sleep(LOOK_EVERY_S)

    async def delete(self) -> None:
        """Also where it is gone already."""

        def delete() -> None:
            with contextlib.suppress(NotFound, Conflict):
                self._endpoints.ask_delete(self._lease.record.id)

        await patiently(delete)

    def _create(self, record: BatchRecord) -> None:
        asked = record.options.own_engine or {}
        try:
            settings = EndpointSettings(**{**asked, "name": record.id, "public": False})
        except ValueError as error:
            raise EngineFailed(f"its engine cannot be set up: {error}") from None
        try:
            self._endpoints.create(
                settings, record.owner, {"batch": record.id}, self._limit, origin="batch"
            )
        except Conflict as conflict:
            if conflict.code != "name_taken":  # by a job of this batch that has died
                raise EngineFailed(conflict.message) from None

    async def _look(self) -> str | None:
        """What it waits for; None: it is ready."""
        try:
            endpoint = await patiently(self._endpoints.get, self._lease.record.id)
        except NotFound:
            raise EngineFailed("somebody has deleted its engine") from None
        if endpoint.state is EndpointState.READY:
            return None
        if endpoint.state is EndpointState.DELETE_IN_PROGRESS:
            raise EngineFailed("somebody has deleted its engine")
        if endpoint.state is EndpointState.UPDATE_FAILED and endpoint.settled:
            raise EngineFailed(
                f"its engine cannot start: {endpoint.reason or 'no reason is known'}"
            )
        return f"its engine is starting: {endpoint.reason or endpoint.state}"
