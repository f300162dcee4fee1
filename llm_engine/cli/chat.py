"""`chat`: a conversation in the terminal, token by token."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llm_engine.cli import console
from llm_engine.cli.client import Gateway
from llm_engine.errors import LLMEngineError

HELP = "Ctrl-C stops an answer, /reset forgets the conversation, /exit or Ctrl-D ends."
CHAT = "/v1/chat/completions"
DIM, UNDIM = "\x1b[2m", "\x1b[22m"
#: Takes a piece of text, and whether the model only thinks it.
Write = Callable[[str, bool], None]


@dataclass
class Answer:
    text: str = ""
    tokens: int = 0
    seconds: float = 0.0  # from the question to the last piece of the answer
    counted: bool = False  # the server has told the number of tokens
    cut: bool = False  # it ended because of a limit, not because it was complete

    @property
    def summary(self) -> str:
        text = f"{self.tokens} tokens"
        if self.seconds > 0:
            text += f", {self.seconds:.2f} s, {self.tokens / self.seconds:.1f} tokens/s"
        return text + (", cut at the token limit" if self.cut else "")


@dataclass
class Chat:
    """A conversation with one model."""

    gateway: Gateway
    model: str
    system: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, prompt: str, write: Write) -> Answer:
        """Streams an answer into `write`; a question that got none is not remembered."""
        self.messages.append({"role": "user", "content": prompt})
        answer = Answer()
        body = {"model": self.model, "messages": self.messages, "stream": True, **self.options}
        body["stream_options"] = {"include_usage": True}
        events, began = self.gateway.stream(CHAT, body), time.monotonic()
        try:
            for event in events:
                if _take(event, answer, write):
                    answer.seconds = time.monotonic() - began
        finally:
            events.close()  # tells the server to stop when this was interrupted
            if answer.text:
                self.messages.append({"role": "assistant", "content": answer.text})
            else:
                self.messages.pop()
        return answer


def _take(event: dict[str, Any], answer: Answer, write: Write) -> bool:
    """Whether the event brought a piece of the answer."""
    usage = event.get("usage")
    if usage:
        answer.tokens, answer.counted = usage["completion_tokens"], True
    choice = next(iter(event.get("choices") or []), {})
    delta = choice.get("delta") or {}
    answer.cut = answer.cut or choice.get("finish_reason") == "length"
    thought = delta.get("reasoning") or delta.get("reasoning_content") or ""
    text = delta.get("content") or ""
    if not (text or thought):
        return False
    answer.tokens += not answer.counted
    if thought:
        write(thought, True)
    if text:
        answer.text += text
        write(text, False)
    return True


def pick_model(gateway: Gateway) -> str:
    """The first endpoint that can chat now."""
    rows = [row for row in gateway.rows("/v1/endpoints") if row["task"] == "generate"]
    for row in rows:
        if row["status"] == "READY":
            return row["id"]
    if not rows:
        raise LLMEngineError(f"{gateway.url} has no endpoint that can chat.")
    states = "; ".join(
        f"{row['id']} is {row['status']}"
        + (f" ({row['status_reason']})" if row["status_reason"] else "")
        for row in rows
    )
    raise LLMEngineError(f"no endpoint can chat now: {states}.")


def once(chat: Chat, prompt: str) -> None:
    """One question, one answer; plain text where stdout is no terminal."""
    answer = chat.ask(prompt, _writer())
    _finish(answer)


def converse(chat: Chat) -> None:
    """Until /exit or Ctrl-D."""
    try:
        import readline  # noqa: F401 - gives input() its line editing and the arrow keys
    except ImportError:
        pass
    console.say(f"{chat.model} at {chat.gateway.url}. {HELP}", "dim")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            chat.reset()
            console.say("The conversation starts anew.", "dim")
        elif line.startswith("/") and " " not in line:
            console.say(HELP, "dim")
        elif line:
            _turn(chat, line)


def _turn(chat: Chat, line: str) -> None:
    try:
        _finish(chat.ask(line, _writer()))
    except KeyboardInterrupt:
        console.say("\n(stopped)", "dim")
    except LLMEngineError as error:
        print()
        console.complain(str(error))


def _writer() -> Write:
    terminal = sys.stdout.isatty()

    def write(text: str, thought: bool) -> None:
        if terminal:
            text = console.plain(text)
            text = f"{DIM}{text}{UNDIM}" if thought else text
        elif thought:
            return  # a pipe gets the answer and nothing else
        sys.stdout.write(text)
        sys.stdout.flush()

    return write


def _finish(answer: Answer) -> None:
    if not answer.text.endswith("\n"):
        print()
    if sys.stdout.isatty():
        console.say(f"({answer.summary})", "dim")
