"""How many tokens a request would be for its model."""

from dataclasses import replace

from llm_engine.api.dispatch import Dispatcher, served_by
from llm_engine.api.requests import Kind
from llm_engine.api.responses.asking import Whole, ask, stays
from llm_engine.api.responses.context import context
from llm_engine.api.responses.engine import engine_request
from llm_engine.api.responses.operations import NewResponse
from llm_engine.errors import Unavailable
from llm_engine.ids import new_id
from llm_engine.records import Principal
from llm_engine.responses import ResponseRecord
from llm_engine.services import Services
from llm_engine.statuses import ResponseState

#: vLLM's: what a request becomes, and nothing is generated.
_RENDER = "/v1/responses/render"


async def count_tokens(
    services: Services, dispatcher: Dispatcher, who: Principal, new: NewResponse
) -> int:
    """With all that came before. Raises APIError as a request to the model does."""
    await services.route(who, new.model, Kind.RESPONSES.task)
    before = await context(services, who, new.previous, new.conversation)
    record = ResponseRecord(
        new_id("resp"), who.owner, new.dialect, new.model, ResponseState.QUEUED, 0, 0,
        request=new.request, input=new.input,
    )  # fmt: skip
    request = replace(engine_request(record, before, False), path=_RENDER)
    form = Whole()
    call = await ask(dispatcher, who, request, form, stays)
    if served_by(call) is not None:
        raise Unavailable(
            f"The model '{new.model}' cannot count now, and its fallback's tokens are others.",
            param="model",
            retry_after=services.settings.gateway.retry_after_s,
        )
    return len(form.found["token_ids"])
