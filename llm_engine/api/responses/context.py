"""What came before a response: the chain that it goes on from, or its conversation."""

import asyncio
from dataclasses import dataclass, field

from llm_engine.errors import InvalidRequest, NotFound
from llm_engine.records import Principal
from llm_engine.responses import Item, ResponseRecord
from llm_engine.services import Services
from llm_engine.statuses import ResponseState
from llm_engine.store.conversations import no_conversation

PARAM = "previous_response_id"
_GOOD = (ResponseState.COMPLETED, ResponseState.INCOMPLETE)


@dataclass(frozen=True, slots=True)
class Context:
    """Items, oldest first. `session`: what requests with the same beginning have in common."""

    items: list[Item] = field(default_factory=list)
    session: str | None = None
    until: int | None = None  # the serial of the conversation's last item that is in here


async def context(
    services: Services, who: Principal, previous: str | None, conversation: str | None
) -> Context:
    """For a new response. Raises InvalidRequest or NotFound."""
    if conversation is not None:
        return await _of_conversation(services, who, conversation, None)
    if previous is not None:
        return await _of_chain(services, who, previous)
    return Context()


async def context_of(services: Services, who: Principal, record: ResponseRecord) -> Context:
    """As it was when the response was made. Raises as `context`, for what was deleted since."""
    if record.conversation is not None:
        until = record.context_until or 0
        return await _of_conversation(services, who, record.conversation, until)
    return await context(services, who, record.previous, None)


async def _of_conversation(
    services: Services, who: Principal, conversation: str, until: int | None
) -> Context:
    def read() -> Context:
        conversations = services.store.conversations
        if not who.sees(conversations.get(conversation).owner):
            raise no_conversation(conversation)
        most = services.settings.responses.max_conversation_items
        most_bytes = services.settings.gateway.max_body_bytes
        placed, more = conversations.items(
            conversation, limit=most, most_bytes=most_bytes, until=until
        )
        if more and len(placed) < most:  # it is not their number
            raise InvalidRequest(
                f"The conversation is over {most_bytes} bytes (gateway.max_body_bytes). Begin "
                "another one, with what matters of it.",
                param="conversation",
                code="context_length_exceeded",
            )
        if more:
            raise InvalidRequest(
                f"The conversation has over {most} items (responses.max_conversation_items). Begin "
                "another one.",
                param="conversation",
                code="conversation_full",
            )
        last = placed[-1].serial if placed else 0
        return Context([each.data for each in placed], conversation, last)

    return await asyncio.to_thread(read)


async def _of_chain(services: Services, who: Principal, previous: str) -> Context:
    longest = services.settings.responses.max_chain
    bounds = (longest, services.settings.gateway.max_body_bytes)
    try:
        chain = await asyncio.to_thread(services.store.responses.chain, previous, *bounds)
    except NotFound:
        raise _not_found(previous) from None
    last, first = chain[-1], chain[0]
    if not who.sees(last.owner):
        raise _not_found(previous)
    if last.state not in _GOOD:
        raise InvalidRequest(
            f"The previous response '{previous}' is {last.state}: only one that has come to its "
            "end can be gone on from.",
            param=PARAM,
            code="invalid_value",
        )
    if first.previous is not None:
        if len(chain) >= longest:
            raise InvalidRequest(
                f"Over {longest} responses go before this one (responses.max_chain). Begin anew, "
                "with what matters of them as 'input'.",
                param=PARAM,
                code="invalid_value",
            )
        raise _not_found(first.previous, f", which '{previous}' goes on from, is deleted")
    items = [item for each in chain for item in (*each.input, *each.output)]
    if first.conversation is None:
        return Context(items, first.id)
    before = await _of_conversation(services, who, first.conversation, first.context_until or 0)
    return Context([*before.items, *items], first.conversation)


def _not_found(response: str, why: str = " not found") -> InvalidRequest:
    return InvalidRequest(
        f"Previous response with id '{response[:100]}'{why}.",
        param=PARAM,
        code="previous_response_not_found",
    )
