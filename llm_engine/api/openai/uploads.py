"""/v1/uploads: OpenAI's Uploads, files that come in parts."""

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from llm_engine import files
from llm_engine.api import multipart
from llm_engine.api.blocking import finish, intake
from llm_engine.api.cold import check, read_json
from llm_engine.api.once import digest, once
from llm_engine.api.openai.files import FileUser, NewFile, file_row
from llm_engine.errors import (
    BodyTooLarge,
    Conflict,
    InvalidRequest,
    NotFound,
    StoreUnavailable,
    Unavailable,
)
from llm_engine.ids import new_id
from llm_engine.records import FileRecord, Principal, UploadPart, UploadRecord
from llm_engine.services import Services
from llm_engine.store.idempotency import Once
from llm_engine.store.uploads import check_open, no_upload

#: Parts that nobody will name, because their answer got lost and they were sent again.
SPARE_PARTS = 8


class NewUpload(NewFile):
    filename: str
    bytes: int = Field(ge=0)
    mime_type: Annotated[str, Field(min_length=1, max_length=200, pattern="^[ -~]+$")]


class Completion(BaseModel):
    model_config = ConfigDict(extra="forbid")

    part_ids: list[Annotated[str, Field(max_length=64)]]
    md5: Annotated[str, Field(pattern="^[0-9A-Fa-f]{32}$")] | None = None


def build_router(services: Services) -> APIRouter:
    router = APIRouter()
    uploads = _Uploads(services)

    @router.post("/v1/uploads")
    async def create(request: Request, who: FileUser) -> dict[str, Any]:
        return await uploads.row(await uploads.create(who, request))

    @router.post("/v1/uploads/{upload}/parts")
    async def add_part(upload: str, request: Request, who: FileUser) -> dict[str, Any]:
        part = await uploads.add_part(who, upload, request)
        return {
            "id": part.id,
            "object": "upload.part",
            "created_at": int(part.created_at),
            "upload_id": part.upload,
        }

    @router.post("/v1/uploads/{upload}/complete")
    async def complete(upload: str, request: Request, who: FileUser) -> dict[str, Any]:
        return await uploads.row(await uploads.complete(who, upload, request))

    @router.post("/v1/uploads/{upload}/cancel")
    async def cancel(upload: str, who: FileUser) -> dict[str, Any]:
        return await uploads.row(await uploads.cancel(who, upload))

    return router


class _Uploads:
    def __init__(self, services: Services) -> None:
        self._store = services.store
        self._storage = services.storage
        self._limits = services.settings.files
        self._batch_limit = services.settings.batches.max_file_bytes

    async def get(self, who: Principal, upload: str) -> UploadRecord:
        """Raises NotFound, for another owner's too."""
        record = await asyncio.to_thread(self._store.uploads.get, upload)
        if not who.sees(record.owner):
            raise no_upload(upload)
        return record

    async def create(self, who: Principal, request: Request) -> UploadRecord:
        asked = check(NewUpload, await read_json(request))
        filename = multipart.clean_name(asked.filename, "filename")
        most, setting = self._limits.max_upload_bytes, "files.max_upload_bytes"
        if asked.purpose == files.BATCH:
            files.check_batch_name(filename, "filename")
            most, setting = min((most, setting), (self._batch_limit, "batches.max_file_bytes"))
        if asked.bytes > most:
            raise BodyTooLarge(
                f"The file would be larger than {most} bytes, the most that is taken ({setting}).",
                param="bytes",
            )
        now = time.time()
        record = UploadRecord(
            id=new_id("upload"),
            owner=who.owner,
            purpose=asked.purpose,
            filename=filename,
            bytes=asked.bytes,
            mime_type=asked.mime_type,
            status="pending",
            created_at=now,
            expires_at=now + self._limits.upload_timeout_s,
            file_expires_after_s=asked.expires_after and asked.expires_after.seconds,
        )
        key = once(request, who, "uploads", orjson.dumps(asked.model_dump()))
        return await asyncio.to_thread(
            self._store.uploads.create, record, self._limits.max_files, key
        )

    async def add_part(self, who: Principal, upload: str, request: Request) -> UploadPart:
        record = await self.get(who, upload)
        check_open(record)
        id = new_id("part")
        sha = hashlib.sha256()
        async with intake(self._storage, files.part_key(upload, id), sha.update) as taking:
            await _receive(request, taking.write, self._limits.max_part_bytes)
            await taking.flush()
            _check_size(taking.bytes, record)
        part = UploadPart(id, upload, taking.bytes, files.part_key(upload, id), time.time())
        key = once(request, who, "uploads.parts", upload, sha.digest())
        most_bytes = record.bytes + SPARE_PARTS * self._limits.max_part_bytes
        try:
            kept = await finish(
                self._store.uploads.add_part, part, self._limits.max_parts, most_bytes, key
            )
        except (StoreUnavailable, asyncio.CancelledError):
            raise  # it may be there: then so must its bytes. All parts go when the upload ends
        except BaseException:
            await self._drop(part)
            raise
        if kept != part:
            await self._drop(part)
        return kept

    async def complete(self, who: Principal, upload: str, request: Request) -> UploadRecord:
        """Again with the same parts, or twice at once, makes and tells of one file."""
        asked = check(Completion, await read_json(request))
        parts = await asyncio.to_thread(self._store.uploads.parts, upload)
        record = await self.get(who, upload)
        key = Once(record.owner, "uploads.complete", upload, digest(asked.md5, *asked.part_ids))
        if record.status == "pending":
            chosen = _chosen(parts, asked.part_ids, record.bytes)
            record = await self._assemble(record, chosen, asked.md5, key)
        if record.status != "completed" or not await asyncio.to_thread(self._is_known, key):
            check_open(record)
        return record

    async def cancel(self, who: Principal, upload: str) -> UploadRecord:
        await self.get(who, upload)
        record = await asyncio.to_thread(self._store.uploads.cancel, upload)
        await finish(files.drop_parts, self._storage, upload)
        return record

    async def row(self, record: UploadRecord) -> dict[str, Any]:
        file = None
        if record.file_id is not None:
            with contextlib.suppress(NotFound):
                file = await asyncio.to_thread(self._store.files.get, record.file_id)
        return upload_row(record, file)

    async def _drop(self, part: UploadPart) -> None:
        with contextlib.suppress(Unavailable):
            await finish(self._storage.delete, part.key)

    async def _assemble(
        self, record: UploadRecord, parts: list[UploadPart], md5: str | None, key: Once
    ) -> UploadRecord:
        """The upload as it is afterwards, whoever has ended it."""
        try:
            return await finish(files.assemble, self._storage, self._store, record, parts, md5, key)
        except InvalidRequest:
            now = await asyncio.to_thread(self._store.uploads.get, record.id)
            if now.status == "pending":
                raise
            return now

    def _is_known(self, key: Once) -> bool:
        try:
            return self._store.idempotency.find(*key) is not None
        except Conflict:
            return False


async def _receive(request: Request, write: Callable[[bytes], Awaitable[None]], most: int) -> None:
    """The form's part `data`, and nothing else."""
    found = False
    async for event in multipart.read_form(request, "data", most, "files.max_part_bytes"):
        if isinstance(event, multipart.Field):
            name = event.name[:100]
            raise InvalidRequest(
                f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter"
            )
        if isinstance(event, bytes):
            await write(event)
        else:
            found = True
    if not found:
        raise InvalidRequest(
            "Missing required parameter: 'data'.", param="data", code="missing_required_parameter"
        )


def _check_size(size: int, upload: UploadRecord) -> None:
    if size == 0:
        raise InvalidRequest("The part is empty.", param="data", code="invalid_value")
    if size > upload.bytes:
        raise InvalidRequest(
            f"The part has {size} bytes, more than the upload was declared to have "
            f"({upload.bytes}).",
            param="data",
            code="upload_too_large",
        )


def _chosen(parts: Mapping[str, UploadPart], ids: list[str], size: int) -> list[UploadPart]:
    """Those that are named, in that order. Raises InvalidRequest."""
    seen: set[str] = set()
    for id in ids:
        problem = "is not of this upload" if id not in parts else "is named twice"
        if id not in parts or id in seen:
            raise InvalidRequest(
                f"Invalid 'part_ids': part '{id}' {problem}.", param="part_ids", code="invalid_part"
            )
        seen.add(id)
    chosen = [parts[id] for id in ids]
    total = sum(part.bytes for part in chosen)
    if total != size:
        raise InvalidRequest(
            f"The parts have {total} bytes together, and the upload was declared to have {size}.",
            param="part_ids",
            code="bytes_mismatch",
        )
    return chosen


def upload_row(record: UploadRecord, file: FileRecord | None) -> dict[str, Any]:
    """OpenAI's upload object."""
    return {
        "id": record.id,
        "object": "upload",
        "bytes": record.bytes,
        "created_at": int(record.created_at),
        "filename": record.filename,
        "purpose": record.purpose,
        "status": record.status,
        "expires_at": int(record.expires_at),
        "file": None if file is None else file_row(file),
    }
