"""/v1/models: OpenAI's rows, and what sference's clients look for besides."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from llm_engine.api import cold
from llm_engine.api.openai.models import adapter_row, endpoint_row, registered_row
from llm_engine.catalog import Catalog, missing
from llm_engine.errors import APIError
from llm_engine.records import ModelRecord, Principal
from llm_engine.services import Services

Anyone = Annotated[Principal, Depends(cold.principal)]
Row = dict[str, Any]

_MODALITY = {"generate": "text_generation", "embed": "text_embedding"}


def build_router(services: Services) -> APIRouter:
    router = APIRouter()
    catalog = services.catalog

    @router.get("/v1/models")
    async def list_models(who: Anyone) -> Row:
        return {"object": "list", "data": list(_rows(catalog, who).values())}

    @router.get("/v1/models/{name:path}")
    async def get_model(name: str, who: Anyone) -> Row:
        found = _rows(catalog, who).get(name)
        if found is None:
            raise missing(name)
        return found

    return router


def _rows(catalog: Catalog, who: Principal) -> dict[str, Row]:
    """By name; a registered model hides the endpoint that it is called after."""
    rows = {each.name: _row(endpoint_row(each), each.task) for each in catalog.endpoints(who)}
    for adapter in catalog.adapters(who):
        rows[adapter.name] = _row(adapter_row(catalog, who, adapter), "generate")
    for model in catalog.models(who):
        row = registered_row(catalog, who, model)
        rows[model.name] = _row(row, _task(catalog, who, model))
    return rows


def _row(row: Row, task: str) -> Row:
    """Whether a model sees images, thinks or calls tools is its engine's secret: such a capability
    is left out, and the client shows it as unknown."""
    return row | {
        "display_name": row["id"],
        "provider": row["owned_by"],
        "modality": _MODALITY[task],
        "context_tokens": row["max_model_len"],
        "capabilities": {"pdf_input": {"supported": False}},
    }


def _task(catalog: Catalog, who: Principal, model: ModelRecord) -> str:
    """What it leads to does. An external model is registered in order to chat."""
    try:
        endpoint = catalog.resolve(who, model.name).endpoint
    except APIError:
        return "generate"  # it leads nowhere
    return endpoint.task if endpoint is not None else "generate"
