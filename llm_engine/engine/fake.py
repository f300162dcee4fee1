"""An engine with no weights: the same words to every prompt, as fast as HTTP goes.

For overhead benchmarks and quick tests, never for answers. Understands of OpenAI's fields just
`stream`, `stream_options.include_usage`, `max_tokens` and its other names, `input`, `seed`, with
which a whole text begins, to tell it from others, and `logprob_token_ids`: each of these tokens is
half as likely as the one before. A token of a text is a character.
Its `vllm_args` are `load_delay_s`, `token_delay_s`, `max_num_seqs` and `max_model_len`; anything
else is refused. Knows nothing of vLLM.
"""

import asyncio
import json
import math
import socket
import time
import uuid
from pathlib import Path
from typing import Any

import uvicorn

from llm_engine.engine.adapters import AdapterFailed, Host
from llm_engine.engine.base import AdapterProblem
from llm_engine.engine.server import EngineSpec, Guard, run
from llm_engine.records import Load

WORD = "word "
KNOWN = {"load_delay_s": 0.0, "token_delay_s": 0.0, "max_num_seqs": 256, "max_model_len": 8192}


class FakeEngine:
    """An ASGI app; counts what it does as a real engine would."""

    def __init__(self, spec: EngineSpec) -> None:
        unknown = spec.vllm_args.keys() - KNOWN.keys()
        if unknown:
            raise ValueError(f"the fake engine has no {', '.join(sorted(unknown))}")
        self.spec = spec
        self.options = KNOWN | spec.vllm_args
        self.slots = asyncio.Semaphore(int(self.options["max_num_seqs"]))
        self.running = self.waiting = self.prompt_tokens = self.generated_tokens = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        if path == "/health":
            return await reply(send, 200, {})
        if path == "/v1/models":
            row = {"id": self.spec.name, "max_model_len": self.options["max_model_len"]}
            return await reply(send, 200, {"object": "list", "data": [row]})
        body = json.loads(await read_body(receive))
        if self.running + self.waiting >= self.spec.max_queue:
            return await reply(send, 503, {"error": {"message": "queue full", "code": 503}})
        if path == "/tokenize":
            return await reply(send, 200, {"tokens": [ord(each) for each in body["prompt"]]})
        self.waiting += 1
        work = asyncio.create_task(self._work(path, body, send))
        gone = asyncio.create_task(until_disconnect(receive))
        await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
        work.cancel()
        gone.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)

    async def _work(self, path: str, body: dict[str, Any], send: Any) -> None:
        running = False
        try:
            async with self.slots:
                self.waiting -= 1
                self.running += 1
                running = True
                self.prompt_tokens += 1
                if path == "/v1/embeddings":
                    await self._embed(body, send)
                else:
                    await self._generate(path, body, send)
        finally:
            if running:
                self.running -= 1
            else:
                self.waiting -= 1

    async def _embed(self, body: dict[str, Any], send: Any) -> None:
        items = body["input"] if isinstance(body["input"], list) else [body["input"]]
        rows = [
            {"object": "embedding", "index": i, "embedding": [1.0, 0.0]} for i in range(len(items))
        ]
        usage = {"prompt_tokens": len(items), "total_tokens": len(items)}
        answer = {"object": "list", "data": rows, "model": self.spec.name, "usage": usage}
        await reply(send, 200, answer)

    async def _generate(self, path: str, body: dict[str, Any], send: Any) -> None:
        count = body.get("max_completion_tokens") or body.get("max_tokens") or 16
        if path == "/v1/responses":
            return await self._respond(body, send)
        chat = path == "/v1/chat/completions"
        kind = "chat.completion" if chat else "text_completion"
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind + ".chunk" if chat and body.get("stream") else kind,
            "created": int(time.time()),
            "model": body["model"],
        }
        usage = {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": count + 1}
        if not body.get("stream"):
            await asyncio.sleep(count * self.options["token_delay_s"])
            self.generated_tokens += count
            text = WORD * count if body.get("seed") is None else f"{body['seed']} {WORD * count}"
            choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
            choice["logprobs"] = logprobs(body.get("logprob_token_ids"))
            choice |= {"message": message(text)} if chat else {"text": text}
            return await reply(send, 200, head | {"choices": [choice], "usage": usage})
        await send(start(200, b"text/event-stream; charset=utf-8"))
        for i in range(count):
            await asyncio.sleep(self.options["token_delay_s"])
            self.generated_tokens += 1
            last = "length" if i == count - 1 else None
            choice = {"index": 0, "finish_reason": last, "logprobs": None}
            choice |= {"delta": {"content": WORD}} if chat else {"text": WORD}
            event = b"data: " + json.dumps(head | {"choices": [choice]}).encode() + b"\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": True})
        if (body.get("stream_options") or {}).get("include_usage"):
            event = json.dumps(head | {"choices": [], "usage": usage}).encode()
            event = b"data: " + event + b"\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _respond(self, body: dict[str, Any], send: Any) -> None:
        """As vLLM does: its events have names, and the last one holds it all."""
        count = body.get("max_output_tokens") or 16
        text = WORD * count if body.get("seed") is None else f"{body['seed']} {WORD * count}"
        usage = {"input_tokens": len(body["input"]), "output_tokens": count}
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": None}
        name = f"msg_{body['request_id']}"
        item = {"id": name, "type": "message", "role": "assistant", "status": "completed"}
        whole = {
            "id": body["request_id"], "object": "response", "model": body["model"],
            "status": "completed", "output": [item | {"content": [part]}],
            "usage": usage | {"total_tokens": sum(usage.values())},
        }  # fmt: skip
        if not body.get("stream"):
            await asyncio.sleep(count * self.options["token_delay_s"])
            self.generated_tokens += count
            return await reply(send, 200, whole)

        async def tell(kind: str, **facts: Any) -> None:
            event = {"type": f"response.{kind}", "sequence_number": 0} | facts
            data = f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
            await send({"type": "http.response.body", "body": data, "more_body": True})

        await send(start(200, b"text/event-stream; charset=utf-8"))
        at: dict[str, Any] = {"item_id": name, "output_index": 0, "content_index": 0}
        begun = whole | {"status": "in_progress", "output": []}
        await tell("created", response=begun)
        await tell("in_progress", response=begun)
        await tell("output_item.added", item=item | {"content": []}, output_index=0)
        await tell("content_part.added", part=part | {"text": ""}, **at)
        seed = text.removesuffix(WORD * count)
        for piece in [*filter(None, [seed]), *[WORD] * count]:
            await asyncio.sleep(self.options["token_delay_s"])
            self.generated_tokens += 1
            await tell("output_text.delta", delta=piece, logprobs=None, **at)
        await tell("output_text.done", text=text, logprobs=None, **at)
        await tell("content_part.done", part=part, **at)
        await tell("output_item.done", item=whole["output"][0], output_index=0)
        await tell("completed", response=whole)
        await send({"type": "http.response.body", "body": b""})


class FakeGuard(Guard):
    """Any adapter with an adapter_config.json can be loaded; it changes nothing but the name."""

    def host(self, app: Any) -> tuple[Host, int]:
        return FakeHost(), self._spec.max_adapters

    def load(self, app: Any) -> Load:
        fake = self._app
        return Load(
            fake.running,
            fake.waiting,
            prompt_tokens=fake.prompt_tokens,
            generated_tokens=fake.generated_tokens,
            slots=int(fake.options["max_num_seqs"]),
        )


class FakeHost:
    async def load(self, adapter: str, folder: Path) -> None:
        if not (folder / "adapter_config.json").exists():
            raise AdapterFailed(AdapterProblem.BROKEN, "the engine cannot load it.")

    async def unload(self, adapter: str) -> None:
        pass


def message(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "refusal": None}


def logprobs(tokens: list[int] | None) -> dict[str, Any] | None:
    if tokens is None:
        return None
    asked = [
        {"token": chr(token), "logprob": -math.log(2) * (place + 1), "bytes": None}
        for place, token in enumerate(tokens)
    ]
    said = {"token": WORD, "logprob": -math.log(2) * len(tokens), "bytes": None}
    return {"content": [said | {"top_logprobs": [said, *asked]}]}


def start(status: int, content_type: bytes) -> dict[str, Any]:
    headers = [(b"content-type", content_type)]
    return {"type": "http.response.start", "status": status, "headers": headers}


async def reply(send: Any, status: int, content: Any) -> None:
    await send(start(status, b"application/json"))
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})


async def read_body(receive: Any) -> bytes:
    body = b""
    while True:
        part = await receive()
        body += part.get("body", b"")
        if not part.get("more_body"):
            return body


async def until_disconnect(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def serve(spec: EngineSpec, listener: socket.socket) -> None:
    app = FakeGuard(FakeEngine(spec))
    time.sleep(app._app.options["load_delay_s"])
    settings = uvicorn.Config(
        app, lifespan="off", access_log=False, log_level="warning", timeout_keep_alive=120
    )
    uvicorn.Server(settings).run(sockets=[listener])


if __name__ == "__main__":
    run(serve)
