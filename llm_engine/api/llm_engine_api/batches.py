"""Completion.batch_create, get_batch_completion and cancel_batch_completion, in both versions."""

import asyncio
import tempfile
from datetime import UTC, datetime
from typing import IO, Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Query, Request

from llm_engine import files
from llm_engine.api import batches
from llm_engine.api.cold import check, having, json_object, read_json
from llm_engine.api.http import require
from llm_engine.api.llm_engine_api import batch_rows, settings
from llm_engine.api.llm_engine_api.batch_rows import V1, V2
from llm_engine.api.llm_engine_api.fields import BatchChange, BatchModel, NewBatch
from llm_engine.api.llm_engine_api.vllm_options import refuse, within
from llm_engine.config import EndpointSettings
from llm_engine.errors import BodyTooLarge, Conflict, InvalidRequest, NotFound
from llm_engine.records import BatchOptions, BatchRecord, Principal, Scope
from llm_engine.services import Services
from llm_engine.statuses import BatchState
from llm_engine.storage.opening import open_path

Keeper = Annotated[Principal, Depends(having(Scope.FILES))]
Values = dict[str, Any]

DIALECT = "llm_engine"
PATH_V1, PATH_V2 = "/v1/llm/batch-completions", "/v2/batch-completions"
WINDOW_S = 86400.0
#: Bodies that one gateway reads at a time: a large one takes memory, and seconds of a core.
MOST_READ = 2
#: Of a body; what is larger waits on disk.
SMALL = 2**20

_HARDWARE = ("cpus", "gpus", "memory", "gpu_type", "storage")
_PRIORITY = (
    "batches run by their deadlines, the earliest first; say so with max_runtime_sec. Requests of "
    "a batch always stand behind everybody else's."
)


def build_router(services: Services) -> APIRouter:
    """Success is always 200: the client takes nothing else for one."""
    router = APIRouter()
    shared = batches.Batches(services)
    creation = _Creation(services, shared)

    async def get(who: Principal, job: str) -> BatchRecord:
        try:
            return await shared.get(who, job)
        except NotFound:
            raise NotFound(f"Batch completion {job[:100]} not found.") from None

    @router.post(PATH_V1)
    async def create_v1(request: Request, who: Keeper) -> Values:
        return {"job_id": (await creation.create(who, request, V1)).id}

    @router.post(PATH_V2)
    async def create_v2(request: Request, who: Keeper) -> Values:
        return job_row(await creation.create(who, request, V2))

    @router.get(PATH_V2)
    async def list_jobs(
        who: Keeper,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 100,
    ) -> Values:
        found, has_more = await shared.page(who, after, limit)
        return {"jobs": [job_row(record) for record in found], "has_more": has_more}

    @router.get(PATH_V2 + "/{job}")
    async def get_job(job: str, who: Keeper) -> Values:
        return {"job": job_row(await get(who, job))}

    @router.post(PATH_V2 + "/{job}")
    async def update_job(job: str, request: Request, who: Keeper) -> Values:
        record = await get(who, job)
        if check(BatchChange, await read_json(request)).priority is not None:
            raise refuse("priority", f"it cannot be changed: {_PRIORITY}")
        return job_row(record) | {"success": True}

    @router.post(PATH_V2 + "/{job}/actions/cancel")
    async def cancel_job(job: str, who: Keeper) -> Values:
        await get(who, job)
        try:
            await shared.cancel(who, job)
        except Conflict:  # it has ended
            return {"success": False}
        return {"success": True}

    return router


class _Creation:
    def __init__(self, services: Services, shared: batches.Batches) -> None:
        self._services = services
        self._batches = shared
        self._limits = services.settings.batches
        self._reading = asyncio.Semaphore(MOST_READ)

    async def create(self, who: Principal, request: Request, form: str) -> BatchRecord:
        """Raises APIError; then nothing was made."""
        with tempfile.SpooledTemporaryFile(SMALL) as body:
            await _receive(request, body, self._limits.max_inline_bytes)
            async with self._reading:
                asked = check(NewBatch, await asyncio.to_thread(_load, body))
                return await self._create(who, asked, form)

    async def _create(self, who: Principal, asked: NewBatch, form: str) -> BatchRecord:
        _check(asked)
        for param in ("output_data_path", "input_data_path"):
            if (path := getattr(asked, param)) is not None:
                open_path(self._services.settings, path, owner=who.owner, param=param)
        model, labels = asked.model.model, asked.labels or asked.model.labels or {}
        engine = await self._engine(who, asked)
        new = batches.NewBatch(
            dialect=DIALECT,
            endpoint=_endpoint(asked, form),
            window_s=asked.max_runtime_sec or WINDOW_S,
            model=model,
            options=BatchOptions(
                own_engine=engine.model_dump(mode="json") if engine else None,
                input_path=asked.input_data_path,
                output_path=asked.output_data_path,
                output_form=form,
                labels=labels,
                extras={settings.EXTRAS: _described(asked)},
            ),
        )
        if asked.input_data_path is not None:
            return await self._batches.create(who, new, files.new_file_id())
        bodies = batch_rows.bodies(asked.content, form)
        lines = batch_rows.lines(bodies, model, self._limits.max_rows)
        return await self._batches.create_from_lines(who, new, lines)

    async def _engine(self, who: Principal, asked: NewBatch) -> EndpointSettings | None:
        """Settings of engines of its own; None: those that serve the model now are meant."""
        model, replicas = asked.model.model, asked.data_parallelism or 1
        values = _configured(asked)
        base = None
        if "checkpoint_path" not in values:
            try:
                await self._services.route(who, model, "generate")
            except NotFound:
                if not who.may(Scope.ENDPOINTS):
                    raise
            else:
                if not values and replicas == 1:
                    return None
                base = await self._batches.engine_like(who, model, "generate")
        if base is None:
            values["model_name"] = model
        if values:
            # As good as running code on the nodes: it decides which model's code is loaded.
            require(who, Scope.ENDPOINTS)
        try:
            return settings.own_engine(base, values, replicas)
        except InvalidRequest as error:
            raise _in_our_words(error) from None


def _endpoint(asked: NewBatch, form: str) -> str:
    """The path of all rows; of an input that has not been read, a guess that its job corrects."""
    if form == V1:
        return batch_rows.COMPLETIONS
    if asked.content is None:
        return batch_rows.CHAT
    return batch_rows.path_of(next(batch_rows.bodies(asked.content, form)))


def job_row(record: BatchRecord) -> Values:
    """BatchCompletionsJob, for every batch, whichever dialect made it; from `status_reason` on it
    is ours, and the client leaves it aside."""
    options, ended = record.options, record.state.is_final
    described = options.extras.get(settings.EXTRAS, {})
    output = record.output_file_id if ended else None
    return {
        "job_id": record.id,
        "input_data_path": options.input_path,
        "output_data_path": options.output_path or output or "",
        "model_config": {"model": record.model or "", **described.get("model_config", {})},
        "priority": None,
        "status": status(record),
        "created_at": _iso(record.created_at),
        "expires_at": _iso(record.expires_at),
        "completed_at": _iso(record.times[record.state]) if ended else None,
        "metadata": options.labels or record.metadata or {},
        "status_reason": record.reason,
        "errors": record.errors or None,
        "request_counts": {
            "total": record.total,
            "completed": record.completed,
            "failed": record.failed,
        },
        "data_parallelism": described.get("data_parallelism"),
        "input_file_id": record.input_file_id,
        "output_file_id": output,
        "error_file_id": record.error_file_id if ended else None,
    }


def status(record: BatchRecord) -> str:
    if record.state is BatchState.VALIDATING:
        return "running" if record.starts else "queued"
    return _STATUS.get(record.state, "running")


_STATUS = {
    BatchState.COMPLETED: "completed",
    BatchState.FAILED: "failed",
    BatchState.EXPIRED: "failed",
    BatchState.CANCELLED: "cancelled",
}


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat()


async def _receive(request: Request, body: IO[bytes], limit: int) -> None:
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise BodyTooLarge(
                f"The request body is larger than {limit} bytes, the limit of this server "
                "(batches.max_inline_bytes). Put the content into a file and name it in "
                "'input_data_path'."
            )
        body.write(part)


def _load(body: IO[bytes]) -> Any:
    body.seek(0)
    return json_object(body.read())


def _check(asked: NewBatch) -> None:
    if (asked.content is None) == (asked.input_data_path is None):
        raise refuse("content", "give either 'content' or 'input_data_path', and not both.")
    if asked.tool_config is not None:
        raise refuse("tool_config", "tools are not run here; call them from the answers.")
    if asked.priority is not None:
        raise refuse("priority", _PRIORITY)
    if asked.nodes_per_worker not in (None, 1):
        raise refuse("nodes_per_worker", "a worker lies on one node here.")
    if len(orjson.dumps(_described(asked))) > settings.MOST_DESCRIPTION:
        raise refuse("model_config", f"it is larger than {settings.MOST_DESCRIPTION} bytes.")


def _described(asked: NewBatch) -> Values:
    """What is kept of it for answers."""
    hardware = {name: getattr(asked, name) for name in _HARDWARE}
    return {
        "model_config": asked.model.given(),
        "data_parallelism": asked.data_parallelism or 1,
        **{name: value for name, value in hardware.items() if value is not None},
    }


def _configured(asked: NewBatch) -> Values:
    """What is said of the engines, without what the client always sends."""
    values = asked.model.given()
    model = values.pop("model")
    values.pop("labels", None)
    longest = values.pop("max_context_length", None)
    if longest is not None:
        values.setdefault("max_model_len", longest)
    always = {"num_shards": 1, "trust_remote_code": False, "served_model_name": model}
    values = {name: each for name, each in values.items() if each != always.get(name)}
    for name in _HARDWARE:
        if (given := getattr(asked, name)) is not None:
            values[name] = given
    return values


def _in_our_words(error: InvalidRequest) -> InvalidRequest:
    """A batch's model lies in model_config."""
    if error.param == "model_name":
        error.message = error.message.replace("'model_name'", "'model'")
        error.param = "model"
    return within("model_config", error) if error.param in BatchModel.model_fields else error
