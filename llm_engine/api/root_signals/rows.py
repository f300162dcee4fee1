"""Models as the Root Signals client reads them. It checks what it reads, and one row that it
does not like makes it refuse the whole list."""

from dataclasses import dataclass
from typing import Any

from llm_engine.catalog import Catalog
from llm_engine.errors import APIError
from llm_engine.records import EndpointStatus, ModelRecord, Principal

LEAST_OUTPUT = 800  # the client takes no lower max_output_token_count
_GENERATES = frozenset({"chat", "completion"})
_EMBEDS = frozenset({"embedding"})
#: Nothing is known of an external model before it is called; it is registered in order to chat.
_EXTERNAL = frozenset({"chat"})


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the list, and what it is found and ordered by."""

    id: str
    name: str
    created: float
    can: frozenset[str]  # capabilities
    shown: dict[str, Any]


def of_registered(catalog: Catalog, who: Principal, model: ModelRecord) -> Row:
    can = _EXTERNAL if model.url is not None else _alias_can(catalog, model)
    return Row(model.id, model.name, model.created_at, can, registered_row(who, model))


def of_endpoint(endpoint: EndpointStatus) -> Row:
    can = _can(endpoint)
    return Row(endpoint.name, endpoint.name, endpoint.created, can, endpoint_row(endpoint))


def registered_row(who: Principal, model: ModelRecord) -> dict[str, Any]:
    """Without the key, always; others do not see where a public model lies."""
    output = model.max_output_token_count
    return _row(
        model.id,
        model.name,
        model.owner,
        model.public,
        model=model.model or model.name,
        url=model.url if who.sees(model.owner) else None,
        max_token_count=model.max_token_count,
        max_output_token_count=output if output and output >= LEAST_OUTPUT else None,
        is_local=False,
        fallback=model.fallback,
    )


def endpoint_row(endpoint: EndpointStatus) -> dict[str, Any]:
    return _row(
        endpoint.name,
        endpoint.name,
        endpoint.owned_by,
        endpoint.public,
        model=endpoint.model,
        url=None,
        max_token_count=endpoint.max_model_len or None,
        max_output_token_count=None,
        is_local=True,
        fallback=endpoint.fallback,
    )


def _row(id: str, name: str, owner: str, public: bool, **rest: Any) -> dict[str, Any]:
    return {
        "id": id,
        "name": name,
        # Owners are names here; one that is an address is told as such.
        "owner": {"email": owner if "@" in owner else "", "full_name": owner},
        "provider": None,
        "visibility": "PUBLIC" if public else "PRIVATE",
        **rest,
    }


def _alias_can(catalog: Catalog, model: ModelRecord) -> frozenset[str]:
    """What it leads to can; nothing, where it leads nowhere."""
    try:
        route = catalog.resolve(Principal(model.owner, frozenset()), model.name)
    except APIError:
        return frozenset()
    return _can(route.endpoint) if route.endpoint is not None else _EXTERNAL


def _can(endpoint: EndpointStatus) -> frozenset[str]:
    return _EMBEDS if endpoint.task == "embed" else _GENERATES
