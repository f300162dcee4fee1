"""Chat, completions and embeddings: check the body, then dispatch it. The token path."""

from llm_engine.api.dispatch import Dispatcher
from llm_engine.api.http import Call
from llm_engine.api.openai.answers import OpenAIForm
from llm_engine.api.openai.requests import parse
from llm_engine.api.openai.stored_chats import StoredChats
from llm_engine.api.requests import Kind
from llm_engine.services import Services

_FORM = OpenAIForm()


class Inference:
    """One of OpenAI's inference routes."""

    def __init__(self, services: Services, dispatcher: Dispatcher, kind: Kind) -> None:
        self._kind = kind
        self._dispatcher = dispatcher
        self._stored = StoredChats(services, dispatcher)
        self._limit = services.settings.gateway.max_body_bytes

    async def __call__(self, call: Call) -> None:
        """Answers the call, or raises APIError while nothing has been sent yet."""
        body = await call.body(self._limit)
        request = parse(self._kind, body)
        if request.store:
            return await self._stored.answer(call, request, body)
        await self._dispatcher.serve(call, request, _FORM)
