"""A conversation of a training file: checked, and put into the form that chat templates take. Pure.

Templates want what engines give them when they serve: text as one string, a tool call's arguments
as an object, and the deprecated functions as tools.
"""

from collections.abc import Iterable
from typing import Any

import orjson

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_FIELDS = ("messages", "tools", "parallel_tool_calls", "functions")
_MESSAGE_FIELDS = {
    "assistant": ("role", "content", "name", "weight", "tool_calls", "function_call"),
    "tool": ("role", "content", "name", "tool_call_id"),
}
_OTHER_FIELDS = ("role", "content", "name")


class Wrong(Exception):
    """Something is wrong with a line; the text says what and where in it."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


def conversation(given: dict[str, Any]) -> dict[str, Any]:
    """{messages, tools} of a supervised example. Raises Wrong."""
    only(given, _FIELDS, "")
    example = _messages_and_tools(given, "")
    last = example["messages"][-1]
    if last["role"] != "assistant":
        raise Wrong(f"The last message must be the assistant's, not the {last['role']}'s.")
    if not any(_learned(message) for message in example["messages"]):
        raise Wrong("No assistant message has a weight of 1 and something to learn.")
    return example


def question(given: dict[str, Any], where: str) -> dict[str, Any]:
    """{prompt, tools}: all but the answers of a preference. Raises Wrong."""
    only(given, _FIELDS, where)
    example = _messages_and_tools(given, where)
    messages = example.pop("messages")
    if messages[-1]["role"] == "assistant":
        raise Wrong(f"The last of '{where}messages' must not be the assistant's.")
    for message in messages:
        message.pop("weight", None)
    return {"prompt": messages} | example


def answer(given: Any, where: str) -> Message:
    """The one message of `preferred_output` and its like. Raises Wrong."""
    if not isinstance(given, list) or len(given) != 1:
        raise Wrong(f"'{where}' must be a list of one message.")
    message = _message(given[0], f"{where}[0]")
    if message["role"] != "assistant":
        raise Wrong(f"'{where}[0].role' must be assistant.")
    message.pop("weight", None)
    if not _learned(message):
        raise Wrong(f"'{where}[0]' is empty.")
    return message


def only(given: dict[str, Any], known: Iterable[str], where: str) -> None:
    """What would be ignored is refused: it may be a field that is spelled wrongly."""
    for name, value in given.items():
        if name not in known and value is not None:
            raise Wrong(f"'{where}{str(name)[:80]}' is not known here.")


def _learned(message: Message) -> bool:
    if message["role"] != "assistant" or message.get("weight", 1) == 0:
        return False
    return bool(message["content"].strip() or message.get("tool_calls"))


def _messages_and_tools(given: dict[str, Any], where: str) -> dict[str, Any]:
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Wrong(f"'{where}messages' must be a list of messages.")
    checked = [_message(one, f"{where}messages[{n}]") for n, one in enumerate(messages)]
    example: dict[str, Any] = {"messages": checked}
    tools = _tools(given, where)
    if tools:
        example["tools"] = tools
    if not isinstance(given.get("parallel_tool_calls"), bool | None):
        raise Wrong(f"'{where}parallel_tool_calls' must be true or false.")
    return example


def _tools(given: dict[str, Any], where: str) -> list[dict[str, Any]]:
    tools, name = given.get("tools"), f"{where}tools"
    if tools is None and given.get("functions") is not None:
        functions, name = given["functions"], f"{where}functions"
        if not isinstance(functions, list):
            raise Wrong(f"'{name}' must be a list.")
        tools = [{"type": "function", "function": function} for function in functions]
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise Wrong(f"'{name}' must be a list.")
    for number, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type", "function") != "function":
            raise Wrong(f"'{name}[{number}]' must be a function.")
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise Wrong(f"'{name}[{number}]' must have a name.")
    return tools


def _message(given: Any, where: str) -> Message:
    if not isinstance(given, dict):
        raise Wrong(f"'{where}' must be an object.")
    role = given.get("role")
    if role not in ROLES:
        known = ", ".join(ROLES)
        raise Wrong(f"'{where}.role' must be one of {known}, not {_shown(role)}.")
    only(given, _MESSAGE_FIELDS.get(role, _OTHER_FIELDS), f"{where}.")
    message: Message = {"role": {"function": "tool", "developer": "system"}.get(role, role)}
    for name in ("name", "tool_call_id"):
        if given.get(name) is not None:
            if not isinstance(given[name], str):
                raise Wrong(f"'{where}.{name}' must be a string.")
            message[name] = given[name]
    calls = _calls(given, where) if role == "assistant" else []
    message["content"] = _content(given.get("content"), where, needed=not calls)
    if calls:
        message["tool_calls"] = calls
    weight = given.get("weight")
    if weight is not None:
        if isinstance(weight, bool) or weight not in (0, 1):
            raise Wrong(f"'{where}.weight' must be 0 or 1, not {_shown(weight)}.")
        message["weight"] = int(weight)
    return message


def _content(content: Any, where: str, needed: bool) -> str:
    if content is None and not needed:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Wrong(f"'{where}.content' must be a string.")
    texts = []
    for number, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise Wrong(f"'{where}.content[{number}]' is no text: only text can be learned.")
        if not isinstance(part.get("text"), str):
            raise Wrong(f"'{where}.content[{number}].text' must be a string.")
        texts.append(part["text"])
    return "\n".join(texts)  # as vLLM joins them


def _calls(given: dict[str, Any], where: str) -> list[dict[str, Any]]:
    calls, name = given.get("tool_calls"), f"{where}.tool_calls"
    if calls is None and given.get("function_call") is not None:
        calls, name = [{"function": given["function_call"]}], f"{where}.function_call"
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise Wrong(f"'{name}' must be a list.")
    return [_call(call, f"{name}[{number}]") for number, call in enumerate(calls)]


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise Wrong(f"'{where}' must be a function call.")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise Wrong(f"'{where}.function.name' must name a function.")
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments or "{}")
        except orjson.JSONDecodeError:
            raise Wrong(f"'{where}.function.arguments' is not valid JSON.") from None
    if not isinstance(arguments, dict):
        raise Wrong(f"'{where}.function.arguments' must be a JSON object.")
    made: dict[str, Any] = {
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }
    if isinstance(call.get("id"), str):
        made["id"] = call["id"]
    return made


def _shown(value: Any) -> str:
    return repr(value)[:40]
