"""/v1/batches: OpenAI's, and on top of it any window from ten minutes to two weeks, engines of its
own, and how fast it goes."""

import asyncio
import re
from typing import Annotated, Any, Literal, Required

import orjson
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response
from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter
from typing_extensions import TypedDict

from llm_engine.api.batches import Batches, NewBatch
from llm_engine.api.cold import having, read_json
from llm_engine.api.http import openai_error
from llm_engine.api.once import once
from llm_engine.api.openai import problems
from llm_engine.api.openai.fields import Metadata
from llm_engine.api.openai.files import list_row
from llm_engine.batches.rows import read_rows
from llm_engine.errors import Conflict, NotFound
from llm_engine.records import BatchOptions, BatchRecord, Principal, Scope
from llm_engine.services import Services
from llm_engine.statuses import BatchState
from llm_engine.storage.base import NoSuchObject
from llm_engine.store.batches import ROUTE

Keeper = Annotated[Principal, Depends(having(Scope.FILES))]
Values = dict[str, Any]

DIALECT = "openai"
ENDPOINTS = {
    "/v1/chat/completions": "generate",
    "/v1/completions": "generate",
    "/v1/embeddings": "embed",
    "/v1/responses": "generate",
}
_WINDOW = re.compile(r"([0-9]{1,6})([mhd])")
_SECONDS = {"m": 60, "h": 3600, "d": 86400}
SHORTEST_S, LONGEST_S = 600, 14 * 86400
#: In BatchOptions.extras: the window in the caller's own words.
WINDOW = "completion_window"

_Id = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f]*$")]


class OutputExpiry(TypedDict):
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # type: ignore[misc]
    anchor: Literal["created_at"]  # of the file, not of the batch
    seconds: Annotated[int, Field(ge=3600, le=30 * 86400)]


class NewBatchBody(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # type: ignore[misc]
    input_file_id: Required[_Id]
    endpoint: Required[str]
    completion_window: Required[str]
    metadata: Metadata | None
    output_expires_after: OutputExpiry | None
    #: Ours: engines like the model's endpoint, for as long as the batch runs.
    own_engine: bool | None


_SHAPE = TypeAdapter(NewBatchBody)


def build_router(services: Services) -> APIRouter:
    router = APIRouter()
    batches = Batches(services)

    async def options_of(who: Principal, asked: Values) -> tuple[BatchOptions, str | None]:
        """And its model, where that had to be looked up."""
        expiry, engine, model = asked.get("output_expires_after"), None, None
        if asked.get("own_engine"):
            model = await asyncio.to_thread(first_model, services, who, asked["input_file_id"])
        if model is not None:
            engine = await batches.engine_like(who, model, ENDPOINTS[asked["endpoint"]])
        options = BatchOptions(
            output_expires_after_s=expiry["seconds"] if expiry else None,
            own_engine=engine.model_dump(mode="json") if engine else None,
            extras={WINDOW: asked["completion_window"]},
        )
        return options, model

    @router.post("/v1/batches")
    async def create_batch(request: Request, who: Keeper) -> Response:
        asked = parse(await read_json(request))
        told = orjson.dumps(asked, option=orjson.OPT_SORT_KEYS)
        first = once(request, who, ROUTE, told)
        options, model = await options_of(who, asked)
        new = NewBatch(
            dialect=DIALECT,
            endpoint=asked["endpoint"],
            window_s=window_seconds(asked["completion_window"]),
            model=model,
            metadata=asked.get("metadata"),
            options=options,
        )
        try:
            return _answer(await batches.create(who, new, asked["input_file_id"], first))
        except Conflict as error:
            return final(error)

    @router.get("/v1/batches")
    async def list_batches(
        who: Keeper,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> Values:
        found, has_more = await batches.page(who, after, limit)
        return list_row([batch_row(record) for record in found], has_more)

    @router.get("/v1/batches/{batch}")
    async def get_batch(batch: str, who: Keeper) -> Values:
        return batch_row(await batches.get(who, batch))

    @router.post("/v1/batches/{batch}/cancel")
    async def cancel_batch(batch: str, who: Keeper) -> Response:
        try:
            return _answer(await batches.cancel(who, batch))
        except Conflict as error:
            return final(error)

    return router


def parse(data: Values) -> Values:
    """The body of a new batch, checked: NewBatchBody. Raises InvalidRequest."""
    asked = problems.parse(_SHAPE, data)
    _check_endpoint(asked["endpoint"])
    window_seconds(asked["completion_window"])
    return asked


def _check_endpoint(endpoint: str) -> None:
    if endpoint in ENDPOINTS:
        return
    supported = ", ".join(f"'{each}'" for each in ENDPOINTS)
    raise problems.invalid(
        f"Invalid value for 'endpoint': {problems.show(endpoint)}. Supported values are: "
        f"{supported}.",
        "endpoint",
        "invalid_value",
    )


def window_seconds(text: str) -> float:
    """Raises InvalidRequest."""
    found = _WINDOW.fullmatch(text)
    seconds = int(found[1]) * _SECONDS[found[2]] if found else 0
    if not SHORTEST_S <= seconds <= LONGEST_S:
        raise problems.invalid(
            f"Invalid value for 'completion_window': {problems.show(text)}. Supported values are "
            "'24h' and any other time from 10m to 14d, such as '1h', '4h' or '7d'.",
            "completion_window",
            "invalid_value",
        )
    return float(seconds)


def window_text(record: BatchRecord) -> str:
    """As it was asked for; of other dialects' batches in hours or minutes, rounded up."""
    asked = record.options.extras.get(WINDOW)
    if asked is not None:
        return asked
    minutes = -int(-record.window_s // 60)
    return f"{minutes}m" if minutes % 60 else f"{minutes // 60}h"


def first_model(services: Services, who: Principal, file: str) -> str | None:
    """Which model the first line of an input names; None where it cannot be told: then the job
    will say what is wrong. Blocking. Raises StorageUnavailable."""
    try:
        record = services.store.files.get(file)
        if not who.sees(record.owner):
            return None
        longest = services.settings.gateway.max_body_bytes
        pieces = services.storage.read(record.key, 0, longest + 1)
        row = next(read_rows(pieces, longest), None)
        model = orjson.loads(row.data if row and row.data else b"")["body"]["model"]
    except (NotFound, NoSuchObject, orjson.JSONDecodeError, TypeError, KeyError):
        return None
    return model if isinstance(model, str) else None


def batch_row(record: BatchRecord) -> Values:
    """OpenAI's batch object; `status_reason`, `progress` and `own_engine` are ours."""
    usage, ended = record.usage, record.state.is_final  # a file is there once the batch has ended
    errors = [
        {key: error.get(key) for key in ("code", "message", "param", "line")}
        for error in record.errors
    ]
    return {
        "id": record.id,
        "object": "batch",
        "endpoint": record.endpoint,
        "model": record.model,
        "errors": {"object": "list", "data": errors} if errors else None,
        "input_file_id": record.input_file_id,
        "completion_window": window_text(record),
        "status": record.state,
        "output_file_id": record.output_file_id if ended else None,
        "error_file_id": record.error_file_id if ended else None,
        "created_at": int(record.created_at),
        "expires_at": int(record.expires_at),
        **{f"{state}_at": _second(record.began(state)) for state in _TIMED},
        "request_counts": {
            "total": record.total,
            "completed": record.completed,
            "failed": record.failed,
        },
        "usage": {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        },
        "metadata": record.metadata,
        "status_reason": record.reason,
        "progress": record.progress or None,
        "own_engine": record.options.own_engine is not None,
    }


_TIMED = [state for state in BatchState if state is not BatchState.VALIDATING]


def _second(at: float | None) -> int | None:
    return None if at is None else int(at)


def final(error: Conflict) -> Response:
    """OpenAI's clients would try a 409 twice more; this one stays what it is."""
    headers = {"x-should-retry": "false"}
    return Response(openai_error(error), error.status, headers, media_type="application/json")


def _answer(record: BatchRecord) -> Response:
    return Response(orjson.dumps(batch_row(record)), media_type="application/json")
