"""A response as a request to an engine, which keeps nothing: with all that came before. No I/O."""

import orjson

from llm_engine.api.requests import EngineRequest, Kind
from llm_engine.api.responses.context import Context
from llm_engine.responses import ResponseRecord

PATH = "/v1/responses"
#: In a record's `request`: what engines are asked instead. A caller's own field of that name never
#: gets there.
CHANGES = "engine"
#: Of a request's fields, those that engines are not asked: they are about the response.
_OURS = frozenset(
    """
    background conversation engine include_obfuscation max_tool_calls metadata previous_response_id
    prompt_cache_key prompt_cache_retention safety_identifier service_tier store stream
    stream_options user
""".split()
)


def engine_request(record: ResponseRecord, before: Context, stream: bool) -> EngineRequest:
    asked = record.request | record.request.get(CHANGES, {})
    body = {k: v for k, v in asked.items() if k not in _OURS and v is not None} | {
        "model": record.model,
        "input": [*before.items, *record.input],
        "request_id": record.id,
        "store": False,
        "stream": stream,
    }
    session = before.session or record.request.get("prompt_cache_key") or record.id
    written = orjson.dumps(body)
    return EngineRequest(Kind.RESPONSES, PATH, record.model, stream, written, True, session=session)
