"""/v1/streams: named queues that responses are put into."""

import asyncio
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from llm_engine.api import cold
from llm_engine.api.sference.shown import stream_row
from llm_engine.errors import InvalidRequest, NotFound
from llm_engine.ids import new_id
from llm_engine.records import Principal, Scope
from llm_engine.responses import Stream
from llm_engine.services import Services
from llm_engine.statuses import StreamState
from llm_engine.store.streams import no_stream

Asker = Annotated[Principal, Depends(cold.having(Scope.INFERENCE))]
Values = dict[str, Any]

#: Of a list: its clients know no pages.
MOST_LISTED = 1_000


class _NewStream(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str = Field(min_length=1, max_length=200, pattern=r"^[^\x00]*$")
    window: str = "24h"


class _Change(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    status: Literal["cancelled", "archived"]


class Streams:
    """Those that the clients of a mount have words for."""

    def __init__(self, services: Services, legacy: bool) -> None:
        self._store = services.store.streams
        self._most = services.settings.responses.max_streams
        self._legacy = legacy
        self.windows = ("1h", "24h") if legacy else ("24h",)

    async def find(self, who: Principal, stream: str) -> Stream:
        """Raises NotFound."""
        found = await asyncio.to_thread(self._store.get, stream)
        if not who.sees(found.owner):
            raise no_stream(stream)
        if found.window not in self.windows:
            raise NotFound(
                f"The window of stream '{stream}' is '{found.window}', which clients of this URL "
                "cannot read. See /sference-legacy.",
                param="stream_id",
            )
        return found

    async def add(self, who: Principal, name: str, window: str) -> Stream:
        """Raises InvalidRequest, Conflict."""
        self.check_window(window, "window")
        now = time.time()
        made = Stream(new_id("stream"), who.owner, name, window, StreamState.OPEN, now, now)
        await asyncio.to_thread(self._store.add, made, self._most)
        return made

    def check_window(self, window: Any, param: str) -> None:
        """Raises InvalidRequest."""
        if window not in self.windows:
            known = " or ".join(f"'{each}'" for each in self.windows)
            raise InvalidRequest(
                f"Invalid '{param}': it must be {known}.", param=param, code="invalid_value"
            )

    async def page(self, who: Principal) -> list[Stream]:
        found = await asyncio.to_thread(self._store.page, who.whose, MOST_LISTED)
        return [stream for stream in found if stream.window in self.windows]

    async def close(self, who: Principal, stream: str, state: StreamState) -> Stream:
        """Raises NotFound, Conflict."""
        await self.find(who, stream)
        return await asyncio.to_thread(self._store.close, stream, state)

    async def row(self, stream: Stream) -> Values:
        return stream_row(stream, await asyncio.to_thread(self._store.counts, stream.id))


def build_router(streams: Streams) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/streams", status_code=201)
    async def create_stream(request: Request, who: Asker) -> Values:
        asked = cold.check(_NewStream, await cold.read_json(request))
        return await streams.row(await streams.add(who, asked.name, asked.window))

    @router.get("/v1/streams")
    async def list_streams(who: Asker) -> Values:
        return {"items": [stream_row(stream) for stream in await streams.page(who)]}

    @router.get("/v1/streams/{stream}")
    async def get_stream(stream: str, who: Asker) -> Values:
        return await streams.row(await streams.find(who, stream))

    @router.patch("/v1/streams/{stream}")
    async def change_stream(stream: str, request: Request, who: Asker) -> Values:
        asked = cold.check(_Change, await cold.read_json(request))
        return await streams.row(await streams.close(who, stream, StreamState(asked.status)))

    return router
