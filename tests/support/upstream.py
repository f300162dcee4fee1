"""An external OpenAI-compatible server on a real socket that answers, or fails, as it is told."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Self

import httpx
import openai
import uvicorn
from pydantic import SecretStr

from llm_engine.config import EndpointSettings
from tests.support.gateway import GatewayThread

Send = Callable[[dict[str, Any]], Awaitable[None]]
EVENTS = [b'{"id":"1","object":"chat.completion.chunk","created":1,"model":"theirs","choices":'
          b'[{"index":0,"delta":{"content":"%d "},"finish_reason":%s}]}' % (i, end)
          for i, end in enumerate([b"null"] * 4 + [b'"stop"'])]  # fmt: skip

KEY = "sk-admin"  # of a gateway that asks for one
QUESTION = [{"role": "user", "content": "hi"}]


@dataclass
class Asked:
    """A request as it arrived."""

    path: str
    query: str
    headers: dict[str, str]
    body: dict[str, Any]


Behaviour = Callable[[Asked, Send], Awaitable[None]]


class Upstream:
    """`with Upstream() as upstream:` then `upstream.url`, `upstream.behave = failing(500)`."""

    def __init__(self, behave: Behaviour | None = None) -> None:
        self.behave: Behaviour = behave or good
        self.asked: list[Asked] = []
        self.hung_up = threading.Event()  # the caller closed its connection before the end
        self.url = ""
        self._started = threading.Event()
        config = uvicorn.Config(
            self._app, port=0, interface="asgi3", lifespan="off", log_level="critical"
        )
        self._server = uvicorn.Server(config)
        self._server.install_signal_handlers = lambda: None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)

    def reset(self) -> None:
        self.behave = good
        self.asked.clear()
        self.hung_up.clear()

    async def _run(self) -> None:
        serving = asyncio.create_task(self._server.serve())
        while not self._server.started:
            await asyncio.sleep(0.005)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        self._started.set()
        await serving

    async def _app(self, scope: Any, receive: Any, send: Send) -> None:
        body = b""
        while True:
            part = await receive()
            body += part.get("body", b"")
            if not part.get("more_body"):
                break
        headers = {k.decode(): v.decode() for k, v in scope["headers"]}
        query = scope["query_string"].decode()
        asked = Asked(scope["path"], query, headers, json.loads(body or b"{}"))
        self.asked.append(asked)
        answering = asyncio.create_task(self.behave(asked, send))
        leaving = asyncio.create_task(receive())
        await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            self.hung_up.set()
            answering.cancel()
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        if not answering.cancelled():
            await answering  # an exception cuts the connection


# -- what it may do


async def good(asked: Asked, send: Send) -> None:
    """As OpenAI would, under a model name of its own."""
    if asked.path.endswith("/embeddings"):
        rows = [{"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}]
        usage = {"prompt_tokens": 3, "total_tokens": 3}
        answer = {"object": "list", "data": rows, "model": "theirs", "usage": usage}
        return await reply(send, 200, answer)
    if asked.body.get("stream"):
        return await streaming(*EVENTS, b"[DONE]")(asked, send)
    chat = asked.path.endswith("/chat/completions")
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "logprobs": None}
    choice |= {"message": {"role": "assistant", "content": "hello"}} if chat else {"text": "hello"}
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    answer = {"id": "1", "object": "chat.completion" if chat else "text_completion", "created": 1,
              "model": "theirs", "choices": [choice], "usage": usage}  # fmt: skip
    await reply(send, 200, answer)


def failing(status: int, error: Any = None, **headers: str) -> Behaviour:
    async def behave(asked: Asked, send: Send) -> None:
        content = {"error": {"message": "theirs"}} if error is None else error
        await reply(send, status, content, **headers)

    return behave


def saying(content: bytes, content_type: str = "application/json") -> Behaviour:
    """HTTP 200 with just this."""

    async def behave(asked: Asked, send: Send) -> None:
        await start(send, 200, content_type)
        await send({"type": "http.response.body", "body": content})

    return behave


def streaming(*payloads: bytes, pause_s: float = 0, then: str = "end") -> Behaviour:
    """Events of these payloads; then it ends, is `cut`, or goes on `silent`ly."""

    async def behave(asked: Asked, send: Send) -> None:
        await start(send, 200, "text/event-stream")
        for payload in payloads:
            await asyncio.sleep(pause_s)
            await part(send, b"data: " + payload + b"\n\n")
        await _end(send, then)

    return behave


def dripping(content: bytes, pause_s: float, content_type: str = "text/event-stream") -> Behaviour:
    """The same bytes again and again, one at a time and never at an end."""

    async def behave(asked: Asked, send: Send) -> None:
        await start(send, 200, content_type)
        while True:
            for byte in content:
                await part(send, bytes([byte]))
                await asyncio.sleep(pause_s)

    return behave


async def silent(asked: Asked, send: Send) -> None:
    await asyncio.sleep(60)


async def _end(send: Send, how: str) -> None:
    if how == "silent":
        await asyncio.sleep(60)
    if how == "cut":
        raise ConnectionError("cut, as it was told to")
    await send({"type": "http.response.body", "body": b""})


async def start(send: Send, status: int, content_type: str, **headers: str) -> None:
    given = {"content-type": content_type} | {k.replace("_", "-"): v for k, v in headers.items()}
    raw = [(k.encode(), v.encode()) for k, v in given.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})


async def part(send: Send, content: bytes) -> None:
    await send({"type": "http.response.body", "body": content, "more_body": True})


async def reply(send: Send, status: int, content: Any, **headers: str) -> None:
    await start(send, status, "application/json", **headers)
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})


# -- the gateway before it


class _Registry(GatewayThread):
    def __exit__(self, *error: object) -> None:
        pool = self.services.upstream_pool if self.services else None
        if pool is not None and self.loop is not None:
            asyncio.run_coroutine_threadsafe(pool.aclose(), self.loop).result(10)
        super().__exit__(*error)


def gateway_with_registry(endpoints: list[EndpointSettings], **gateway: Any) -> GatewayThread:
    """A gateway that may call this machine, and has a secret to keep keys with."""
    running = _Registry(endpoints, **({"allowed_upstreams": ["127.0.0.1"]} | gateway))
    secret = {"secret_key": SecretStr("the tests' own")}
    store = running.settings.store.model_copy(update=secret)
    running.settings = running.settings.model_copy(update={"store": store})
    return running


def register(gateway: GatewayThread, name: str, key: str | None = None, **values: Any) -> str:
    """Its id."""
    headers = {"authorization": f"Api-Key {key}"} if key else {}
    with gateway.client(headers=headers) as client:
        answer = client.post("/rootsignals/v1/models/", json={"name": name} | values)
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def new_key(gateway: GatewayThread, admin: str, owner: str, *scopes: str) -> str:
    with gateway.client(headers={"authorization": f"Bearer {admin}"}) as client:
        body = {"name": "test", "owner": owner, "scopes": scopes or ["inference", "models"]}
        answer = client.post("/v1/keys", json=body)
    assert answer.status_code == 201, answer.text
    return answer.json()["key"]


# -- its callers


def client_of(gateway: GatewayThread, key: str = KEY) -> httpx.Client:
    return gateway.client(headers={"authorization": f"Bearer {key}"})


def openai_of(gateway: GatewayThread) -> openai.OpenAI:
    return gateway.openai(KEY)


def chat(gateway: GatewayThread, model: str = "ext", **changes: Any) -> httpx.Response:
    with client_of(gateway) as client:
        body = {"model": model, "messages": QUESTION} | changes
        return client.post("/v1/chat/completions", json=body)


def last_event(answer: httpx.Response) -> Any:
    return json.loads(answer.content.strip().split(b"\n\n")[-1].removeprefix(b"data: "))


def metric(gateway: GatewayThread, name: str, **labels: str) -> float:
    assert gateway.services is not None
    return gateway.services.metrics.registry.get_sample_value(f"llm_engine_{name}", labels) or 0
