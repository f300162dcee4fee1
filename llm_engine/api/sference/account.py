"""/v1/auth: who one is. There are no users here, only keys."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from llm_engine.api import cold
from llm_engine.api.auth import Keyring
from llm_engine.records import Principal, Scope
from llm_engine.services import Services

Anyone = Annotated[Principal, Depends(cold.principal)]

LOGIN = "/v1/auth/login"  # whoever comes has no key yet


class _Login(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    username: str = Field(max_length=256)
    password: str = Field(min_length=1, max_length=1024)


def build_router(services: Services, legacy: bool) -> APIRouter:
    router = APIRouter()
    keys = Keyring(services)

    @router.get("/v1/auth/me")
    async def get_me(who: Anyone) -> dict[str, Any]:
        uses_models = who.may(Scope.INFERENCE)
        theirs = {"responses:read", "responses:write"} if uses_models else set()
        return {
            "id": who.owner,
            "username": who.owner,
            "role": _role(who),
            "scopes": sorted({*who.scopes, *theirs}),
            "realtime_enabled": uses_models,
        }

    if legacy:

        @router.post(LOGIN)
        async def login(request: Request) -> dict[str, Any]:
            """The password is a key, and so the token is: a name proves nothing here."""
            asked = cold.check(_Login, await cold.read_json(request))
            who = await keys.check(asked.password.encode())
            user = {"id": who.owner, "username": who.owner, "role": _role(who)}
            return {"access_token": asked.password, "token_type": "bearer", "user": user}

    return router


def _role(who: Principal) -> str:
    return "admin" if who.may(Scope.ADMIN) else "user"
