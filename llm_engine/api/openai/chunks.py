"""The chunks of a streamed chat completion, put together as if it had not been. No I/O."""

from typing import Any

Object = dict[str, Any]

#: Of a chunk: what is no part of the answer, or is put together here.
_NOT_HEAD = frozenset(("choices", "object", "obfuscation", "usage"))
_NOT_REST = frozenset(("delta", "index", "logprobs"))


class Chunks:
    """`add` each of them, then `whole`."""

    def __init__(self) -> None:
        self._head: Object = {}
        self._usage: Object | None = None
        self._choices: dict[int, _Choice] = {}

    def add(self, chunk: Object) -> None:
        """Raises KeyError, TypeError or AttributeError for what is no chunk."""
        for key, value in chunk.items():
            if key not in _NOT_HEAD and value is not None:
                self._head.setdefault(key, value)
        self._usage = (
            chunk.get("usage") or self._usage
        )  # some tell a running total: the last counts
        for choice in chunk["choices"]:
            self._choices.setdefault(choice["index"], _Choice()).add(choice)

    def whole(self) -> Object:
        choices = [{"index": i} | self._choices[i].whole() for i in sorted(self._choices)]
        return self._head | {
            "object": "chat.completion",
            "choices": choices,
            "usage": self._usage,
        }


class _Choice:
    def __init__(self) -> None:
        self._texts: dict[str, list[str]] = {}  # content, refusal, reasoning
        self._calls: dict[int, _ToolCall] = {}
        self._message: Object = {}  # what comes in one piece
        self._logprobs: dict[str, list[Any]] | None = None
        self._rest: Object = {"finish_reason": None}

    def add(self, choice: Object) -> None:
        for key, value in (choice.get("delta") or {}).items():
            if key == "tool_calls":
                for call in value or ():
                    # A server that gives no index gives whole calls.
                    place = call.get("index", len(self._calls))
                    self._calls.setdefault(place, _ToolCall()).add(call)
            elif key != "role" and isinstance(value, str):
                self._texts.setdefault(key, []).append(value)
            elif key != "role":
                _put(self._message, key, value)
        if choice.get("logprobs") is not None:
            self._logprobs = self._logprobs or {"content": []}
            for key, tokens in choice["logprobs"].items():
                self._logprobs.setdefault(key, []).extend(tokens or ())
        for key, value in choice.items():
            if key not in _NOT_REST:
                _put(self._rest, key, value)

    def whole(self) -> Object:
        texts = {key: "".join(pieces) for key, pieces in self._texts.items()}
        message = {"role": "assistant", "content": None, **self._message}
        message |= {key: text for key, text in texts.items() if text or key == "content"}
        if self._calls:
            message["tool_calls"] = [self._calls[i].whole() for i in sorted(self._calls)]
        logprobs = self._logprobs
        if logprobs is not None:
            logprobs = {
                k: tokens or ([] if k == "content" else None) for k, tokens in logprobs.items()
            }
        return {"message": message, "logprobs": logprobs, **self._rest}


class _ToolCall:
    def __init__(self) -> None:
        self._call: Object = {"type": "function"}
        self._function: Object = {}
        self._arguments: list[str] = []

    def add(self, piece: Object) -> None:
        for key, value in piece.items():
            if key not in ("function", "index") and value:
                self._call[key] = value
        for key, value in (piece.get("function") or {}).items():
            if key == "arguments":
                self._arguments.append(value or "")
            elif value:
                self._function[key] = value

    def whole(self) -> Object:
        function = self._function | {"arguments": "".join(self._arguments)}
        return self._call | {"function": function}


def _put(into: Object, key: str, value: Any) -> None:
    """Lists grow; of anything else the last one counts."""
    if isinstance(value, list) and isinstance(into.get(key), list):
        into[key] += value
    elif value is not None:
        into[key] = value
