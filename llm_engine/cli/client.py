"""HTTP to a gateway for the command line: every failure becomes one sentence."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llm_engine.cli.target import ENV_KEY, Target
from llm_engine.errors import LLMEngineError

if TYPE_CHECKING:
    import httpx

    from llm_engine.cli.transfer import Span

LOOPBACK = ("127.0.0.1", "localhost", "::1")
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 600
COLD_TIMEOUT_S = 10  # of what no model has to answer
KEY_PREFIX, SHOWN = "sk-le-", 10  # so much of one of our keys is no secret


class Unreachable(LLMEngineError):
    """No answer, or none that an llm-engine gives; it may pass."""

    def __init__(self, text: str, *, asked: bool = True) -> None:
        super().__init__(text)
        self.asked = asked  # the question may have arrived


class Refused(LLMEngineError):
    """The gateway's own no, in its own words."""

    def __init__(self, text: str, status: int, code: str | None) -> None:
        super().__init__(text)
        self.status, self.code = status, code


class Gateway:
    """A gateway's address with the key to it."""

    def __init__(self, target: Target) -> None:
        import httpx

        self.url = target.url
        self.skew_s = 0.0  # how far its clock is ahead of ours
        self._target = target
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
        return self._ask("GET", path)

    def send(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        timeout_s: float = COLD_TIMEOUT_S,
    ) -> Any:
        """A change. Raises Refused, or Unreachable where nobody knows whether it was done."""
        try:
            return self._ask(method, path, body, timeout_s)
        except Unreachable as error:
            if not error.asked:
                raise
            again = "It may have been done all the same: look before you repeat it."
            raise Unreachable(f"{str(error).rstrip('.')}. {again}") from None

    def rows(self, path: str) -> list[dict[str, Any]]:
        data = self.get(path)
        rows = data.get("data") if isinstance(data, dict) else None
        if not isinstance(rows, list):
            raise Unreachable(f"{self.url}{path} answers, but not as an llm-engine does.")
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

    def upload(
        self, path: str, field: str, name: str, file: "Span", once: str, **fields: str
    ) -> Any:
        """A form with a file, which is read as it is sent. Again with the same `once`: it is not
        kept twice."""
        with self._sentences():
            answer = self._client.post(
                path,
                data=fields,
                files={field: (name, file, "application/octet-stream")},
                headers={"Idempotency-Key": once},
            )
            self._check(answer)
            return self._json(answer.text)

    @contextmanager
    def download(self, path: str) -> Iterator[Iterator[bytes]]:
        """The bytes of an answer, in pieces. They end early only with an error."""
        with (
            self._sentences(),
            self._client.stream("GET", path, follow_redirects=True) as answer,
        ):
            if answer.status_code != 200:
                answer.read()
                self._check(answer)
            yield answer.iter_bytes()

    def _ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        timeout_s: float = COLD_TIMEOUT_S,
    ) -> Any:
        with self._sentences():
            answer = self._client.request(method, path, json=body, timeout=timeout_s)
            self._check(answer)
            self._note_clock(answer)
            return self._json(answer.text)

    def _note_clock(self, answer: "httpx.Response") -> None:
        from email.utils import parsedate_to_datetime

        try:
            told = parsedate_to_datetime(answer.headers["date"]).timestamp()
        except (KeyError, ValueError):
            return
        ahead = told - time.time()
        self.skew_s = ahead if abs(ahead) > 2 else 0.0  # the header counts whole seconds

    def _json(self, text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            raise Unreachable(f"{self.url} answers, but not as an llm-engine does.") from None

    def _check(self, answer: "httpx.Response") -> None:
        if answer.status_code < 400:
            return
        status = answer.status_code
        try:
            body = answer.json()
        except ValueError:
            body = None
        message = error_message(body)
        if message is None:
            raise Unreachable(
                f"{self.url} answers, but not as an llm-engine does (HTTP {status}).",
                asked=status >= 500,
            )
        if status >= 500:
            raise Unreachable(message)
        if status in (401, 403):
            message += f" {self._which_key()}"
        raise Refused(message, status, body["error"].get("code"))

    def _which_key(self) -> str:
        """Never the key itself: at most the start by which `keys list` tells it from others."""
        key = self._target.key
        if key is None:
            return f"(No key was sent: --api-key or {ENV_KEY} gives one.)"
        shown = f" and begins with {key[:SHOWN]}" if key.startswith(KEY_PREFIX) else ""
        return f"(The key that was sent is from {self._target.source or 'the program'}{shown}.)"

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout):
            if self._target.starting:
                text = f"Nothing answers at {self.url} yet: `llm-engine up` is still starting."
            else:
                text = f"Nothing answers at {self.url}: start it with `llm-engine up`."
            raise Unreachable(text, asked=False) from None
        except httpx.TimeoutException:
            raise Unreachable(f"{self.url} did not answer in time.") from None
        except httpx.HTTPError as error:
            raise Unreachable(
                f"the connection to {self.url} broke: {error or type(error).__name__}"
            ) from None


def endpoint_path(name: str, rest: str = "") -> str:
    from urllib.parse import quote

    return f"/v1/endpoints/{quote(name, safe='/:@')}{rest}"


def item_path(collection: str, item: str, rest: str = "") -> str:
    """Of a file, an upload, a batch, a fine-tune or a model."""
    from urllib.parse import quote

    return f"/v1/{collection}/{quote(item, safe='')}{rest}"


def list_path(collection: str, **asked: object) -> str:
    return f"/v1/{collection}{query(**asked)}"


def query(**asked: object) -> str:
    """Without what is None."""
    from urllib.parse import urlencode

    return f"?{urlencode({k: v for k, v in asked.items() if v is not None})}"


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
