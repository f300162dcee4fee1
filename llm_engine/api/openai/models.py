"""/v1/models: what the caller can name in `model`, and whether it can answer."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from llm_engine.api.cold import principal
from llm_engine.catalog import Catalog, missing
from llm_engine.errors import APIError
from llm_engine.records import EndpointStatus, ModelRecord, Principal
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
        raise missing(name)

    return router


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
