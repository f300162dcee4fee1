"""Scale's batches, row by row: from its prompts and items to the bodies that engines take, and from
lines of results to the elements of its output. No I/O.

Bodies name no model: that is the batch's to say. What only an engine can judge
is not looked at here; it becomes the row's own error.
"""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import orjson
from pydantic import Field

from llm_engine.api.cold import check
from llm_engine.api.llm_engine_api.answers import output
from llm_engine.api.llm_engine_api.completions import checked, engine_body
from llm_engine.api.llm_engine_api.fields import Completion, Text
from llm_engine.api.llm_engine_api.vllm_options import refuse, within
from llm_engine.errors import APIError, InvalidRequest

Body = dict[str, Any]

#: What an input and its output look like: BatchOptions.output_form.
V1, V2 = "scale_v1", "scale_v2"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
#: Stop sequences of a row: OpenAI's limit, for each row is one of its requests.
MOST_STOPS = 4

_GUIDES = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
#: Not an item's to say: the batch has one model, and its rows don't stream.
_NOT_ITS_OWN = frozenset(("model", "stream", "stream_options"))
#: Fields that the client always sends, where they ask for nothing.
_NOTHING = {
    "best_of": 1,
    "echo": False,
    "priority": 0,
    "stop_token_ids": [],
    "use_beam_search": False,
}


class _Prompts(Completion):
    """V1's content: the fields of a completion, for all of its prompts."""

    prompt: None = None  # type: ignore[assignment]
    prompts: Annotated[list[Text], Field(min_length=1, fail_fast=True)]


def bodies(document: Any, form: str, where: str = "content") -> Iterator[Body]:
    """A whole document, V1's object or V2's array. Raises InvalidRequest, for V1 before the first
    body and for V2 where it meets the item."""
    if isinstance(document, dict):
        yield from of_prompts(document, where)
    elif isinstance(document, list) and form == V2:
        if not document:
            raise refuse(where, "it is empty.")
        for number, item in enumerate(document):
            yield convert(item, form, f"{where}[{number}]")
    else:
        raise refuse(where, _EXPECTED[form])


_EXPECTED = {
    V1: "expected a JSON object with 'prompts'.",
    V2: "expected a JSON array of completion or chat items, or an object with 'prompts'.",
}


def of_prompts(content: Body, where: str = "content") -> Iterator[Body]:
    """One body a prompt. Raises InvalidRequest before the first."""
    try:
        asked = check(_Prompts, content)
        shared = checked(asked.model_dump(exclude={"prompts"}) | {"prompt": asked.prompts[0]})
    except InvalidRequest as error:
        raise within(where, error) from None
    if len(shared.stop_sequences or ()) > MOST_STOPS:
        raise refuse(f"{where}.stop_sequences", f"a batch's row has at most {MOST_STOPS}.")
    body = engine_body(shared, "", stream=False, ours=True)
    body = {name: value for name, value in body.items() if name not in _NOT_ITS_OWN}
    return (body | {"prompt": prompt} for prompt in asked.prompts)


def convert(item: Any, form: str, where: str = "item") -> Body:
    """One item of V2's array. Raises InvalidRequest, with `where` it is."""
    if form != V2 or not isinstance(item, dict):
        raise refuse(where, _EXPECTED[form] if form != V2 else "expected a JSON object.")
    given = {k: v for k, v in item.items() if v is not None and v != _NOTHING.get(k, None)}
    if ("prompt" in given) == ("messages" in given):
        raise refuse(where, _BOTH if "prompt" in given else _NEITHER)
    body = {name: value for name, value in given.items() if name not in _NOT_ITS_OWN}
    if "messages" in body:
        try:
            body["messages"] = _without_nulls(body["messages"])
        except RecursionError:
            raise refuse(where, "it is nested too deeply.") from None
    _set_format(body)
    guides = [name for name in _GUIDES if name in body]
    if len(guides) > 1:
        raise refuse(f"{where}.{guides[1]}", f"set only one of {', '.join(guides)}.")
    for name in guides:
        body["structured_outputs"] = {name.removeprefix("guided_"): body.pop(name)}
    return body


_BOTH = "it has both a 'prompt' and 'messages'. Keep one."
_NEITHER = (
    "it has neither a 'prompt' nor 'messages'. Version 0.0.0b48 of the client drops the messages "
    "of chat items: use scale-llm-engine==0.0.0b45, or put the items into a file and name it in "
    "'input_data_path'."
)


def path_of(body: Body) -> str:
    """Which endpoint a body is for; all rows of a batch go to one."""
    return CHAT if "messages" in body else COMPLETIONS


def lines(bodies: Iterable[Body], model: str, most: int) -> Iterator[bytes]:
    """All lines of a batch's input. Raises InvalidRequest for more than `most`, and for prompts
    among messages."""
    path = None
    for number, body in enumerate(bodies):
        if number >= most:
            raise refuse("content", f"a batch has at most {most} rows here (batches.max_rows).")
        path = path or path_of(body)
        if path_of(body) != path:
            raise refuse(f"content[{number}]", "a batch has either prompts or messages, not both.")
        yield line(number, body, model)


def line(number: int, body: Body, model: str) -> bytes:
    """Of a batch's input, in OpenAI's form, with its newline. Raises InvalidRequest where it is
    nested too deeply."""
    row = {
        "custom_id": str(number),
        "method": "POST",
        "url": path_of(body),
        "body": {"model": model} | body,
    }
    try:
        return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # orjson's own error is one
        raise refuse(f"content[{number}]", "it is nested too deeply.") from None


def element(result: Body, form: str) -> Body:
    """Of the output's array, for a line of results: V1's CompletionOutput or an object of OpenAI's;
    for a row that failed {"error": {message, type, param, code}}."""
    failure, response = result.get("error"), result.get("response")
    if failure or not response:
        return _error(failure or {})
    body = response["body"]
    if response["status_code"] != 200:
        told = body.get("error") if isinstance(body, dict) else None
        return _error(told if isinstance(told, dict) else {})
    if form != V1:
        return body
    try:
        return output(body, log_probs=bool(body["choices"][0].get("logprobs")))
    except APIError as error:
        return error.body()
    except (KeyError, IndexError, TypeError):  # an external server's: anything goes
        return _error({"message": "The model's answer has no text, or does not say what it used."})


def _error(told: Body) -> Body:
    message = told.get("message") or "This request failed."
    return {
        "error": {
            "message": message,
            "type": told.get("type") or "server_error",
            "param": told.get("param"),
            "code": told.get("code"),
        }
    }


def _set_format(body: Body) -> None:
    """The client calls a JSON schema `schema_`."""
    form = body.get("response_format")
    wanted = form.get("json_schema") if isinstance(form, dict) else None
    if isinstance(wanted, dict) and "schema_" in wanted:
        named = {"schema" if name == "schema_" else name: each for name, each in wanted.items()}
        body["response_format"] = form | {"json_schema": named}


def _without_nulls(value: Any) -> Any:
    """The client sends every field of a message, and null for those that were not given."""
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    return value
