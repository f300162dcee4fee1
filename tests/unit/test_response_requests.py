"""What engines are asked for a response, out of what its caller has sent."""

from typing import Any

import orjson
import pytest

from llm_engine.api.openai import responses as openai
from llm_engine.api.responses.context import Context
from llm_engine.api.responses.engine import engine_request
from llm_engine.api.responses.operations import NewResponse
from llm_engine.api.sference import requests as sference
from llm_engine.responses import ResponseRecord
from llm_engine.statuses import ResponseState


def of_sference(body: bytes) -> NewResponse:
    return sference.parse(body, legacy=False)


def asked(new: NewResponse) -> dict[str, Any]:
    record = ResponseRecord(
        "resp_1", "ann", "openai", "m", ResponseState.QUEUED, 0.0, 0.0,
        request=new.request, input=new.input,
    )  # fmt: skip
    return orjson.loads(engine_request(record, Context(), stream=False).body)


@pytest.mark.parametrize("parse", [openai.parse, of_sference], ids=["openai", "sference"])
@pytest.mark.parametrize(
    "given", [{"priority": -5, "temperature": 99, "kv_transfer_params": {}}, "x", None], ids=str
)
def test_no_field_gets_past_the_checks_under_the_name_that_changes_are_kept_by(parse, given):
    body = {"model": "m", "input": "hi", "temperature": 0.5, "engine": given}
    told = asked(parse(orjson.dumps(body)))
    fields = {"model", "input", "request_id", "store", "stream", "temperature"}
    assert told.keys() - {"include_reasoning"} == fields and told["temperature"] == 0.5


@pytest.mark.parametrize("parse", [openai.parse, of_sference], ids=["openai", "sference"])
@pytest.mark.parametrize(("wanted", "sent"), [(2, 3), (20, 20), (0, 0)])
def test_engines_are_asked_for_one_more_of_the_top_than_is_shown(parse, wanted, sent):
    """They count the sampled token as one of them."""
    new = parse(orjson.dumps({"model": "m", "input": "hi", "top_logprobs": wanted}))
    assert asked(new)["top_logprobs"] == sent
    assert new.request["top_logprobs"] == wanted
