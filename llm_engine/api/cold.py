"""What is not on the token path: a FastAPI application a dialect, and how its routes read and fail.

Blocking work (the store) goes through `asyncio.to_thread`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from llm_engine import __version__
from llm_engine.api.http import require
from llm_engine.errors import (
    APIError,
    BodyTooLarge,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
)
from llm_engine.nesting import is_too_deep
from llm_engine.records import Principal, Scope

SERVER_ERROR = "The server had an error while processing your request."
PRINCIPAL = "llm_engine.principal"  # key of an ASGI scope
LARGEST_BODY = 2**20  # bytes of a request that is not one to a model
Render = Callable[[APIError], bytes]
Shape = TypeVar("Shape", bound=BaseModel)


def build_cold(render: Render) -> FastAPI:
    """An application whose every error is in the dialect's own form."""
    app = FastAPI(title="llm-engine", version=__version__, redirect_slashes=False, openapi_url=None)

    def answer(error: APIError) -> Response:
        headers = {"retry-after": str(error.retry_after)} if error.retry_after else None
        return Response(render(error), error.status, headers, media_type="application/json")

    @app.exception_handler(APIError)
    async def ours(request: Request, error: APIError) -> Response:
        return answer(error)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        return answer(InternalError(SERVER_ERROR))  # Starlette logs it

    @app.exception_handler(HTTPException)
    async def framework(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path}"
        if error.status_code == 404:
            return answer(NotFound(f"Invalid URL ({where})", code="unknown_url"))
        if error.status_code == 405:
            return answer(MethodNotAllowed(f"Not allowed to {where}."))
        return answer(InvalidRequest(str(error.detail), status=error.status_code))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(first_problem(error.errors()))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    return app


def principal(request: Request) -> Principal:
    """For `Depends`: who asks."""
    return request.scope[PRINCIPAL]


def having(scope: Scope) -> Callable[[Request], Principal]:
    """For `Depends`: who asks, if their key has the scope."""

    def check(request: Request) -> Principal:
        who = principal(request)
        require(who, scope)
        return who

    return check


async def read_body(request: Request, largest: int = LARGEST_BODY) -> bytes:
    """Raises BodyTooLarge. `largest`: LARGEST_BODY, or gateway.max_body_bytes."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > largest:
            where = " (gateway.max_body_bytes)" if largest != LARGEST_BODY else ""
            raise BodyTooLarge(f"The request body is larger than {largest} bytes{where}.")
    return bytes(body)


async def read_json(request: Request, largest: int = LARGEST_BODY) -> dict[str, Any]:
    """The body as a JSON object. Raises InvalidRequest, and as `read_body` does."""
    return json_object(await read_body(request, largest))


def json_object(body: bytes) -> dict[str, Any]:
    """Raises InvalidRequest."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}.") from None
    if not isinstance(data, dict):
        raise InvalidRequest("The request body must be a JSON object.", code="invalid_type")
    if is_too_deep(data, body):
        raise InvalidRequest("The request body is nested too deeply.")
    return data


def check(shape: type[Shape], data: Any) -> Shape:
    """`data` as the pydantic model `shape`. Raises InvalidRequest for the first problem."""
    try:
        return shape.model_validate(data)
    except ValidationError as error:
        raise first_problem(error.errors(include_url=False)) from None


def first_problem(errors: Any) -> InvalidRequest:
    first = errors[0]
    where = [part for part in first["loc"] if part not in ("body", "query", "path")]
    param = ""
    for part in where:
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else str(part)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message, code = f"Unknown parameter: '{param}'.", "unknown_parameter"
    elif first["type"] == "missing":
        message, code = f"Missing required parameter: '{param}'.", "missing_required_parameter"
    else:
        message = f"Invalid '{param}': {message}." if param else f"{message}."
        code = "invalid_value"
    return InvalidRequest(message.replace("..", "."), param=param or None, code=code)
