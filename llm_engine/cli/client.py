"""HTTP to a gateway for the command line: every failure becomes one sentence."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llm_engine.cli.target import ENV_KEY, Target
from llm_engine.errors import LLMEngineError

if TYPE_CHECKING:
    import httpx

LOOPBACK = ("127.0.0.1", "localhost", "::1")
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 600


class Gateway:
    """A gateway's address with the key to it."""

    def __init__(self, target: Target) -> None:
        import httpx

        self.url = target.url
        self._starting = target.starting
        headers = {"Authorization": f"Bearer {target.key}"} if target.key else {}
        try:
            local = urlsplit(target.url).hostname in LOOPBACK
            self._client = httpx.Client(
                base_url=target.url,
                headers=headers,
                timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
                trust_env=not local,  # a proxy leads nowhere from here to here
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise LLMEngineError(f"'{target.url}' is not an address: {error}") from None

    def __enter__(self) -> "Gateway":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def get(self, path: str) -> Any:
        with self._sentences():
            answer = self._client.get(path, timeout=10)
            self._check(answer)
            return self._json(answer.text)

    def rows(self, path: str) -> list[dict[str, Any]]:
        data = self.get(path)
        rows = data.get("data") if isinstance(data, dict) else None
        if not isinstance(rows, list):
            raise LLMEngineError(f"{self.url}{path} answers, but not as an llm-engine does.")
        return rows

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer; closing the iterator aborts it."""
        with self._sentences(), self._client.stream("POST", path, json=body) as answer:
            if answer.status_code != 200:
                answer.read()
                self._check(answer)
            ended = False
            for data in sse_data(answer.iter_lines()):
                if data == "[DONE]":
                    ended = True
                    continue
                event = self._json(data)
                if isinstance(event, dict) and event.get("error"):
                    raise LLMEngineError(error_message(event) or "the answer failed")
                yield event
            if not ended:
                raise LLMEngineError("the answer ended early: the connection was closed.")

    def _json(self, text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            raise LLMEngineError(f"{self.url} answers, but not as an llm-engine does.") from None

    def _check(self, answer: "httpx.Response") -> None:
        if answer.status_code < 400:
            return
        try:
            message = error_message(answer.json())
        except ValueError:
            message = None
        if message is None:
            raise LLMEngineError(
                f"{self.url} answers, but not as an llm-engine does (HTTP {answer.status_code})."
            )
        if answer.status_code == 401:
            message += f" (--api-key or {ENV_KEY} gives the key.)"
        raise LLMEngineError(message)

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout):
            if self._starting:
                text = f"Nothing answers at {self.url} yet: `llm-engine up` is still starting."
            else:
                text = f"Nothing answers at {self.url}: start it with `llm-engine up`."
            raise LLMEngineError(text) from None
        except httpx.TimeoutException:
            raise LLMEngineError(f"{self.url} did not answer in time.") from None
        except httpx.HTTPError as error:
            raise LLMEngineError(
                f"the connection to {self.url} broke: {error or type(error).__name__}"
            ) from None


def sse_data(lines: Iterator[str]) -> Iterator[str]:
    """The data of each server-sent event, as the specification puts lines together."""
    data: list[str] = []
    for line in lines:
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            yield "\n".join(data)
            data = []


def error_message(body: Any) -> str | None:
    """The words of an OpenAI error object."""
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict):
        error = error.get("message")
    return error if isinstance(error, str) and error else None
