"""Model.create, get, list, update and delete: v1/llm/model-endpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from llm_engine.api.cold import having, principal, read_json
from llm_engine.api.llm_engine_api import settings
from llm_engine.api.llm_engine_api.rows import endpoint_row
from llm_engine.api.operations import Operations
from llm_engine.errors import Conflict, Forbidden, InvalidRequest, NotFound
from llm_engine.records import EndpointRecord, Principal, Scope
from llm_engine.services import Services

Anyone = Annotated[Principal, Depends(principal)]
EndpointAdmin = Annotated[Principal, Depends(having(Scope.ENDPOINTS))]

PATH = "/v1/llm/model-endpoints"
BUSY = "Existing operation on endpoint in progress, try again later."
EXISTS = "The specified model endpoint already exists."
NOT_THERE_TO_UPDATE = "The specified LLM endpoint could not be found."
NOT_THERE_TO_DELETE = "The requested model endpoint could not be found."
_SHOWN = 100  # characters of a name that an error message repeats


def build_router(services: Services) -> APIRouter:
    """Success is always 200: the client takes nothing else for one."""
    router = APIRouter()
    operations = Operations(services)

    def row(record: EndpointRecord) -> dict[str, Any]:
        return endpoint_row(record, operations.status(record.name))

    @router.post(PATH)
    async def create(request: Request, who: EndpointAdmin) -> dict[str, Any]:
        wanted, extras = settings.new(await read_json(request))
        try:
            record = await operations.create(who, wanted, extras)
        except Conflict as error:
            message = EXISTS if error.code == "name_taken" else error.message
            raise InvalidRequest(message, param=error.param, code=error.code) from None
        return {"endpoint_creation_task_id": record.id}

    @router.get(PATH)
    async def list_endpoints(
        who: Anyone, name: str | None = None, order_by: str | None = None
    ) -> dict[str, Any]:
        found = await operations.endpoints(who)
        if name is not None:
            found = [record for record in found if record.name == name]
        return {"model_endpoints": [row(record) for record in _ordered(found, order_by)]}

    @router.get(PATH + "/{name:path}")
    async def get(name: str, who: Anyone) -> dict[str, Any]:
        with _words(f"Model Endpoint {name[:_SHOWN]}  was not found."):  # upstream's two spaces
            return row(await operations.endpoint(who, name))

    @router.put(PATH + "/{name:path}")
    async def update(name: str, request: Request, who: EndpointAdmin) -> dict[str, Any]:
        data = await read_json(request)
        with _words(NOT_THERE_TO_UPDATE, hide=True):
            record = await operations.change(who, name, lambda old: settings.changed(data, old))
        return {"endpoint_creation_task_id": record.id}

    @router.delete(PATH + "/{name:path}")
    async def delete(name: str, who: EndpointAdmin) -> dict[str, Any]:
        with _words(NOT_THERE_TO_DELETE):
            await operations.delete(who, name)
        return {"deleted": True}

    return router


@contextmanager
def _words(missing: str, *, hide: bool = False) -> Iterator[None]:
    """This API's own words. `hide`: another owner's endpoint is as good as none."""
    try:
        yield
    except NotFound:
        raise NotFound(missing) from None
    except Forbidden:
        if hide:
            raise NotFound(missing) from None
        raise
    except Conflict as error:
        if error.code == "operation_in_progress":
            error.message = BUSY
        raise


def _ordered(found: list[EndpointRecord], order_by: str | None) -> list[EndpointRecord]:
    if order_by in (None, "oldest"):
        return found
    if order_by == "newest":
        return found[::-1]
    if order_by == "alphabetical":
        return sorted(found, key=lambda record: record.name)
    raise InvalidRequest(
        "Invalid 'order_by': expected newest, oldest or alphabetical.", param="order_by"
    )
