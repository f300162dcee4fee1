"""/v1/models: what the caller can name in `model`, and whether it can answer. Adapters can be
deleted here, as fine-tuned models can at OpenAI."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends

from llm_engine.api.cold import principal
from llm_engine.api.http import require
from llm_engine.catalog import Catalog, missing
from llm_engine.errors import APIError, Forbidden
from llm_engine.records import AdapterRecord, EndpointStatus, ModelRecord, Principal, Scope
from llm_engine.services import Services

Anyone = Annotated[Principal, Depends(principal)]


def build_router(services: Services) -> APIRouter:
    router = APIRouter()
    catalog = services.catalog

    @router.get("/v1/models")
    async def list_models(who: Anyone) -> dict[str, Any]:
        registered = list(catalog.models(who))
        names = {model.name for model in registered}
        rows = [endpoint_row(each) for each in catalog.endpoints(who) if each.name not in names]
        rows += [adapter_row(catalog, who, each) for each in catalog.adapters(who)]
        rows += [registered_row(catalog, who, model) for model in registered]
        return {"object": "list", "data": rows}

    @router.get("/v1/models/{name:path}")
    async def get_model(name: str, who: Anyone) -> dict[str, Any]:
        for model in catalog.models(who):
            if model.name == name:
                return registered_row(catalog, who, model)
        for endpoint in catalog.endpoints(who):
            if endpoint.name == name:
                return endpoint_row(endpoint)
        return adapter_row(catalog, who, await find_adapter(services, who, name))

    @router.delete("/v1/models/{name:path}")
    async def delete_model(name: str, who: Anyone) -> dict[str, Any]:
        require(who, Scope.FILES)
        visible = {each.name for each in (*catalog.models(who), *catalog.endpoints(who))}
        if name in visible:
            raise Forbidden(
                f"The model '{name}' is no fine-tuned model; only those are deleted here.",
                param="model",
            )
        await delete_adapter(services, await find_adapter(services, who, name))
        return {"id": name, "object": "model", "deleted": True}

    return router


async def find_adapter(services: Services, who: Principal, name: str) -> AdapterRecord:
    """One that they see, also where it has become one a moment ago. Raises NotFound."""
    await services.look_up(name)
    found = services.catalog.adapter(who, name)
    if found is None:
        raise missing(name)
    return found


async def delete_adapter(services: Services, adapter: AdapterRecord) -> None:
    """Nobody can name it from here on; requests that run come to their end. Raises NotFound where
    somebody else was first, Conflict where an endpoint or a fine-tune needs it."""
    gone = await asyncio.to_thread(services.store.adapters.delete, adapter.id)
    services.catalog.forget(adapter)
    if not gone:
        raise missing(adapter.name)
    await services.nudge()


def endpoint_row(endpoint: EndpointStatus) -> dict[str, Any]:
    """OpenAI's model object; `max_model_len` (null until known) and `status` are ours."""
    return {
        "id": endpoint.name,
        "object": "model",
        "created": endpoint.created,
        "owned_by": endpoint.owned_by,
        "max_model_len": endpoint.max_model_len or None,
        "status": endpoint.state,
    }


def adapter_row(catalog: Catalog, who: Principal, adapter: AdapterRecord) -> dict[str, Any]:
    """As ready as its base. `parent` and `root`, as OpenAI and vLLM have them: the base's name."""
    status, length = "UPDATE_FAILED", None  # its base cannot serve it
    try:
        endpoint = catalog.resolve(who, adapter.name).endpoint
    except APIError:
        endpoint = None
    if endpoint is not None:
        status, length = endpoint.state, endpoint.max_model_len or None
    return {
        "id": adapter.name,
        "object": "model",
        "created": int(adapter.created_at),
        "owned_by": adapter.owner,
        "max_model_len": length,
        "status": status,
        "parent": adapter.base,
        "root": adapter.base,
    }


def registered_row(catalog: Catalog, who: Principal, model: ModelRecord) -> dict[str, Any]:
    """An alias is as ready as what it leads to; of an external model nobody knows before a call."""
    status, length = "READY", model.max_token_count
    if model.url is None:
        status = "UPDATE_FAILED"  # it leads nowhere
        try:
            endpoint = catalog.resolve(who, model.name).endpoint
        except APIError:
            endpoint = None
        else:
            status = "READY"
        if endpoint is not None:
            status = endpoint.state
            lengths = [n for n in (length, endpoint.max_model_len) if n]
            length = min(lengths, default=None)
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.created_at),
        "owned_by": model.owner,
        "max_model_len": length,
        "status": status,
    }
