"""What a name in a request means to who asks: an endpoint, an alias, or an external model.

Pure, in memory, and the one place that knows who may see what. Own registered models come first,
then the endpoints one may use, then what others have registered for everybody.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from llm_engine.errors import InvalidRequest, NotFound
from llm_engine.records import Directory, EndpointStatus, ModelRecord, Principal
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
        for a model that does not do `task`."""
        aliases: list[ModelRecord] = []
        here, asked = who, name
        while len(aliases) <= LONGEST_CHAIN:
            model = self._registered(here, name)
            if model is None or model in aliases:  # an alias may bear the name of what it means
                endpoint = self._balancer.table.endpoints.get(name)
                if endpoint is None or not here.sees(endpoint.owned_by, endpoint.public):
                    break
                _check_task(asked, endpoint, task)
                return _route(asked, aliases, endpoint=endpoint)
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

    def _registered(self, who: Principal, name: str) -> ModelRecord | None:
        own = self.directory.models.get(who.owner, {}).get(name)
        if own is not None:
            return own
        endpoint = self._balancer.table.endpoints.get(name)
        if endpoint is not None and who.sees(endpoint.owned_by, endpoint.public):
            return None
        return self._public.get(name)


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
) -> Route:
    steps = [*aliases, *([upstream] if upstream else [])]
    owner, fallback = (endpoint.owned_by, endpoint.fallback) if endpoint else ("", None)
    for model in reversed(steps):  # the first on the way has the say
        if model.fallback is not None or not owner:
            owner, fallback = model.owner, model.fallback
    return Route(name, owner, endpoint, upstream, tuple(aliases), fallback)


def _check_task(name: str, endpoint: EndpointStatus, task: str | None) -> None:
    if task is not None and endpoint.task != task:
        does = {"generate": "generates text", "embed": "makes embeddings"}
        raise InvalidRequest(
            f"The model '{name}' {does[endpoint.task]}; it cannot serve this path.",
            param="model",
            code="model_not_supported",
        )
