"""What a name in a request means to who asks: an endpoint, an adapter on one, an alias, or an
external model.

Pure, in memory, and the one place that knows who may see what. Own registered models come first,
then the endpoints one may use, then one's adapters, then what others have registered for everybody.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from llm_engine.errors import InvalidRequest, NotFound
from llm_engine.records import (
    AdapterRecord,
    Directory,
    EndpointStatus,
    KeyRecord,
    ModelRecord,
    Principal,
)
from llm_engine.routing import Balancer

#: An alias of an alias of an alias: beyond this it is a circle, or might as well be.
LONGEST_CHAIN = 5


@dataclass(frozen=True, slots=True)
class Route:
    """Where a name leads."""

    name: str  # as asked for
    owner: str  # of whatever names the fallback: with whose eyes it is looked for
    endpoint: EndpointStatus | None = None
    upstream: ModelRecord | None = None  # an external model; exactly one of the two is set
    registered: tuple[ModelRecord, ...] = ()  # the aliases on the way, whose limits hold, too
    fallback: str | None = None
    adapter: AdapterRecord | None = None  # that the endpoint is to answer with


class Catalog:
    def __init__(self, balancer: Balancer) -> None:
        self._balancer = balancer
        self.directory = Directory()
        self._public: dict[str, ModelRecord] = {}

    def update(self, directory: Directory) -> None:
        self.directory = directory
        everyone = [m for models in directory.models.values() for m in models.values() if m.public]
        # Ids sort by time: of two with a name the older one has it.
        self._public = {m.name: m for m in sorted(everyone, key=lambda m: m.id, reverse=True)}

    def resolve(self, who: Principal, name: str, task: str | None = None) -> Route:
        """Raises NotFound for what does not exist or is not theirs to see, and InvalidRequest
        for a model that does not do `task`, and for an adapter that its base cannot serve."""
        aliases: list[ModelRecord] = []
        here, asked = who, name
        while len(aliases) <= LONGEST_CHAIN:
            model = self._registered(here, name)
            if model is None or model in aliases:  # an alias may bear the name of what it means
                endpoint, adapter = self._endpoint(here, name), None
                if endpoint is None:
                    adapter = self.adapter(here, name)
                    if adapter is None:
                        break
                    endpoint = self._base(here, asked, adapter)
                _check_task(asked, endpoint, task)
                return _route(asked, aliases, endpoint=endpoint, adapter=adapter)
            if model.url is not None:
                return _route(asked, aliases, upstream=model)
            aliases.append(model)
            # What its owner may use, whoever uses it.
            here, name = Principal(model.owner, frozenset()), model.model or model.name
        raise missing(asked, aliases)

    def endpoints(self, who: Principal) -> Iterator[EndpointStatus]:
        for endpoint in self._balancer.table.endpoints.values():
            if who.sees(endpoint.owned_by, endpoint.public):
                yield endpoint

    def models(self, who: Principal) -> Iterator[ModelRecord]:
        """Registered ones: one's own, then those that others made public, without its namesakes."""
        own = self.directory.models.get(who.owner, {})
        yield from own.values()
        for model in self._public.values():
            if model.owner != who.owner and model.name not in own:
                yield model

    def adapters(self, who: Principal) -> Iterator[AdapterRecord]:
        """Those that no other model's name hides from them."""
        own = self.directory.models.get(who.owner, {})
        for name, adapter in self.directory.adapters.items():
            if who.sees(adapter.owner) and name not in own and self._endpoint(who, name) is None:
                yield adapter

    def learn(self, adapter: AdapterRecord) -> None:
        """One that the next directory will tell of."""
        known = self.directory.adapters | {adapter.name: adapter}
        self.directory = replace(self.directory, adapters=known)

    def forget(self, adapter: AdapterRecord) -> None:
        """One that the next directory will not tell of any more."""
        known = {n: a for n, a in self.directory.adapters.items() if a.id != adapter.id}
        self.directory = replace(self.directory, adapters=known)

    def revoke(self, key: KeyRecord) -> None:
        """One that the next directory will tell as revoked."""
        known = self.directory.keys | {key.digest: key}
        self.directory = replace(self.directory, keys=known)

    def _registered(self, who: Principal, name: str) -> ModelRecord | None:
        own = self.directory.models.get(who.owner, {}).get(name)
        if own is not None:
            return own
        if self._endpoint(who, name) is not None or self.adapter(who, name) is not None:
            return None
        return self._public.get(name)

    def _endpoint(self, who: Principal, name: str) -> EndpointStatus | None:
        endpoint = self._balancer.table.endpoints.get(name)
        if endpoint is None or not who.sees(endpoint.owned_by, endpoint.public):
            return None
        return endpoint

    def adapter(self, who: Principal, name: str) -> AdapterRecord | None:
        """By its name, whatever else bears it."""
        adapter = self.directory.adapters.get(name)
        return adapter if adapter is not None and who.sees(adapter.owner) else None

    def _base(self, who: Principal, asked: str, adapter: AdapterRecord) -> EndpointStatus:
        """The endpoint that serves an adapter. Raises NotFound or InvalidRequest with the reason
        why there is none."""
        base, problem = self._endpoint(who, adapter.base), None
        if base is None:
            raise NotFound(
                f"The model '{asked}' is an adapter of '{adapter.base}', which does not exist here "
                "any more.",
                param="model",
                code="model_not_found",
            )
        if base.model != adapter.weights:
            problem = f"was trained on {adapter.weights}, but '{base.name}' serves {base.model} now"
        elif base.max_adapters == 0:
            problem = f"is an adapter, and '{base.name}' serves none (max_adapters: 0)"
        elif adapter.rank > base.max_adapter_rank:
            problem = (
                f"is an adapter of rank {adapter.rank}, and '{base.name}' serves those up to "
                f"{base.max_adapter_rank} (max_adapter_rank)"
            )
        if problem is not None:
            raise InvalidRequest(
                f"The model '{asked}' {problem}.", param="model", code="model_not_supported"
            )
        return base


def missing(name: str, aliases: list[ModelRecord] | tuple[ModelRecord, ...] = ()) -> NotFound:
    if aliases:
        leads = aliases[-1].model or aliases[-1].name
        return NotFound(
            f"The model '{name}' is an alias that leads to '{leads}', which does not exist here.",
            param="model",
            code="model_not_found",
        )
    return NotFound(
        f"The model '{name}' does not exist or you do not have access to it.",
        param="model",
        code="model_not_found",
    )


def _route(
    name: str,
    aliases: list[ModelRecord],
    endpoint: EndpointStatus | None = None,
    upstream: ModelRecord | None = None,
    adapter: AdapterRecord | None = None,
) -> Route:
    steps = [*aliases, *([upstream] if upstream else [])]
    owner, fallback = (endpoint.owned_by, endpoint.fallback) if endpoint else ("", None)
    if adapter is not None:
        # What stands in for its base has not learnt what the adapter has.
        owner, fallback = adapter.owner, None
    for model in reversed(steps):  # the first on the way has the say
        if model.fallback is not None or not owner:
            owner, fallback = model.owner, model.fallback
    return Route(name, owner, endpoint, upstream, tuple(aliases), fallback, adapter)


def _check_task(name: str, endpoint: EndpointStatus, task: str | None) -> None:
    if task is not None and endpoint.task != task:
        does = {"generate": "generates text", "embed": "makes embeddings"}
        raise InvalidRequest(
            f"The model '{name}' {does[endpoint.task]}; it cannot serve this path.",
            param="model",
            code="model_not_supported",
        )
