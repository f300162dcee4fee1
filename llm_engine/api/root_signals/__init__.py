"""The Root Signals dialect: the registry of aliases and external models, for `root-signals`.

A row is what every version of that client can parse: the fields of its list and of its single
model together, and two of ours. `is_local` tells the endpoints that are served here, which are
listed, too: they can be named in `model` just as well. `fallback` names the model that answers
when this one can't, before the first byte; it is written by POST, PUT and PATCH, and is ours alone.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response

from llm_engine.api import cold
from llm_engine.api.operations import Operations
from llm_engine.api.root_signals import rows
from llm_engine.api.root_signals.pages import DEFAULT_SIZE, LARGEST, page
from llm_engine.api.root_signals.shapes import (
    LONGEST_NAME,
    Change,
    NewModel,
    Replacement,
    Verification,
)
from llm_engine.api.root_signals.verify import Verifier
from llm_engine.errors import APIError, Conflict, Forbidden, InvalidRequest, NotFound
from llm_engine.records import EndpointStatus, ModelRecord, Principal, Scope
from llm_engine.services import Services
from llm_engine.store.registered import no_model

Anyone = Annotated[Principal, Depends(cold.principal)]
Registrar = Annotated[Principal, Depends(cold.having(Scope.MODELS))]
Values = dict[str, Any]
_REGISTERED_ID = re.compile(r"mdl_[0-9a-f]{1,36}")


def render_error(error: APIError) -> bytes:
    return orjson.dumps({"detail": error.message})


def build_router(services: Services) -> APIRouter:
    """Every path answers with and without its last slash: a redirect would drop the key."""
    router = APIRouter()
    registry = _Registry(services)
    verifier = Verifier(services)

    @router.post("/v1/models", status_code=201)
    @router.post("/v1/models/", status_code=201)
    async def create_model(request: Request, who: Registrar) -> Values:
        asked = cold.check(NewModel, await cold.read_json(request))
        return rows.registered_row(who, await registry.create(who, asked))

    @router.get("/v1/models")
    @router.get("/v1/models/")
    async def list_models(
        who: Anyone,
        capable_of: Annotated[list[str] | None, Query()] = None,
        cursor: str | None = None,
        ordering: str = "created_at",
        page_size: Annotated[int, Query(ge=1)] = DEFAULT_SIZE,
    ) -> Values:
        wanted = {word.strip() for csv in capable_of or () for word in csv.split(",")} - {""}
        found = [row for row in await registry.rows(who) if wanted <= row.can]
        return page(found, ordering, cursor, min(page_size, LARGEST))

    @router.post("/v1/models/verify")
    @router.post("/v1/models/verify/")
    async def verify_model(request: Request, who: Registrar) -> Values:
        """Asks the model for a few tokens; what goes wrong there is `success: false`."""
        return await verifier.verify(who, cold.check(Verification, await cold.read_json(request)))

    @router.get("/v1/models/{model:path}")
    async def get_model(model: str, who: Anyone) -> Values:
        found = await registry.find(who, model)
        if isinstance(found, ModelRecord):
            return rows.registered_row(who, found)
        return rows.endpoint_row(found)

    @router.patch("/v1/models/{model:path}")
    async def change_model(model: str, request: Request, who: Registrar) -> Values:
        """What is absent stays as it is; null takes it away."""
        asked = cold.check(Change, await cold.read_json(request))
        return rows.registered_row(who, await registry.change(who, model, asked.values()))

    @router.put("/v1/models/{model:path}")
    async def replace_model(model: str, request: Request, who: Registrar) -> Values:
        """What is absent is taken away; not so `default_key` and `fallback`, which this client
        cannot have read before."""
        asked = cold.check(Replacement, await cold.read_json(request))
        return rows.registered_row(who, await registry.change(who, model, asked.values()))

    @router.delete("/v1/models/{model:path}", status_code=204)
    async def delete_model(model: str, who: Registrar) -> Response:
        await registry.delete(who, model)
        return Response(status_code=204)

    return router


class _Registry:
    """Registered models and the endpoints beside them, as this dialect's rules have it."""

    def __init__(self, services: Services) -> None:
        self._catalog = services.catalog
        self._operations = Operations(services)

    async def rows(self, who: Principal) -> list[rows.Row]:
        """All that they may see and the client can parse. The store tells what is registered, so
        that one's last change is in it; the live picture, which endpoints there are."""
        registered = await self._operations.registered(who)
        names = {model.name for model in registered if model.owner == who.owner}
        found = [rows.of_registered(self._catalog, who, model) for model in registered]
        for endpoint in self._catalog.endpoints(who):
            if endpoint.name not in names:
                found.append(rows.of_endpoint(endpoint))
        return [row for row in found if len(row.name) <= LONGEST_NAME]

    async def find(self, who: Principal, model: str) -> ModelRecord | EndpointStatus:
        """By id, which is an endpoint's name. Raises NotFound."""
        model = model.rstrip("/")
        if _REGISTERED_ID.fullmatch(model):
            with contextlib.suppress(NotFound):
                return await self._operations.model(who, model)
        for endpoint in self._catalog.endpoints(who):
            if endpoint.name == model and len(model) <= LONGEST_NAME:
                return endpoint
        raise no_model(model)

    async def create(self, who: Principal, asked: NewModel) -> ModelRecord:
        values = asked.values()
        _check_together(values)
        with _taken_is_400():
            return await self._operations.register(who, **values)

    async def change(self, who: Principal, model: str, values: Values) -> ModelRecord:
        record = await self._registered(who, model)
        known = {"name": record.name, "url": record.url, "fallback": record.fallback}
        _check_together(known | values)
        with _taken_is_400():
            return await self._operations.reregister(who, record.id, **values)

    async def delete(self, who: Principal, model: str) -> None:
        record = await self._registered(who, model)
        await self._operations.unregister(who, record.id)

    async def _registered(self, who: Principal, model: str) -> ModelRecord:
        found = await self.find(who, model)
        if isinstance(found, ModelRecord):
            return found
        raise Forbidden(
            f"'{found.name}' is an endpoint that is served here, not a registered model: it is "
            "changed and deleted at /v1/endpoints."
        )


def _check_together(values: Values) -> None:
    """What no single field tells. Raises InvalidRequest."""
    if values.get("key") is not None and values.get("url") is None:
        raise InvalidRequest(
            "'default_key' is sent to a model's 'url', and there is none.", param="default_key"
        )
    if values.get("fallback") is not None and values["fallback"] == values["name"]:
        raise InvalidRequest(f"'{values['name']}' cannot be its own fallback.", param="fallback")


@contextlib.contextmanager
def _taken_is_400() -> Iterator[None]:
    """This client has no exception of its own for 409."""
    try:
        yield
    except Conflict as error:
        if error.code != "name_taken":
            raise
        raise InvalidRequest(error.message, param=error.param, code=error.code) from None
