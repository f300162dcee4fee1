"""FineTune.create, get, list, cancel and get_events, and Model.download."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response

from llm_engine import files
from llm_engine.api.blocking import finish
from llm_engine.api.cold import check, having, read_json
from llm_engine.api.downloads import adapter_links
from llm_engine.api.fine_tunes import NO_FILE, FineTunes, NewFineTune
from llm_engine.api.llm_engine_api.fields import FineTuneBody, ModelDownload
from llm_engine.api.llm_engine_api.hyperparameters import SPLIT, SPLIT_SHARE, Hyperparameters
from llm_engine.api.llm_engine_api.vllm_options import refuse
from llm_engine.errors import APIError, Conflict, InvalidRequest, NotFound, StoreUnavailable
from llm_engine.fine_tunes.data import check_header
from llm_engine.fine_tunes.names import scale_name
from llm_engine.records import FineTuneRecord, Principal, Scope
from llm_engine.services import Services
from llm_engine.statuses import FineTuneState
from llm_engine.storage.base import NoSuchObject, Storage
from llm_engine.storage.opening import open_path

Keeper = Annotated[Principal, Depends(having(Scope.FILES))]
Values = dict[str, Any]

DIALECT = "llm_engine"
PATH = "/v1/llm/fine-tunes"
DOWNLOAD = "/v1/llm/model-endpoints/download"
MISSING = "The specified fine-tune job could not be found."
NO_EVENTS = "The specified fine-tune job's events could not be found."
NO_MODEL = "The requested fine-tuned model could not be found."
#: The client knows no pages.
MOST_LISTED = 1000
MOST_EVENTS = 20_000
#: Bytes of a file that are looked at for its header.
LOOK = 2**20
#: Of what was brought from a path: nobody knows its id, so nobody will delete it.
BROUGHT_EXPIRES_S = 30 * 86400
_WHAT = {"training_file": "training", "validation_file": "validation"}


def build_router(services: Services) -> APIRouter:
    """Success is always 200: the client takes nothing else for one."""
    router = APIRouter()
    fine_tunes = FineTunes(services)
    creation = _Creation(services, fine_tunes)

    @router.post(PATH)
    async def create(request: Request, who: Keeper) -> Values:
        return {"id": (await creation.create(who, await read_json(request))).id}

    @router.get(PATH)
    async def list_jobs(
        who: Keeper,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = MOST_LISTED,
    ) -> Response:
        found, has_more = await fine_tunes.page(who, after, limit)
        return _json({"jobs": [job_row(record) for record in found], "has_more": has_more})

    @router.get(PATH + "/{job}")
    async def get(job: str, who: Keeper) -> Values:
        with _words(MISSING):
            return job_row(await fine_tunes.get(who, job))

    @router.put(PATH + "/{job}/cancel")
    async def cancel(job: str, who: Keeper) -> Values:
        with _words(MISSING):
            try:
                await fine_tunes.cancel(who, job)
            except Conflict:  # it has ended
                return {"success": False}
        return {"success": True}

    @router.get(PATH + "/{job}/events")
    async def events(job: str, who: Keeper) -> Response:
        with _words(NO_EVENTS):
            found, _ = await fine_tunes.events(who, job, None, MOST_EVENTS)
        rows = [
            {"timestamp": event.at, "message": event.message, "level": event.level}
            for event in reversed(found)
        ]
        return _json({"events": rows})

    @router.post(DOWNLOAD)
    async def download(request: Request, who: Keeper) -> Values:
        asked = check(ModelDownload, await read_json(request))
        if asked.download_format not in (None, "hugging_face"):
            raise refuse("download_format", "only 'hugging_face' is there.")
        with _words(NO_MODEL):
            return {"urls": await adapter_links(services, request, who, asked.model_name)}

    return router


class _Creation:
    def __init__(self, services: Services, fine_tunes: FineTunes) -> None:
        self._services = services
        self._fine_tunes = fine_tunes
        self._limits = services.settings.fine_tunes

    async def create(self, who: Principal, data: Values) -> FineTuneRecord:
        """Raises APIError; then nothing was made, unless it is StoreUnavailable."""
        asked = check(FineTuneBody, data)
        if asked.wandb_config is not None:
            raise refuse(
                "wandb_config",
                "nothing is sent to Weights & Biases; the events of the fine-tune and its result "
                "file have every number.",
            )
        numbers = Hyperparameters(asked.hyperparameters or {})
        suffix, brought = asked.suffix, list[str]()

        def name(base: str, owner: str, job: str, at: float) -> str:
            return scale_name(base, suffix, at)

        try:
            training = await self._file(who, asked.training_file, "training_file", brought)
            validation = asked.validation_file
            if validation is not None:
                validation = await self._file(who, validation, "validation_file", brought)
            new = NewFineTune(
                dialect=DIALECT,
                model=asked.model,
                training_file=training,
                validation_file=validation,
                method="supervised",
                hyperparameters=({} if validation else {SPLIT: SPLIT_SHARE}) | numbers.asked,
                name=name,
                suffix=suffix,
            )
            return await self._fine_tunes.create(who, new)
        except (StoreUnavailable, asyncio.CancelledError):
            raise  # it may be there, and then needs its files; they expire by themselves
        except BaseException as error:
            for file in brought:  # nobody would ever learn of it
                await finish(files.discard, self._services.storage, self._services.store, file)
            if isinstance(error, InvalidRequest):
                raise _in_words(error, asked, numbers) from None
            raise

    async def _file(self, who: Principal, named: str, param: str, brought: list[str]) -> str:
        """The id of a file whose header is right; what lies under a path becomes one."""
        if named.startswith("file-"):
            record = await self._fine_tunes.file(who, named, param)
            storage, key, filename = self._services.storage, record.key, record.filename
        elif named.startswith(("http://", "https://")):
            raise refuse(
                param,
                "web addresses are not fetched here. Upload the file (File.upload), and name it "
                "by its id.",
            )
        else:
            storage, key = open_path(self._services.settings, named, owner=who.owner, param=param)
            filename = key.rpartition("/")[2]
        try:
            await finish(_check_header, storage, key, filename, _WHAT[param])
            if named.startswith("file-"):
                return named
            file = await finish(self._bring, storage, key, filename, who.owner, param)
        except NoSuchObject:
            raise InvalidRequest(
                f"Cannot find the {_WHAT[param]} file. There is nothing at '{named}'.",
                param=param,
                code=NO_FILE,
            ) from None
        brought.append(file)
        return file

    def _bring(self, source: Storage, key: str, filename: str, owner: str, param: str) -> str:
        return files.keep(
            self._services.storage,
            self._services.store,
            owner=owner,
            purpose="fine-tune",
            filename=filename,
            pieces=_at_most(source.read(key), self._limits.max_file_bytes, param),
            expires_after_s=BROUGHT_EXPIRES_S,
        ).id


def job_row(record: FineTuneRecord) -> Values:
    """GetFineTuneResponse, for every fine-tune, whichever dialect made it; from `status_reason` on
    it is ours, and the client leaves it aside."""
    return {
        "id": record.id,
        "fine_tuned_model": record.name,
        "status": status(record),
        "status_reason": (record.error or {}).get("message") or record.reason,
        "error": record.error,
        "model": record.base,
        "training_file": record.training_file_id,
        "validation_file": record.validation_file_id,
        "result_file": record.result_file_id,
        "created_at": record.created_at,
        "step": record.step,
        "total_steps": record.total_steps or None,
    }


def status(record: FineTuneRecord) -> str:
    if record.state is FineTuneState.VALIDATING and record.starts:
        return "RUNNING"
    return _STATUS.get(record.state, "PENDING")


_STATUS = {
    FineTuneState.RUNNING: "RUNNING",
    FineTuneState.SUCCEEDED: "SUCCESS",
    FineTuneState.FAILED: "FAILURE",
    FineTuneState.CANCELLED: "CANCELLED",
}


def _check_header(storage: Storage, key: str, filename: str, what: str) -> None:
    check_header(b"".join(storage.read(key, 0, LOOK)), filename, what)


def _at_most(pieces: Iterator[bytes], most: int, param: str) -> Iterator[bytes]:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > most:
            raise refuse(param, f"it has more than {most} bytes (fine_tunes.max_file_bytes).")
        yield piece


def _in_words(error: InvalidRequest, asked: FineTuneBody, numbers: Hyperparameters) -> APIError:
    """This API's own words."""
    what = _WHAT.get(error.param or "", "")
    if error.code == NO_FILE and what:
        return NotFound(f"{what.capitalize()} file does not exist. {error.message}")
    if error.code == "model_not_supported":
        error.message = f"Fine-tuning not implemented for model type {asked.model}. {error.message}"
    return numbers.in_their_words(error)


@contextmanager
def _words(missing: str) -> Iterator[None]:
    """This API's own words."""
    try:
        yield
    except NotFound:
        raise NotFound(missing) from None


def _json(content: Values) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
