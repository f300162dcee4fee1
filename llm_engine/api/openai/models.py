"""/v1/models and /v1/endpoints: what is served here, and how it is doing."""

from typing import Any

from fastapi import APIRouter

from llm_engine.errors import NotFound
from llm_engine.records import EndpointStatus
from llm_engine.services import Services


def build_router(services: Services) -> APIRouter:
    router = APIRouter()
    balancer = services.balancer

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        rows = [model_row(endpoint) for endpoint in balancer.table.endpoints.values()]
        return {"object": "list", "data": rows}

    @router.get("/v1/models/{model:path}")
    async def get_model(model: str) -> dict[str, Any]:
        return model_row(balancer.endpoint(model))

    @router.get("/v1/endpoints")
    async def list_endpoints() -> dict[str, Any]:
        replicas = await services.describe_replicas()
        rows = [endpoint_row(e, replicas) for e in balancer.table.endpoints.values()]
        return {"object": "list", "data": rows}

    @router.get("/v1/endpoints/{name:path}")
    async def get_endpoint(name: str) -> dict[str, Any]:
        endpoint = balancer.table.endpoints.get(name)
        if endpoint is None:
            raise NotFound(f"There is no endpoint '{name}'.", code="endpoint_not_found")
        return endpoint_row(endpoint, await services.describe_replicas())

    return router


def model_row(endpoint: EndpointStatus) -> dict[str, Any]:
    """OpenAI's model object; `max_model_len` (null until known) and `status` are ours."""
    return {
        "id": endpoint.name,
        "object": "model",
        "created": endpoint.created,
        "owned_by": endpoint.owned_by,
        "max_model_len": endpoint.max_model_len or None,
        "status": endpoint.state,
    }


def endpoint_row(endpoint: EndpointStatus, replicas: list[dict[str, Any]]) -> dict[str, Any]:
    """The full status, as the command line shows it."""
    return {
        "id": endpoint.name,
        "object": "endpoint",
        "model": endpoint.model,
        "task": endpoint.task,
        "status": endpoint.state,
        "status_reason": endpoint.reason,
        "created_at": endpoint.created,
        "max_model_len": endpoint.max_model_len or None,
        "max_queue": endpoint.max_queue,
        "replicas_wanted": endpoint.replicas_wanted,
        "replicas_ready": endpoint.replicas_ready,
        "replicas": [r for r in replicas if r["endpoint"] == endpoint.name],
    }
