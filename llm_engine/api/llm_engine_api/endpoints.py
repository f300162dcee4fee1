"""Model.create, get, list, update and delete: v1/llm/model-endpoints.

A fine-tuned model is one of them, as if an endpoint of its own had come of it: it is read here, and
it can be deleted.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from llm_engine.api.cold import having, principal, read_json
from llm_engine.api.http import require
from llm_engine.api.llm_engine_api import settings
from llm_engine.api.llm_engine_api.rows import adapter_row, endpoint_row
from llm_engine.api.openai.models import delete_adapter, find_adapter
from llm_engine.api.operations import Operations
from llm_engine.errors import APIError, Conflict, Forbidden, InvalidRequest, NotFound
from llm_engine.records import AdapterRecord, EndpointRecord, Principal, Scope
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

    def tuned_row(who: Principal, adapter: AdapterRecord, base: EndpointRecord) -> dict[str, Any]:
        problem = None
        try:
            services.catalog.resolve(who, adapter.name)
        except APIError as error:
            problem = error.message
        return adapter_row(adapter, row(base), problem)

    async def fine_tuned(who: Principal, name: str) -> AdapterRecord | None:
        """None where an endpoint has that name, or nothing."""
        with suppress(NotFound):
            if operations.status(name) is None:
                return await find_adapter(services, who, name)
        return None

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
        bases = {record.name: record for record in found}
        rows = [row(record) for record in found] + [
            tuned_row(who, adapter, bases[adapter.base])
            for adapter in services.catalog.adapters(who)
            if adapter.step is None and adapter.base in bases  # checkpoints go unlisted
        ]
        wanted = [each for each in rows if name in (None, each["name"])]
        return {"model_endpoints": _ordered(wanted, order_by)}

    @router.get(PATH + "/{name:path}")
    async def get(name: str, who: Anyone) -> dict[str, Any]:
        with _words(f"Model Endpoint {name[:_SHOWN]}  was not found."):  # upstream's two spaces
            adapter = await fine_tuned(who, name)
            if adapter is not None:
                return tuned_row(who, adapter, await operations.endpoint(who, adapter.base))
            return row(await operations.endpoint(who, name))

    @router.put(PATH + "/{name:path}")
    async def update(name: str, request: Request, who: EndpointAdmin) -> dict[str, Any]:
        data = await read_json(request)
        with _words(NOT_THERE_TO_UPDATE, hide=True):
            record = await operations.change(who, name, lambda old: settings.changed(data, old))
        return {"endpoint_creation_task_id": record.id}

    @router.delete(PATH + "/{name:path}")
    async def delete(name: str, who: Anyone) -> dict[str, Any]:
        with _words(NOT_THERE_TO_DELETE):
            adapter = await fine_tuned(who, name)
            if adapter is not None:
                require(who, Scope.FILES)
                await delete_adapter(services, adapter)
            else:
                if who.may(Scope.FILES):  # it might have been theirs to delete: 404 before 403
                    await operations.endpoint(who, name)
                require(who, Scope.ENDPOINTS)
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


def _ordered(rows: list[dict[str, Any]], order_by: str | None) -> list[dict[str, Any]]:
    if order_by in (None, "oldest", "newest"):
        by_age = sorted(rows, key=lambda row: row["spec"]["created_at"])
        return by_age[::-1] if order_by == "newest" else by_age
    if order_by == "alphabetical":
        return sorted(rows, key=lambda row: row["name"])
    raise InvalidRequest(
        "Invalid 'order_by': expected newest, oldest or alphabetical.", param="order_by"
    )
