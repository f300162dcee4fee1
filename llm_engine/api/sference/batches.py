"""/v1/batches: made of rows that come along or of a file, watched, cancelled, and their results."""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from typing import IO, Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from llm_engine.api import cold
from llm_engine.api.batches import Batches, NewBatch
from llm_engine.api.blocking import finish
from llm_engine.api.downloads import Pieces, link
from llm_engine.api.requests import Kind
from llm_engine.api.sference import inline, rows
from llm_engine.errors import Conflict, InvalidRequest, NotFound
from llm_engine.records import BatchOptions, BatchRecord, Principal, Scope
from llm_engine.services import Services
from llm_engine.store.files import no_file

Keeper = Annotated[Principal, Depends(cold.having(Scope.FILES))]
Values = dict[str, Any]

#: Of a list: its clients know no pages.
MOST_LISTED = 1_000
#: Bodies that one gateway checks at a time: each keeps a core busy, for seconds perhaps.
MOST_CHECKED = 2
DIALECT = "sference"
_WINDOW_S = 24 * 3600.0
_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")


def build_router(services: Services) -> APIRouter:
    router = APIRouter()
    batches = Batches(services)
    creation = _Creation(services, batches)

    @router.post("/v1/batches", status_code=201)
    async def create_batch(request: Request, who: Keeper) -> Values:
        return rows.batch_row(await creation.create(who, request))

    @router.get("/v1/batches")
    async def list_batches(who: Keeper) -> Values:
        found, _ = await batches.page(who, None, MOST_LISTED)
        return {"items": [rows.batch_row(record) for record in found]}

    @router.get("/v1/batches/{batch}")
    async def get_batch(batch: str, who: Keeper) -> Values:
        return rows.batch_row(await batches.get(who, batch))

    @router.post("/v1/batches/{batch}/cancel")
    async def cancel_batch(batch: str, who: Keeper) -> Values:
        try:
            return rows.batch_row(await batches.cancel(who, batch))
        except Conflict:
            word = rows.status(await batches.get(who, batch))
            raise Conflict(
                f"The batch has ended: its status is '{word}'.", code="batch_ended"
            ) from None

    @router.get("/v1/batches/{batch}/results")
    async def get_results(batch: str, request: Request, who: Keeper) -> Response:
        record = await batches.get(who, batch)
        head = {
            "batch_id": record.id,
            "status": rows.status(record),
            "output_url": await _output_url(services, request, record),
            "completed_at": rows.ended(record),
        }
        if not record.state.is_final:
            return JSONResponse(head | {"results": None})
        lines = await finish(batches.results, record)
        return Pieces(rows.as_object(head, lines), headers={"content-type": "application/json"})

    @router.get("/v1/batches/{batch}/results.jsonl")
    async def download_results(batch: str, who: Keeper) -> Response:
        record = await batches.get(who, batch)
        if not record.state.is_final:
            raise Conflict(
                f"The batch is {rows.status(record)}: its results are there when it has ended.",
                code="batch_not_ended",
            )
        lines = await finish(batches.results, record)
        return Pieces(rows.as_lines(lines), headers={"content-type": "application/x-ndjson"})

    return router


class _Creation:
    def __init__(self, services: Services, batches: Batches) -> None:
        self._services = services
        self._batches = batches
        self._limit = services.settings.batches.max_inline_bytes
        self._checks = asyncio.Semaphore(MOST_CHECKED)

    async def create(self, who: Principal, request: Request) -> BatchRecord:
        """Raises APIError before anything is made."""

        loop = asyncio.get_running_loop()

        def exists(model: str) -> None:
            looking = self._services.route(who, model, Kind.CHAT.task)
            asyncio.run_coroutine_threadsafe(looking, loop).result()

        async with _received(request, self._limit) as body, self._checks:
            asked = await finish(inline.read, body, self._services.settings, exists)
        with asked:
            _check(asked)
            if asked.inline:
                return await self._from_rows(who, asked)
            return await self._from_file(who, asked)

    async def _from_rows(self, who: Principal, asked: inline.Asked) -> BatchRecord:
        options = BatchOptions(extras={rows.COUNT: asked.count})
        new = NewBatch(DIALECT, inline.ENDPOINT, _WINDOW_S, model=asked.model, options=options)
        return await self._batches.create_from_lines(who, new, asked.lines)

    async def _from_file(self, who: Principal, asked: inline.Asked) -> BatchRecord:
        file, path = asked.texts.get("input_file_id"), asked.texts.get("endpoint")
        assert file is not None and path is not None
        record = await asyncio.to_thread(self._services.store.files.get, file)
        if not who.sees(record.owner):
            raise no_file(file)
        return await self._batches.create(who, NewBatch(DIALECT, path, _WINDOW_S), file)


def _check(asked: inline.Asked) -> None:
    """What the fields besides the rows say. Raises InvalidRequest."""
    for name in ("window", "completion_window"):
        if asked.texts.get(name) not in (None, rows.WINDOW):
            raise InvalidRequest(
                f"Invalid '{name}': it must be '{rows.WINDOW}'. Other windows can be asked for at "
                "/v1/batches.",
                param=name,
                code="invalid_value",
            )
    file = asked.texts.get("input_file_id")
    if asked.inline == (file is not None):
        problem = "not both" if file is not None else "and neither is there"
        raise InvalidRequest(
            f"A batch takes 'requests' or 'input_file_id', {problem}.",
            param="requests",
            code="invalid_value" if file is not None else "missing_required_parameter",
        )
    path = asked.texts.get("endpoint")
    if asked.inline and asked.count == 0:
        raise InvalidRequest(
            "Invalid 'requests': at least one is needed.", param="requests", code="empty_array"
        )
    if path not in ((None, inline.ENDPOINT) if asked.inline else _PATHS):
        raise InvalidRequest(
            f"Invalid 'endpoint': it must be one of {', '.join(_PATHS)}, and "
            f"{inline.ENDPOINT} with 'requests'.",
            param="endpoint",
            code="invalid_value",
        )


@contextlib.asynccontextmanager
async def _received(request: Request, limit: int) -> AsyncIterator[IO[bytes]]:
    """The body, on disk if it is large. Raises BodyTooLarge."""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise inline.too_large(limit)
    with tempfile.SpooledTemporaryFile(inline.SMALL) as body:
        held = bytearray()
        async for part in request.stream():
            held += part
            if body.tell() + len(held) > limit:
                raise inline.too_large(limit)
            if len(held) >= inline.SMALL:
                await finish(body.write, bytes(held))
                held.clear()
        await finish(body.write, bytes(held))
        body.seek(0)
        yield body


async def _output_url(services: Services, request: Request, record: BatchRecord) -> str | None:
    """Opens the output file, which is in OpenAI's form, without a key; None where there is none."""
    if record.output_file_id is None:
        return None
    try:
        file = await asyncio.to_thread(services.store.files.get, record.output_file_id)
    except NotFound:
        return None
    return await link(services, request, file)
