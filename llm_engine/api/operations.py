"""What clients do to endpoints and registered models, whichever dialect they speak.

Who may is decided here: what one must not see does not exist for them. The answer comes once the
store has it; the controller does the rest.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from llm_engine.api.cold import check as check_shape
from llm_engine.api.network_guard import Allowed, check
from llm_engine.config import MERGED, EndpointSettings
from llm_engine.errors import Conflict, Forbidden, InvalidRequest, NotFound
from llm_engine.ids import new_id
from llm_engine.records import EndpointRecord, EndpointStatus, ModelRecord, Principal
from llm_engine.services import Services
from llm_engine.store.endpoints import not_found
from llm_engine.store.registered import no_model

Change = Callable[[EndpointRecord], tuple[EndpointSettings, dict[str, Any]]]


class Operations:
    def __init__(self, services: Services) -> None:
        self._services = services
        self._store = services.store
        self._limits = services.settings.store
        self._allowed = Allowed(services.settings.gateway.allowed_upstreams)

    # -- endpoints

    async def endpoints(self, who: Principal) -> list[EndpointRecord]:
        """All that they may see, oldest first."""
        records = await asyncio.to_thread(self._store.endpoints.all)
        return [record for record in records if sees(who, record)]

    async def endpoint(self, who: Principal, name: str) -> EndpointRecord:
        """Raises NotFound."""
        record = await asyncio.to_thread(self._store.endpoints.get, name)
        if not sees(who, record):
            raise not_found(name)
        return record

    async def create(
        self, who: Principal, settings: EndpointSettings, extras: dict[str, Any] | None = None
    ) -> EndpointRecord:
        """Raises Conflict where the name is taken, by an endpoint or by a model of theirs, and
        NotFound where its model is a fine-tuned one that is not there."""
        if settings.name in self._services.catalog.directory.models.get(who.owner, {}):
            raise Conflict(
                f"You have registered a model named '{settings.name}'. Choose another name.",
                param="name",
                code="name_taken",
            )
        settings = await self._weights(who, settings)
        record = await asyncio.to_thread(
            self._store.endpoints.create,
            settings,
            who.owner,
            extras or {},
            self._limits.max_endpoints,
        )
        await self._services.nudge()
        return record

    async def change(self, who: Principal, name: str, change: Change) -> EndpointRecord:
        """Raises NotFound, Forbidden, or Conflict while another operation is under way."""
        await self._own(who, name)

        def checked(record: EndpointRecord) -> tuple[EndpointSettings, dict[str, Any]]:
            settings, extras = change(record)
            special = settings.model.startswith(("ft:", MERGED))
            if special and settings.model != record.spec["model"]:
                raise InvalidRequest(
                    "A fine-tuned model becomes an endpoint of its own. Create one.",
                    param="model",
                    code="invalid_value",
                )
            return settings, extras

        record = await asyncio.to_thread(self._store.endpoints.ask_change, name, checked)
        await self._services.nudge()
        return record

    async def delete(self, who: Principal, name: str) -> EndpointRecord:
        """Raises as `change`; Conflict the second time, too."""
        await self._own(who, name)
        record = await asyncio.to_thread(self._store.endpoints.ask_delete, name)
        await self._services.nudge()
        return record

    async def _weights(self, who: Principal, settings: EndpointSettings) -> EndpointSettings:
        """With the adapter's id where the model is the name of a fine-tuned one. Raises NotFound,
        InvalidRequest."""
        await self._services.look_up(settings.model)
        adapter = self._services.catalog.adapter(who, settings.model)
        if adapter is None:
            if not settings.model.startswith(("ft:", MERGED)):
                return settings
            raise NotFound(f"There is no fine-tuned model '{settings.model}'.", param="model")
        return check_shape(EndpointSettings, settings.model_dump() | {"model": MERGED + adapter.id})

    def status(self, name: str) -> EndpointStatus | None:
        """How it is doing; None until the controller has seen it."""
        return self._services.balancer.table.endpoints.get(name)

    async def _own(self, who: Principal, name: str) -> None:
        record = await self.endpoint(who, name)
        if not who.sees(record.owner):
            raise Forbidden(f"The endpoint '{name}' belongs to another owner; you may use it only.")

    # -- registered models

    async def register(
        self, who: Principal, name: str, key: str | None = None, **values: Any
    ) -> ModelRecord:
        """An alias, or an external model where there is a `url`. Raises Conflict where the name
        is taken, InvalidRequest for a `url` that must not be called."""
        await self._check(who, name, values.get("url"))
        now = time.time()
        record = ModelRecord(
            id=new_id("mdl"),
            owner=who.owner,
            name=name,
            sealed_key=self._services.safe.seal(key) if key else None,
            created_at=now,
            updated_at=now,
            **values,
        )
        await asyncio.to_thread(self._store.registered.add, record, self._limits.max_models)
        await self._services.nudge()
        return record

    async def registered(self, who: Principal) -> list[ModelRecord]:
        """One's own and the public ones, oldest first."""
        models = await asyncio.to_thread(self._store.registered.all)
        return [model for model in models if who.sees(model.owner, model.public)]

    async def model(self, who: Principal, model: str) -> ModelRecord:
        """By id. Raises NotFound."""
        record = await asyncio.to_thread(self._store.registered.get, model)
        if not who.sees(record.owner, record.public):
            raise no_model(model)
        return record

    async def reregister(self, who: Principal, model: str, /, **values: Any) -> ModelRecord:
        """Change what is given. `key`: another one, or None to have none any more."""
        record = await self._own_model(who, model)
        if "key" in values:
            key = values.pop("key")
            values["sealed_key"] = self._services.safe.seal(key) if key else None
        elif values.get("url", record.url) != record.url:
            # A key must not follow to whatever address somebody writes in later.
            values["sealed_key"] = None
        name = values.get("name", record.name)
        await self._check(who, name if name != record.name else None, values.get("url"))
        changed = await asyncio.to_thread(self._store.registered.change, model, **values)
        await self._services.nudge()
        return changed

    async def unregister(self, who: Principal, model: str) -> None:
        await self._own_model(who, model)
        await asyncio.to_thread(self._store.registered.remove, model)
        await self._services.nudge()

    async def check_url(self, url: str) -> None:
        """Raises InvalidRequest for an address that must not be called."""
        await check(self._allowed, url)

    async def _own_model(self, who: Principal, model: str) -> ModelRecord:
        record = await self.model(who, model)
        if not who.sees(record.owner):
            raise Forbidden(f"The model '{model}' belongs to another owner; you may use it only.")
        return record

    async def _check(self, who: Principal, name: str | None, url: str | None) -> None:
        if url is not None:
            await self.check_url(url)
        endpoint = self.status(name) if name is not None else None
        if endpoint is not None and who.sees(endpoint.owned_by, endpoint.public):
            raise InvalidRequest(
                f"'{name}' is the name of an endpoint that is served here. Choose another one.",
                param="name",
                code="name_taken",
            )


def sees(who: Principal, record: EndpointRecord) -> bool:
    return who.sees(record.owner, bool(record.spec.get("public", True)))
