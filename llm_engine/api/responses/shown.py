"""A response as OpenAI's API shows it, also inside of its events: every key is there. No I/O."""

from typing import Any

from llm_engine.responses import ResponseRecord
from llm_engine.statuses import ResponseState

#: What is shown of a request that says nothing else.
_DEFAULTS: dict[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "prompt": None,
    "prompt_cache_key": None,
    "safety_identifier": None,
    "temperature": 1.0,
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
}
_DETAILS = {"input_tokens_details": "cached_tokens", "output_tokens_details": "reasoning_tokens"}


def show(record: ResponseRecord, store: bool = True) -> dict[str, Any]:
    asked = {key: value for key, value in record.request.items() if value is not None}
    reasoning = {"effort": None, "summary": None} | asked.get("reasoning", {})
    text = {"format": {"type": "text"}} | asked.get("text", {})
    good = record.state is ResponseState.COMPLETED
    talk = record.conversation
    return {
        "id": record.id,
        "object": "response",
        "created_at": int(record.created_at),
        "completed_at": int(record.ended_at) if good and record.ended_at else None,
        "status": str(record.state),
        "background": record.background,
        "error": record.error,
        "incomplete_details": {"reason": record.incomplete} if record.incomplete else None,
        "model": record.model,
        "output": record.output,
        "previous_response_id": record.previous,
        "conversation": {"id": talk} if talk is not None else None,
        "reasoning": reasoning,
        "service_tier": "default",
        "store": store,
        "text": text,
        "usage": record.usage,
        **{key: asked.get(key, value) for key, value in _DEFAULTS.items()},
    }


def usage_of(told: Any) -> dict[str, Any] | None:
    """An engine's, with OpenAI's keys and no others."""
    if not isinstance(told, dict):
        return None
    counts = {name: int(told.get(name) or 0) for name in ("input_tokens", "output_tokens")}
    for details, name in _DETAILS.items():
        counts[details] = {name: int((told.get(details) or {}).get(name) or 0)}  # type: ignore[assignment]
    return counts | {"total_tokens": counts["input_tokens"] + counts["output_tokens"]}
