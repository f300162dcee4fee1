"""Bytes on their way out: whole files and ranges, streamed, and links that need no key.

What files have, the files of an adapter have as well: GET /v1/adapters/{adapter}/files/{name}.
"""

import asyncio
import re
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import Response

from llm_engine import records
from llm_engine.api.blocking import finish
from llm_engine.api.cold import principal
from llm_engine.api.http import Receive, Scope, Send, openai_error, require
from llm_engine.catalog import missing
from llm_engine.errors import InvalidKey, InvalidRequest, NotFound, StorageUnavailable
from llm_engine.fine_tunes import adapters
from llm_engine.fine_tunes.adapters import AdapterBroken
from llm_engine.records import AdapterRecord, FileRecord, Principal
from llm_engine.services import Services
from llm_engine.storage.base import NoSuchObject, Storage
from llm_engine.store.files import no_file

_CONTENT = re.compile(r"/v1/(files/[^/]+/content|adapters/[^/]+/files/[^/]+)")
_SIGNATURE = re.compile(rb"(^|&)signature=")
_RANGE = re.compile(r"bytes=\s*(\d{0,19})-(\d{0,19})\s*", re.ASCII)


def is_signed(scope: Scope) -> bool:
    """Whether the request brings a link's signature instead of a key: only then, and only to read
    a file's bytes, is none asked for. The route checks it (`check_link`)."""
    return (
        scope["method"] in ("GET", "HEAD")
        and _CONTENT.fullmatch(scope["path"]) is not None
        and _SIGNATURE.search(scope["query_string"]) is not None
    )


def build_router(services: Services) -> APIRouter:
    router = APIRouter()

    @router.api_route("/v1/adapters/{adapter}/files/{name}", methods=["GET", "HEAD"])
    async def adapter_file(adapter: str, name: str, request: Request) -> Response:
        who = principal(request)
        if is_signed(request.scope):
            await check_link(services, request, f"{adapter}/{name}")
            who = Principal("", frozenset(), sees_all=True)
        else:
            require(who, records.Scope.FILES)
        record = await asyncio.to_thread(services.store.adapters.find, adapter)
        found = await _files_of(services, record) if record and who.sees(record.owner) else []
        file = next((file for file in found if file.filename == name), None)
        if file is None:
            raise NotFound(f"No such file of an adapter: {adapter[:100]}/{name[:100]}", param="id")
        return await content(services.storage, request, file)

    return router


async def check_link(services: Services, request: Request, file: str) -> None:
    """Raises InvalidKey where the link was not made by us for this file, or has expired."""
    given = request.query_params
    expires, signature = given.get("expires", ""), given.get("signature", "")
    if not re.fullmatch(r"\d{1,12}", expires, re.ASCII):
        raise InvalidKey("This link has no time at which it expires.", code="invalid_signature")
    (await services.signer()).check_link(file, int(expires), signature)


async def link(services: Services, request: Request, record: FileRecord) -> str:
    """A URL that gives the file's bytes to whoever has it, for storage.link_expires_s."""
    return await _link(services, request, record, f"/v1/files/{record.id}/content")


async def adapter_links(
    services: Services, request: Request, who: Principal, model: str
) -> dict[str, str]:
    """Such a URL for each file of a fine-tuned model, by its name. Raises NotFound, for another
    owner's too."""
    record = await asyncio.to_thread(services.store.adapters.get, model)
    if not who.sees(record.owner):
        raise missing(model)
    return {
        file.filename: await _link(
            services, request, file, f"/v1/adapters/{record.id}/files/{quote(file.filename)}"
        )
        for file in await _files_of(services, record)
    }


async def _link(services: Services, request: Request, record: FileRecord, path: str) -> str:
    seconds = services.settings.storage.link_expires_s
    if services.settings.storage.direct_links:
        direct = await finish(services.storage.link, record.key, seconds, record.filename)
        if direct is not None:
            return direct
    expires = int(time.time()) + seconds
    signature = (await services.signer()).sign_link(record.id, expires)
    return f"{_origin(request)}{path}?expires={expires}&signature={quote(signature)}"


async def _files_of(services: Services, record: AdapterRecord) -> list[FileRecord]:
    """What its manifest tells of, as files. Raises NotFound where its bytes are gone."""
    try:
        manifest = await finish(adapters.manifest, services.storage, record.id)
    except NoSuchObject:
        raise missing(record.name) from None
    except AdapterBroken as error:
        raise StorageUnavailable(str(error)) from None
    return [
        FileRecord(
            id=f"{record.id}/{file.name}",
            owner=record.owner,
            purpose="adapter",
            filename=file.name,
            bytes=file.bytes,
            created_at=record.created_at,
            key=f"adapters/{record.id}/{file.name}",
        )
        for file in manifest.files
    ]


def _origin(request: Request) -> str:
    """The address that the request came to, as its client knows it."""
    told = request.headers.get("x-forwarded-proto", "")
    scheme = told if told in ("http", "https") else request.url.scheme
    return f"{scheme}://{request.url.netloc}"


async def content(storage: Storage, request: Request, record: FileRecord) -> Response:
    """The answer to GET and HEAD; a single range is honoured, several are not. Raises NotFound
    where the bytes are gone."""
    etag = f'"{record.id}"'  # a file never changes
    headers = {
        "content-type": "application/octet-stream",
        "content-disposition": _disposition(record.filename),
        "accept-ranges": "bytes",
        "etag": etag,
        "x-content-type-options": "nosniff",
    }
    start, length, status = 0, record.bytes, 200
    asked = request.headers.get("range")
    if asked is not None and request.headers.get("if-range", etag) == etag:
        found = _range(asked, record.bytes)
        if found is not None:
            start, length = found
            if length <= 0:
                return _unsatisfiable(record.bytes)
            status = 206
            headers["content-range"] = f"bytes {start}-{start + length - 1}/{record.bytes}"
    headers["content-length"] = str(length)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers)
    try:
        part = () if status == 200 else (start, length)
        pieces = await finish(storage.read, record.key, *part)
    except NoSuchObject:
        raise no_file(record.id) from None
    return Pieces(pieces, status, headers)


class Pieces(Response):
    """An answer whose body comes from blocking code, piece by piece, as fast as it is read."""

    def __init__(
        self, pieces: Iterator[bytes], status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(None, status, headers)
        self._pieces = pieces
        if "content-length" not in (headers or {}):
            del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(_left(receive))
        try:
            await send(_begin(self))
            while not gone.done() and (piece := await finish(next, self._pieces, b"")):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            if not gone.done():
                await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()
            if isinstance(self._pieces, Generator):
                await finish(self._pieces.close)


def _begin(response: Response) -> dict[str, Any]:
    return {
        "type": "http.response.start",
        "status": response.status_code,
        "headers": response.raw_headers,
    }


async def _left(receive: Callable[[], Any]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _range(asked: str, size: int) -> tuple[int, int] | None:
    """Where it starts, and how long it is: not longer than 0 where it lies behind the end. None
    for what is to be ignored (RFC 9110, 14.2)."""
    parsed = _RANGE.fullmatch(asked)
    if parsed is None or not (parsed[1] or parsed[2]):
        return None
    first, last = parsed[1], parsed[2]
    if not first:
        start = max(size - int(last), 0)
        return start, size - start
    start = int(first)
    if last and int(last) < start:
        return None
    return start, min(int(last) + 1 if last else size, size) - start


def _unsatisfiable(size: int) -> Response:
    error = InvalidRequest(
        f"The file has {size} bytes; the range lies behind its end.",
        code="invalid_range",
        status=416,
    )
    headers = {"content-range": f"bytes */{size}"}
    return Response(openai_error(error), 416, headers, media_type="application/json")


def _disposition(filename: str) -> str:
    plain = re.sub(r'[^ -~]|["\\%]', "_", filename)
    if plain == filename:
        return f'attachment; filename="{plain}"'
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"
