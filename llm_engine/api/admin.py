"""/v1/endpoints and /v1/keys: our own routes, for our command line and for operators."""

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field, field_validator

from llm_engine.api.auth import make_key
from llm_engine.api.cold import check, first_problem, having, principal, read_json
from llm_engine.api.operations import Operations
from llm_engine.config import MASK, EndpointSettings
from llm_engine.endpoints import shown_state
from llm_engine.records import EndpointRecord, EndpointStatus, KeyRecord, Phases, Principal, Scope
from llm_engine.services import Services

Anyone = Annotated[Principal, Depends(principal)]
EndpointAdmin = Annotated[Principal, Depends(having(Scope.ENDPOINTS))]
Admin = Annotated[Principal, Depends(having(Scope.ADMIN))]


def build_router(services: Services) -> APIRouter:
    router = APIRouter()
    _add_endpoints(router, services, Operations(services))
    _add_keys(router, services)
    return router


def _add_endpoints(router: APIRouter, services: Services, operations: Operations) -> None:
    async def row(
        who: Principal, record: EndpointRecord, with_replicas: bool = True
    ) -> dict[str, Any]:
        replicas = await services.describe_replicas() if with_replicas else []
        return endpoint_row(who, record, operations.status(record.name), replicas)

    @router.get("/v1/endpoints")
    async def list_endpoints(who: Anyone) -> dict[str, Any]:
        records = await operations.endpoints(who)
        replicas = await services.describe_replicas()
        rows = [endpoint_row(who, each, operations.status(each.name), replicas) for each in records]
        return {"object": "list", "data": rows}

    @router.post("/v1/endpoints", status_code=201)
    async def create_endpoint(request: Request, who: EndpointAdmin) -> dict[str, Any]:
        settings = _settings(await read_json(request))
        return await row(who, await operations.create(who, settings), with_replicas=False)

    @router.get("/v1/endpoints/{name:path}/events")
    async def list_events(
        name: str,
        who: Anyone,
        after: Annotated[int, Query(ge=0, le=2**63 - 1)] = 0,
        limit: Annotated[int, Query(ge=1, le=100)] = 100,
    ) -> dict[str, Any]:
        record = await operations.endpoint(who, name)
        events = await asyncio.to_thread(services.store.events, record.id, after, limit)
        rows = [
            {"object": "endpoint.event", "id": e.id, "created_at": e.at, "type": e.kind,
             "message": e.message}
            for e in events
        ]  # fmt: skip
        return {"object": "list", "data": rows}

    @router.get("/v1/endpoints/{name:path}")
    async def get_endpoint(name: str, who: Anyone) -> dict[str, Any]:
        return await row(who, await operations.endpoint(who, name))

    @router.patch("/v1/endpoints/{name:path}")
    async def update_endpoint(name: str, request: Request, who: EndpointAdmin) -> dict[str, Any]:
        changes = await read_json(request)

        def change(record: EndpointRecord) -> tuple[EndpointSettings, dict[str, Any]]:
            return _settings(_merged(record.spec, changes), fixed=record.spec), record.extras

        return await row(who, await operations.change(who, name, change))

    @router.delete("/v1/endpoints/{name:path}")
    async def delete_endpoint(name: str, who: EndpointAdmin) -> dict[str, Any]:
        return await row(who, await operations.delete(who, name))


class NewKey(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str = Field("", max_length=100, pattern=r"^[^\x00]*$")  # PostgreSQL knows no such text
    owner: str = Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._@:/-]*$")
    scopes: list[Scope] = Field([Scope.INFERENCE], min_length=1)
    expires_at: float | None = None  # unix seconds

    @field_validator("expires_at")
    @classmethod
    def _in_future(cls, at: float | None) -> float | None:
        if at is not None and at <= time.time():
            raise ValueError("it lies in the past (unix seconds are expected)")
        return at


def _add_keys(router: APIRouter, services: Services) -> None:
    keys = services.store.keys

    @router.get("/v1/keys")
    async def list_keys(who: Admin) -> dict[str, Any]:
        records = await asyncio.to_thread(keys.all)
        return {"object": "list", "data": [key_row(record) for record in records]}

    @router.post("/v1/keys", status_code=201)
    async def create_key(request: Request, who: Admin) -> dict[str, Any]:
        """The only answer that ever holds the key itself."""
        asked = check(NewKey, await read_json(request))
        record, key = make_key(asked.owner, asked.name, set(asked.scopes), asked.expires_at)
        await asyncio.to_thread(keys.add, record, services.settings.store.max_keys)
        await services.nudge()
        return {**key_row(record), "key": key}

    @router.delete("/v1/keys/{key}")
    async def revoke_key(key: str, who: Admin) -> dict[str, Any]:
        record = await asyncio.to_thread(keys.revoke, key)
        services.catalog.revoke(record)  # here at once, even while the controller is away
        await services.nudge()
        return key_row(record)


def key_row(record: KeyRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "object": "key",
        "name": record.name,
        "owner": record.owner,
        "prefix": record.prefix,
        "scopes": list(record.scopes),
        "created_at": int(record.created_at),
        "expires_at": record.expires_at,
        "revoked_at": record.revoked_at,
    }


def endpoint_row(
    who: Principal,
    record: EndpointRecord,
    status: EndpointStatus | None,
    replicas: list[dict[str, Any]],
) -> dict[str, Any]:
    """The full status object, as our command line shows it. How it is made and where it runs is
    for its owner; others, who may use it, see how it is doing."""
    spec = record.spec | {"env": dict.fromkeys(record.spec.get("env", {}), MASK)}
    live = status or EndpointStatus(record.name, spec["model"], spec["task"], record.state)
    state, reason = shown_state(record, status)
    # What the controller said of the version before says nothing of the one that was asked for.
    current = status is not None and state is status.state
    phases = live.phases if current else Phases()
    row = {
        "id": record.name,
        "object": "endpoint",
        "record": record.id,  # another one, where a name was deleted and made again
        "model": spec["model"],
        "task": spec["task"],
        "owned_by": record.owner,
        "origin": record.origin,
        "status": state,
        "status_reason": reason,
        "settled": record.settled,
        "last_error": live.last_error,
        "eta_s": None if live.eta_s is None or not current else round(live.eta_s, 1),
        "phases": {
            "queued_s": _rounded(phases.queued),
            "scheduling_s": _rounded(phases.scheduling),
            "loading_s": _rounded(phases.loading),
            "warming_s": _rounded(phases.warming),
            "total_s": _rounded(phases.total),
        },
        "created_at": int(record.created_at),
        "requested_at": record.requested_at,
        "updated_at": record.updated_at,
        "max_model_len": live.max_model_len or None,
        "max_queue": spec["max_queue"],
        "replicas_wanted": live.replicas_wanted,
        "replicas_ready": live.replicas_ready,
        "replicas": [r for r in replicas if r["endpoint"] == record.name],
        "spec": spec,
    }
    if not who.sees(record.owner):
        row |= {"spec": None, "replicas": []}
    return row


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _settings(raw: dict[str, Any], fixed: dict[str, Any] | None = None) -> EndpointSettings:
    """Raises InvalidRequest; `fixed`: the settings before, of which the name must stay."""
    settings = check(EndpointSettings, raw)
    if fixed is not None and settings.name != fixed["name"]:
        problem = {"loc": ("name",), "msg": "an endpoint cannot be renamed", "type": "value_error"}
        raise first_problem([problem])
    return settings


def _merged(spec: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """JSON merge patch (RFC 7396): null takes a key away, objects are merged."""
    merged = dict(spec)
    for key, value in changes.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merged(merged[key], value)
        else:
            merged[key] = value
    return merged
