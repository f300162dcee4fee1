"""/v1/conversations: items that responses read and add to."""

import asyncio
import time
from typing import Annotated, Any, Literal, Required

from fastapi import APIRouter, Depends, Query, Request
from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

from llm_engine.api.cold import having, read_json
from llm_engine.api.openai import problems
from llm_engine.api.openai.fields import Metadata
from llm_engine.api.openai.files import list_row
from llm_engine.api.responses import items
from llm_engine.ids import new_id
from llm_engine.records import Principal, Scope
from llm_engine.responses import Conversation, Item
from llm_engine.services import Services
from llm_engine.store.conversations import no_conversation

Asker = Annotated[Principal, Depends(having(Scope.INFERENCE))]
Values = dict[str, Any]

PATH = "/v1/conversations"
MOST_ITEMS = 20  # that come in one request, as OpenAI has it


class _Closed(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # type: ignore[misc]


_Items = Annotated[list[dict[str, Any]], Field(max_length=MOST_ITEMS)]


class NewConversation(_Closed, total=False):
    items: _Items | None
    metadata: Metadata | None


class ChangedConversation(_Closed, total=False):
    metadata: Required[Metadata | None]


class NewItems(_Closed, total=False):
    items: Required[Annotated[_Items, Field(min_length=1)]]


_NEW, _CHANGED, _ITEMS = map(TypeAdapter, (NewConversation, ChangedConversation, NewItems))


def build_router(services: Services) -> APIRouter:
    router = APIRouter()
    store = services.store.conversations
    most = services.settings.responses.max_conversation_items
    largest = services.settings.gateway.max_body_bytes

    async def own(who: Principal, conversation: str) -> Conversation:
        found = await asyncio.to_thread(store.get, conversation)
        if not who.sees(found.owner):
            raise no_conversation(conversation)
        return found

    @router.post(PATH)
    async def create(request: Request, who: Asker) -> Values:
        asked = problems.parse(_NEW, await read_json(request, largest))
        first = items.whole(asked.get("items") or [], "items")
        metadata = asked.get("metadata") or {}
        made = Conversation(new_id("conv"), who.owner, time.time(), metadata)
        await asyncio.to_thread(store.add, made, first)
        return row(made)

    @router.get(PATH + "/{conversation}")
    async def retrieve(conversation: str, who: Asker) -> Values:
        return row(await own(who, conversation))

    @router.post(PATH + "/{conversation}")
    async def update(conversation: str, request: Request, who: Asker) -> Values:
        asked = problems.parse(_CHANGED, await read_json(request))
        await own(who, conversation)
        changed = asked["metadata"] or {}
        return row(await asyncio.to_thread(store.change, conversation, changed))

    @router.delete(PATH + "/{conversation}")
    async def delete(conversation: str, who: Asker) -> Values:
        await own(who, conversation)
        await asyncio.to_thread(store.delete, conversation)
        return {"id": conversation, "object": "conversation.deleted", "deleted": True}

    @router.post(PATH + "/{conversation}/items")
    async def add_items(conversation: str, request: Request, who: Asker) -> Values:
        asked = problems.parse(_ITEMS, await read_json(request, largest))
        await own(who, conversation)
        new = items.whole(asked["items"], "items")
        await asyncio.to_thread(store.add_items, conversation, new, most)
        return list_row(new, False)

    @router.get(PATH + "/{conversation}/items")
    async def list_items(
        conversation: str,
        who: Asker,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> Values:
        await own(who, conversation)

        def read() -> Values:
            placed, more = store.items(
                conversation,
                limit=limit,
                most_bytes=largest,
                after=after,
                newest_first=order == "desc",
            )
            return list_row([each.data for each in placed], more)

        return await asyncio.to_thread(read)

    @router.get(PATH + "/{conversation}/items/{item}")
    async def retrieve_item(conversation: str, item: str, who: Asker) -> Item:
        await own(who, conversation)
        return await asyncio.to_thread(store.item, conversation, item)

    @router.delete(PATH + "/{conversation}/items/{item}")
    async def delete_item(conversation: str, item: str, who: Asker) -> Values:
        await own(who, conversation)
        return row(await asyncio.to_thread(store.delete_item, conversation, item))

    return router


def row(record: Conversation) -> Values:
    return {
        "id": record.id,
        "object": "conversation",
        "created_at": int(record.created_at),
        "metadata": record.metadata,
    }
