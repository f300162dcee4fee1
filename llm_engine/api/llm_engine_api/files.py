"""File.upload, get, list, delete and download: v1/files. The same files as OpenAI's /v1/files."""

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from llm_engine.api.blocking import finish
from llm_engine.api.cold import having
from llm_engine.api.downloads import Pieces
from llm_engine.api.files import Files, Wanted
from llm_engine.errors import InvalidRequest, NotFound
from llm_engine.records import FileRecord, Principal, Scope
from llm_engine.services import Services
from llm_engine.storage.base import NoSuchObject

FileUser = Annotated[Principal, Depends(having(Scope.FILES))]
PATH = "/v1/files"
MISSING = "The specified file could not be found."
PURPOSE = "user_data"  # this dialect has none; nothing that reads a file asks for another


def build_router(services: Services) -> APIRouter:
    router = APIRouter()
    files = Files(services)

    @router.post(PATH)
    async def upload(request: Request, who: FileUser) -> dict[str, Any]:
        return {"id": (await files.upload(who, request, _read_fields)).id}

    @router.get(PATH)
    async def list_files(who: FileUser) -> Response:
        found, _ = await files.page(who, limit=services.settings.files.max_files)
        page = {"files": [_row(record) for record in found]}
        return Response(orjson.dumps(page), media_type="application/json")

    @router.get(PATH + "/{file}")
    async def get(file: str, who: FileUser) -> dict[str, Any]:
        with _words():
            return _row(await files.get(who, file))

    @router.delete(PATH + "/{file}")
    async def delete(file: str, who: FileUser) -> dict[str, Any]:
        with _words():
            await files.delete(who, file)
        return {"deleted": True}

    @router.get(PATH + "/{file}/content")
    async def content(file: str, who: FileUser) -> Response:
        with _words():
            record = await files.get(who, file)
        try:
            pieces = await finish(services.storage.read, record.key)
        except NoSuchObject:
            raise NotFound(MISSING) from None
        return Pieces(_as_json(record.id, pieces), headers={"content-type": "application/json"})

    return router


def _read_fields(fields: dict[str, str], whole: bool) -> Wanted:
    for name in fields:
        raise InvalidRequest(f"Unknown parameter: '{name[:100]}'.", code="unknown_parameter")
    return Wanted(PURPOSE)


def _row(record: FileRecord) -> dict[str, Any]:
    return {"id": record.id, "filename": record.filename, "size": record.bytes}


def _as_json(file: str, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """{"id", "content"}, with the content as text. What is not UTF-8 becomes U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    yield b'{"id":%b,"content":"' % orjson.dumps(file)
    for piece in pieces:
        if text := decoder.decode(piece):
            yield orjson.dumps(text)[1:-1]
    yield orjson.dumps(decoder.decode(b"", final=True))[1:-1] + b'"}'


@contextmanager
def _words() -> Iterator[None]:
    """This API's own words."""
    try:
        yield
    except NotFound:
        raise NotFound(MISSING) from None
