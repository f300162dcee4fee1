"""/v1/files: OpenAI's Files."""

from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from llm_engine.api import downloads
from llm_engine.api.cold import check, having, principal
from llm_engine.api.files import Files, Wanted
from llm_engine.api.http import require
from llm_engine.records import FileRecord, Principal, Scope
from llm_engine.services import Services

FileUser = Annotated[Principal, Depends(having(Scope.FILES))]
#: Of files that clients bring; batch_output and fine-tune-results are ours to make.
Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
MOST_LISTED = 10_000


class ExpiresAfter(BaseModel):
    model_config = ConfigDict(extra="forbid")

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2_592_000)


class Purposed(BaseModel):
    purpose: Purpose


class NewFile(Purposed):
    model_config = ConfigDict(extra="forbid")

    expires_after: ExpiresAfter | None = None


def build_router(services: Services) -> APIRouter:
    router = APIRouter()
    files = Files(services)

    @router.post("/v1/files")
    async def create(request: Request, who: FileUser) -> dict[str, Any]:
        return file_row(await files.upload(who, request, read_fields))

    @router.get("/v1/files")
    async def list_files(
        who: FileUser,
        purpose: Annotated[str | None, Query(max_length=40, pattern="^[a-z_-]+$")] = None,
        limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = MOST_LISTED,
        order: Literal["asc", "desc"] = "desc",
        after: Annotated[str | None, Query(pattern=r"^file-[0-9A-Za-z_-]{1,60}$")] = None,
    ) -> Response:
        found, more = await files.page(
            who, limit=limit, after=after, purpose=purpose, newest_first=order == "desc"
        )
        # Thousands of rows: past FastAPI's own, slower encoder.
        page = list_row([file_row(record) for record in found], more)
        return Response(orjson.dumps(page), media_type="application/json")

    @router.get("/v1/files/{file}")
    async def get(file: str, who: FileUser) -> dict[str, Any]:
        return file_row(await files.get(who, file))

    @router.delete("/v1/files/{file}")
    async def delete(file: str, who: FileUser) -> dict[str, Any]:
        await files.delete(who, file)
        return {"id": file, "object": "file", "deleted": True}

    @router.api_route("/v1/files/{file}/content", methods=["GET", "HEAD"])
    async def content(file: str, request: Request) -> Response:
        who = principal(request)
        if downloads.is_signed(request.scope):
            await downloads.check_link(services, request, file)
            who = Principal("", frozenset(), sees_all=True)
        else:
            require(who, Scope.FILES)
        record = await files.get(who, file)
        return await downloads.content(services.storage, request, record)

    return router


def read_fields(fields: dict[str, str], whole: bool) -> Wanted | None:
    """Of a form. Raises InvalidRequest."""
    if not whole:
        return Wanted(check(Purposed, fields).purpose) if "purpose" in fields else None
    data: dict[str, Any] = dict(fields)
    nested = {name: data.pop(f"expires_after[{name}]", None) for name in ExpiresAfter.model_fields}
    given = {name: value for name, value in nested.items() if value is not None}
    asked = check(NewFile, data | ({"expires_after": given} if given else {}))
    return Wanted(asked.purpose, asked.expires_after and asked.expires_after.seconds)


def list_row(rows: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": rows,
        "first_id": rows[0]["id"] if rows else None,
        "last_id": rows[-1]["id"] if rows else None,
        "has_more": more,
    }


def file_row(record: FileRecord) -> dict[str, Any]:
    """OpenAI's file object."""
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.bytes,
        "created_at": int(record.created_at),
        "expires_at": None if record.expires_at is None else int(record.expires_at),
        "filename": record.filename,
        "purpose": record.purpose,
        "status": "processed",
        "status_details": None,
    }
