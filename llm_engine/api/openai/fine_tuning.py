"""/v1/fine_tuning/jobs: OpenAI's, and on top of it what a job waits for and how fast it goes."""

import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, Literal, Required

import orjson
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response
from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter
from typing_extensions import TypedDict

from llm_engine.api.cold import having, read_json
from llm_engine.api.fine_tunes import PARENT, FineTunes, NewFineTune
from llm_engine.api.once import once
from llm_engine.api.openai import problems
from llm_engine.api.openai.batches import final
from llm_engine.api.openai.files import list_row
from llm_engine.errors import Conflict, InvalidRequest
from llm_engine.fine_tunes.names import openai_name
from llm_engine.records import AdapterRecord, FineTuneEvent, FineTuneRecord, Principal, Scope
from llm_engine.services import Services
from llm_engine.statuses import FineTuneState
from llm_engine.store.fine_tunes import ROUTE

Keeper = Annotated[Principal, Depends(having(Scope.FILES))]
Values = dict[str, Any]

DIALECT = "openai"
PATH = "/v1/fine_tuning/jobs"
MOST_LISTED, MOST_EVENTS = 100, 1000
EVENT, CHECKPOINT, ADAPTER = "ftevent-", "ftckpt_", "adapter-"
#: What a job's object tells of its numbers, in every method; a method of its own adds to them.
_SHOWN = ("n_epochs", "batch_size", "learning_rate_multiplier")
_ALSO = {"supervised": (), "dpo": ("beta",)}
_METRICS = (
    "train_loss",
    "train_mean_token_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
)
_LABEL = re.compile(r"metadata\[(.*)\]", re.DOTALL)

_LINE = r"^[^\x00-\x1f\x7f]*$"
_TEXT = r"^[^\x00]*$"  # PostgreSQL knows no such character
_Id = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=_LINE)]
_Model = Annotated[str, StringConstraints(min_length=1, max_length=440, pattern=_LINE)]
_Label = Annotated[str, StringConstraints(max_length=64, pattern=_TEXT)]
_Text = Annotated[str, StringConstraints(max_length=512, pattern=_TEXT)]


class MethodBody(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # type: ignore[misc]
    hyperparameters: dict[str, Any] | None


class Method(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # type: ignore[misc]
    type: Required[Literal["supervised", "dpo"]]
    supervised: MethodBody | None
    dpo: MethodBody | None


class FineTuneBody(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # type: ignore[misc]
    model: Required[_Model]
    training_file: Required[_Id]
    validation_file: _Id | None
    suffix: Annotated[str, StringConstraints(max_length=64, pattern=_LINE)] | None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None
    metadata: Annotated[dict[_Label, _Text], Field(max_length=16)] | None
    integrations: list[Any] | None
    method: Method | None
    hyperparameters: dict[str, Any] | None  # deprecated: method has them


_SHAPE = TypeAdapter(FineTuneBody)


def build_router(services: Services) -> APIRouter:
    router = APIRouter()
    fine_tunes = FineTunes(services)

    @router.post(PATH)
    async def create(request: Request, who: Keeper) -> Response:
        asked = parse(await read_json(request))
        first = once(request, who, ROUTE, orjson.dumps(asked, option=orjson.OPT_SORT_KEYS))
        method, numbers, where = method_of(asked)
        suffix = asked.get("suffix") or None

        def name(base: str, owner: str, job: str, at: float) -> str:
            return openai_name(base, owner, suffix, job)

        new = NewFineTune(
            dialect=DIALECT,
            model=asked["model"],
            training_file=asked["training_file"],
            validation_file=asked.get("validation_file"),
            method=method,
            hyperparameters=numbers,
            where=where,
            name=name,
            suffix=suffix,
            seed=asked.get("seed"),
            metadata=asked.get("metadata"),
        )
        try:
            return _answer(await fine_tunes.create(who, new, first))
        except Conflict as error:
            return final(error)

    @router.get(PATH)
    async def list_jobs(
        request: Request,
        who: Keeper,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 20,
    ) -> Values:
        labels = labels_of(request.query_params.multi_items())
        found, more = await fine_tunes.page(
            who, after, limit, labels, without_metadata=labels is None
        )
        return {"object": "list", "data": [job_row(each) for each in found], "has_more": more}

    @router.get(PATH + "/{job}")
    async def get(job: str, who: Keeper) -> Values:
        return job_row(await fine_tunes.get(who, job))

    def add(word: str, change: Callable[[Principal, str], Awaitable[FineTuneRecord]]) -> None:
        @router.post(f"{PATH}/{{job}}/{word}")
        async def asked(job: str, who: Keeper) -> Values:
            try:
                return job_row(await change(who, job))
            except Conflict as error:
                raise InvalidRequest(error.message, code=error.code) from None

    add("cancel", fine_tunes.cancel)
    add("pause", fine_tunes.pause)
    add("resume", fine_tunes.resume)

    @router.get(PATH + "/{job}/events")
    async def list_events(
        job: str,
        who: Keeper,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=MOST_EVENTS)] = 20,
    ) -> Response:
        before = None if after is None else _number(after)
        found, more = await fine_tunes.events(who, job, before, limit)
        page = {"object": "list", "data": [event_row(each) for each in found], "has_more": more}
        return Response(orjson.dumps(page), media_type="application/json")

    @router.get(PATH + "/{job}/checkpoints")
    async def list_checkpoints(
        job: str,
        who: Keeper,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 10,
    ) -> Values:
        rows = [checkpoint_row(each) for each in await fine_tunes.checkpoints(who, job)]
        if after is not None:
            ids = [row["id"] for row in rows]
            if after not in ids:
                raise _unknown_cursor(after)
            rows = rows[ids.index(after) + 1 :]
        return list_row(rows[:limit], len(rows) > limit)

    return router


def parse(data: Values) -> Values:
    """The body of a new job, checked: FineTuneBody. Raises InvalidRequest."""
    method = data.get("method")
    if isinstance(method, dict) and method.get("type") == "reinforcement":
        raise problems.invalid(
            "Unsupported value: 'method.type' does not support 'reinforcement' here: there are no "
            "graders. Supported values are: 'supervised' and 'dpo'.",
            "method.type",
            "unsupported_value",
        )
    if data.get("integrations"):
        raise problems.invalid(
            "Unsupported parameter: 'integrations' is not supported here. Nothing is sent to "
            "Weights & Biases; the job's events and its result file have every number.",
            "integrations",
            "unsupported_parameter",
        )
    return problems.parse(_SHAPE, data)


def method_of(asked: Values) -> tuple[str, Values, str]:
    """Its type, its hyperparameters, and where these stand. Raises InvalidRequest."""
    method = asked.get("method") or {"type": "supervised"}
    kind, old = method["type"], asked.get("hyperparameters")
    for other in _ALSO.keys() - {kind}:
        if method.get(other) is not None:
            raise problems.invalid(
                f"Invalid 'method.{other}': the method's type is '{kind}'.",
                f"method.{other}",
                "invalid_value",
            )
    numbers = (method.get(kind) or {}).get("hyperparameters")
    if numbers and old:
        raise problems.invalid(
            "'hyperparameters' is deprecated, and 'method' has them, too. Set only one of them.",
            "hyperparameters",
            "invalid_value",
        )
    if old:
        return kind, old, "hyperparameters"
    return kind, numbers or {}, f"method.{kind}.hyperparameters"


def labels_of(query: list[tuple[str, str]]) -> dict[str, str] | None:
    """metadata[k]=v as pairs; None for metadata=null. Raises InvalidRequest."""
    labels: dict[str, str] = {}
    null = False
    for name, value in query:
        found = _LABEL.fullmatch(name)
        if found is not None and "\0" not in found[1] + value:
            labels[found[1]] = value
        elif name == "metadata" and value == "null":
            null = True
        elif name.startswith("metadata"):
            raise problems.invalid(
                f"Invalid {problems.show(name)}: expected metadata[KEY]=VALUE, or metadata=null.",
                "metadata",
                "invalid_value",
            )
    if null and labels:
        raise problems.invalid(
            "Invalid 'metadata': what has no metadata has none of these pairs.",
            "metadata",
            "invalid_value",
        )
    return None if null else labels


def job_row(record: FineTuneRecord) -> Values:
    """OpenAI's job object; `status_reason` and `progress` are ours."""
    numbers = {name: _resolved(record, name) for name in _SHOWN}
    also = [name for name in record.hyperparameters if name not in numbers]
    own = {name: _resolved(record, name) for name in (*_ALSO.get(record.method, ()), *also)}
    done = record.state is FineTuneState.SUCCEEDED
    return {
        "id": record.id,
        "object": "fine_tuning.job",
        "created_at": int(record.created_at),
        "error": _error(record.error),
        "fine_tuned_model": record.name if done else None,
        "finished_at": int(record.times[record.state]) if record.state.is_final else None,
        "hyperparameters": numbers,
        "model": record.extras.get(PARENT, record.base),
        "organization_id": record.owner,
        "result_files": [record.result_file_id] if record.result_file_id else [],
        "seed": record.seed,
        "status": record.state,
        "trained_tokens": record.trained_tokens,
        "training_file": record.training_file_id,
        "validation_file": record.validation_file_id,
        "estimated_finish": _estimate(record),
        "integrations": [],
        "metadata": record.metadata,
        "method": {"type": record.method, record.method: {"hyperparameters": numbers | own}},
        "user_provided_suffix": record.suffix,
        "usage_metrics": None,
        "shared_with_openai": False,
        "status_reason": record.reason,
        "progress": _progress(record),
    }


def event_row(event: FineTuneEvent) -> Values:
    return {
        "object": "fine_tuning.job.event",
        "id": f"{EVENT}{event.id}",
        "created_at": int(event.at),
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data,
    }


def checkpoint_row(adapter: AdapterRecord) -> Values:
    return {
        "id": CHECKPOINT + adapter.id.removeprefix(ADAPTER),
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(adapter.created_at),
        "fine_tuned_model_checkpoint": adapter.name,
        "fine_tuning_job_id": adapter.fine_tune,
        "step_number": adapter.step,
        "metrics": {"step": adapter.step} | {name: adapter.metrics.get(name) for name in _METRICS},
    }


def _resolved(record: FineTuneRecord, name: str) -> Any:
    """The number that is trained with; before that is known, what was asked for."""
    plan = record.plan or {}
    return plan[name] if name in plan else record.hyperparameters.get(name, "auto")


def _error(error: Mapping[str, Any] | None) -> Values | None:
    if error is None:
        return None
    return {name: error.get(name) for name in ("code", "message", "param")}


def _progress(record: FineTuneRecord) -> Values:
    """In steps; with rates and losses as far as they are known."""
    told = {} if record.state.is_final else record.progress
    step = max(record.step, int(told.get("step", 0)))
    return {**told, "step": step, "total_steps": record.total_steps or None}


def _estimate(record: FineTuneRecord) -> int | None:
    left_s = record.progress.get("left_s")
    if record.state is not FineTuneState.RUNNING or left_s is None:
        return None
    return int(time.time() + left_s)


def _number(event: str) -> int:
    """Of an event's id."""
    number = event.removeprefix(EVENT)
    if not (event.startswith(EVENT) and re.fullmatch(r"[0-9]{1,18}", number)):
        raise _unknown_cursor(event)
    return int(number)


def _unknown_cursor(after: str) -> InvalidRequest:
    return problems.invalid(
        f"Invalid value for 'after': there is no {problems.show(after)} here.",
        "after",
        "invalid_value",
    )


def _answer(record: FineTuneRecord) -> Response:
    return Response(orjson.dumps(job_row(record)), media_type="application/json")
