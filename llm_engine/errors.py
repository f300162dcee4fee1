"""Every error that llm-engine raises on purpose.

LLMEngineError
├── ConfigError               the configuration file is wrong; names the path and the remedy
├── StartupError              something the system needs is missing or did not start
├── EngineError               an engine process failed; `reason` is one sentence for an operator
├── LeaseLost                 another process works on the record by now; stop, and write nothing
└── APIError                  becomes an answer in the dialect of the caller
    ├── InvalidRequest        400  the request is wrong; `param` says where
    ├── InvalidKey            401
    ├── Forbidden             403  the key is valid and lacks the scope
    ├── NotFound              404  unknown model, path or object, or another owner's
    ├── MethodNotAllowed      405
    ├── Conflict              409  the name is taken, or another operation is under way
    ├── BodyTooLarge          413
    ├── Overloaded            429  the queue is full; carries Retry-After
    ├── InternalError         500
    │   └── EngineFailed           an engine failed at the request; 503 where it was lost over it
    ├── UpstreamFailed        502  an external model answered with nonsense or an error of its own
    │   └── UpstreamAway           it cannot be reached, or says itself that it cannot answer now
    ├── Unavailable           503  no replica can answer now; carries Retry-After
    │   ├── StoreUnavailable       the database does not answer; models do
    │   └── StorageUnavailable     bytes cannot be read or written now, or there is no room
    └── TookTooLong           504  no byte of the answer within the limit
"""


class LLMEngineError(Exception):
    """Base of all; its text is fit to be shown to a user as it is."""


class ConfigError(LLMEngineError):
    pass


class StartupError(LLMEngineError):
    pass


class EngineError(LLMEngineError):
    pass


class LeaseLost(LLMEngineError):
    pass


class APIError(LLMEngineError):
    """An error answer: HTTP status, and OpenAI's four fields `message`, `type`, `param`, `code`.

    `retry_after` (seconds) becomes a Retry-After header.
    """

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.status = status or type(self).status
        self.retry_after = retry_after

    def body(self) -> dict[str, dict[str, str | None]]:
        """The OpenAI error object."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class InvalidRequest(APIError):
    status = 400
    type = "invalid_request_error"


class InvalidKey(APIError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class Forbidden(APIError):
    status = 403
    type = "invalid_request_error"
    code = "insufficient_permissions"


class NotFound(APIError):
    status = 404
    type = "invalid_request_error"


class MethodNotAllowed(APIError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class Conflict(APIError):
    status = 409
    type = "invalid_request_error"
    code = "conflict"


class BodyTooLarge(APIError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class Overloaded(APIError):
    status = 429
    type = "requests"
    code = "rate_limit_exceeded"


class InternalError(APIError):
    pass


class EngineFailed(InternalError):
    pass


class UpstreamFailed(APIError):
    status = 502
    code = "upstream_failed"


class UpstreamAway(UpstreamFailed):
    code = "upstream_unavailable"


class Unavailable(APIError):
    status = 503
    code = "model_not_ready"


class StoreUnavailable(Unavailable):
    code = "store_unavailable"


class StorageUnavailable(Unavailable):
    code = "storage_unavailable"


class TookTooLong(APIError):
    status = 504
    code = "timeout"
