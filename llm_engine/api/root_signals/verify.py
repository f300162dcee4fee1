"""Tries a model before, or after, it is registered: asks for a few tokens, and says what came."""

import asyncio
from dataclasses import replace
from typing import Any

import orjson

from llm_engine.api.http import Call, require
from llm_engine.api.limits import output_field
from llm_engine.api.operations import Operations
from llm_engine.api.replicas import Replicas
from llm_engine.api.requests import EngineRequest, Kind, aimed
from llm_engine.api.root_signals.shapes import Verification
from llm_engine.api.upstream import Upstreams
from llm_engine.catalog import Route
from llm_engine.errors import APIError, InvalidRequest, NotFound, Overloaded, UpstreamFailed
from llm_engine.records import ModelRecord, Principal, Scope
from llm_engine.services import Services

LONGEST_S = 30
MOST_AT_ONCE = 16
FEW_TOKENS = 16
_PATHS = {Kind.CHAT: "/v1/chat/completions", Kind.EMBEDDINGS: "/v1/embeddings"}
#: In metrics: names that are only tried must not become labels.
_UNNAMED = "(verification)"
_PROMPT = "Answer with one word: ready"


class Verifier:
    def __init__(self, services: Services) -> None:
        self._services = services
        self._safe = services.safe
        self._operations = Operations(services)
        self._upstreams = Upstreams(services)
        self._replicas = Replicas(services)
        self._under_way = 0

    async def verify(self, who: Principal, asked: Verification) -> dict[str, Any]:
        """The client's ModelTestResponse. Raises InvalidRequest for a `url` that must not be
        called, as registering it would; Overloaded where too many are tried at once."""
        if asked.url is not None:
            await self._operations.check_url(asked.url)
        else:
            require(who, Scope.INFERENCE)
        if self._under_way >= MOST_AT_ONCE:
            raise Overloaded(f"{MOST_AT_ONCE} models are being verified. Retry later.",
                             retry_after=1)  # fmt: skip
        self._under_way += 1
        try:
            async with asyncio.timeout(LONGEST_S):
                route = await self._route(who, asked)
                answer = await self._try(asked, route)
        except TimeoutError:
            return _failed(asked, f"It did not answer within {LONGEST_S} s.")
        except APIError as error:
            return _failed(asked, error.message)
        finally:
            self._under_way -= 1
        told = {"success": True, "response": _words(answer), "error": None, "model": asked.model}
        usage = answer.get("usage")
        return told | {"usage": usage if isinstance(usage, dict) else None}

    async def _route(self, who: Principal, asked: Verification) -> Route:
        """With a `url`: there. Else what the name means to who asks, in their own name."""
        key = self._safe.seal(asked.api_key) if asked.api_key is not None else None
        if asked.url is not None:
            model = ModelRecord("", who.owner, _UNNAMED, asked.model, asked.url, key)
            return Route(asked.model, who.owner, upstream=model)
        route = await self._services.route(who, asked.model)
        if key is None:
            return route
        if route.upstream is None:
            raise InvalidRequest("'api_key' is for external models; this one is served here.")
        return replace(route, upstream=replace(route.upstream, sealed_key=key))

    async def _try(self, asked: Verification, route: Route) -> dict[str, Any]:
        """Without fallbacks: it is this model that is in question."""
        if route.endpoint is not None:
            kind = Kind.EMBEDDINGS if route.endpoint.task == "embed" else Kind.CHAT
            return await self._ask(asked, route, kind)
        try:
            return await self._ask(asked, route, Kind.CHAT)
        except (InvalidRequest, NotFound) as refused:
            try:  # it may be one for embeddings
                return await self._ask(asked, route, Kind.EMBEDDINGS)
            except APIError:
                raise refused from None

    async def _ask(self, asked: Verification, route: Route, kind: Kind) -> dict[str, Any]:
        body: dict[str, Any] = {"model": asked.model}
        if kind is Kind.CHAT:
            field = output_field(route.upstream) if route.upstream is not None else "max_tokens"
            body["messages"] = [{"role": "user", "content": _PROMPT}]
            body[field] = asked.max_output_token_count or FEW_TOKENS
        else:
            body["input"] = _PROMPT
        request = EngineRequest(kind, _PATHS[kind], asked.model, False, orjson.dumps(body), True)
        reader = _Reader()
        try:
            if route.upstream is not None:
                await self._upstreams.serve(
                    reader.call, request, _AsItIs(), route.upstream, asked.model
                )
            else:
                assert route.endpoint is not None
                sent = aimed(request, route)
                await self._replicas.serve(reader.call, sent, _AsItIs(), route.endpoint)
        finally:
            reader.call.close()
        return orjson.loads(b"".join(reader.parts))


class _Reader:
    """A call of our own: nobody waits at its other end, and the answer stays here."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.call = Call({"headers": []}, self._receive, self._send, tell_id=False)

    async def _receive(self) -> dict[str, Any]:
        return await asyncio.get_running_loop().create_future()  # it never hangs up

    async def _send(self, message: dict[str, Any]) -> None:
        self.parts.append(message.get("body", b""))


class _AsItIs:
    """The answer in OpenAI's form, as engines and upstreams give it."""

    def answer(self, request: EngineRequest, body: bytes) -> bytes:
        return body

    def event(self, request: EngineRequest, payload: bytes) -> bytes:
        return payload

    def error(self, status: int, body: bytes, request: EngineRequest) -> APIError:
        kind = UpstreamFailed if status >= 500 else InvalidRequest
        return kind(f"The engine answers with HTTP {status}: {body[:300].decode(errors='replace')}")

    def failure(self, error: APIError) -> bytes:
        return b""


def _failed(asked: Verification, why: str) -> dict[str, Any]:
    told = {"success": False, "response": None, "error": why, "model": asked.model}
    return told | {"usage": None}


def _words(answer: dict[str, Any]) -> str:
    """What to show of an answer, whatever it is."""
    rows = answer.get("choices") or answer.get("data") or [{}]
    first = rows[0] if isinstance(rows[0], dict) else {}
    if "embedding" in first:
        return f"An embedding of {len(first['embedding'])} numbers."
    message = first.get("message") or {}
    content = message.get("content") if isinstance(message, dict) else None
    return content if isinstance(content, str) else ""
