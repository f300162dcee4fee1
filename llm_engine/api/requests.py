"""What the dispatcher needs to know of a request, and of the dialect that it came in.

Engines and external upstreams speak OpenAI's language: a dialect brings its requests into it, and
its `Form` brings the answers back.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

import orjson

from llm_engine.catalog import Route
from llm_engine.errors import APIError


class Kind(StrEnum):
    CHAT = "chat.completions"
    COMPLETIONS = "completions"
    EMBEDDINGS = "embeddings"
    RESPONSES = "responses"

    @property
    def task(self) -> str:
        return "embed" if self is Kind.EMBEDDINGS else "generate"


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A request in the engines' language."""

    kind: Kind
    path: str
    model: str
    stream: bool
    body: bytes
    rewrite: bool  # each event of the stream, or the whole answer, goes through the dialect's Form
    choices: int = 1  # texts that will be generated: n for each prompt
    top_logprobs: int | None = None  # what the caller asked for; None: leave the answer's alone
    obfuscate: bool = False  # pad each event, so that its size does not tell its text
    shown: str | None = None  # what answers call the model, where engines call it otherwise
    batch: bool = False  # nobody waits for it
    adapter: str | None = None  # the id of what the engine is to answer with
    store: bool = False  # the answer is to be kept, with the request
    session: str | None = None  # requests with the same one begin alike: one replica has its cache

    @property
    def called(self) -> str:
        """The model's name, for whoever asked."""
        return self.shown or self.model


class Form(Protocol):
    """How a dialect shows what an engine has answered."""

    def answer(self, request: EngineRequest, body: bytes) -> bytes:
        """The whole answer. Raises APIError where the engine's is none."""

    def event(self, request: EngineRequest, payload: bytes) -> bytes:
        """What to write for the payload of one event; nothing, perhaps. Raises APIError where
        the engine gave up."""

    def error(self, status: int, body: bytes, request: EngineRequest) -> APIError:
        """What an engine's refusal means."""

    def failure(self, error: APIError) -> bytes:
        """What ends a stream that fails after its first byte."""


def defer(request: EngineRequest, priority: int | None) -> EngineRequest:
    """The same request as one of a batch's, behind all with a lower number in the engine's queue;
    None: the engine knows no such numbers."""
    body = request.body
    if priority is not None:
        body = orjson.dumps(orjson.loads(body) | {"priority": priority})
    return replace(request, body=body, batch=True)


def rename(request: EngineRequest, model: str, shown: str) -> EngineRequest:
    """The same request for whoever knows the model as `model`; answers call it `shown`."""
    if model == request.model and shown == model:
        return request
    body = orjson.dumps(orjson.loads(request.body) | {"model": model})
    return replace(request, model=model, body=body, shown=shown, rewrite=True)


def aimed(request: EngineRequest, route: Route) -> EngineRequest:
    """The same request for the engines of the endpoint that the route leads to."""
    assert route.endpoint is not None
    if route.adapter is None:
        return rename(request, route.endpoint.name, route.name)
    return replace(rename(request, route.adapter.id, route.name), adapter=route.adapter.id)
