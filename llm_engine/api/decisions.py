"""Decisions: questions about a state, each with an answer and how likely a model finds it.

Each question is one request for one token: the options are put before the model under labels, and
the probabilities of the labels' tokens are those of the options. Nothing is sampled, so the same
question has the same answer.
"""

import asyncio
import contextlib
import math
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import orjson

from llm_engine.api.decision_questions import Question, parse
from llm_engine.api.dispatch import Dispatcher, served_by
from llm_engine.api.http import Call, until_gone
from llm_engine.api.requests import EngineRequest, Kind
from llm_engine.api.responses.asking import Whole, ask, stays
from llm_engine.errors import APIError, InternalError, InvalidRequest, Unavailable
from llm_engine.records import EndpointStatus, Principal, Scope
from llm_engine.services import Services

Values = dict[str, Any]

#: Requests of one decision that are under way at a time.
AT_ONCE = 8
#: Labels whose tokens are remembered, of all models together.
MOST_REMEMBERED = 4096
_TOKENIZE, _CHAT = "/tokenize", "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Read:
    """What a model finds. `probabilities`: of the options, in their order; their sum is 1. `mass`:
    how likely it finds it that the answer is one of the options at all."""

    probabilities: list[float]
    mass: float
    input_tokens: int
    output_tokens: int


class Decisions:
    """POST /v1/decisions, whichever dialect it is in."""

    def __init__(self, services: Services, dispatcher: Dispatcher) -> None:
        self._services = services
        self._dispatcher = dispatcher
        self._limit = services.settings.gateway.max_body_bytes
        self._known: OrderedDict[tuple[str, ...], tuple[int, ...]] = OrderedDict()

    async def __call__(self, call: Call) -> None:
        """Answers the call, or raises APIError."""
        asked = parse(await call.body(self._limit))
        call.require(Scope.INFERENCE)
        async with until_gone(call):
            reads = await self._read(call.principal, asked.model, asked.state, asked.questions)
        answers = {
            question.name: question.answer(read.probabilities, read.mass)
            for question, read in zip(asked.questions, reads, strict=True)
        }
        usage = {
            "input_tokens": sum(read.input_tokens for read in reads),
            "output_tokens": sum(read.output_tokens for read in reads),
        }
        found = {"model": asked.model, "answers": answers, "usage": usage}
        await call.reply(200, orjson.dumps(found))

    async def _read(
        self, who: Principal, model: str, state: str, questions: list[Question]
    ) -> list[Read]:
        route = await self._services.route(who, model, Kind.CHAT.task)
        if route.endpoint is None:
            raise InvalidRequest(
                f"'{model}' is an external model: decisions need one that is served here.",
                param="model",
                code="invalid_value",
            )
        reading = _Reading(self, who, model, route.endpoint, state)
        first, *others = questions
        # The first one alone: the state that all have in common is then in the engine's cache, and
        # what is wrong with all of them is found out by one.
        reads = [await reading.read(first)]
        async with _together() as group:
            tasks = [group.create_task(reading.read(question)) for question in others]
        return reads + [task.result() for task in tasks]

    async def ask(self, who: Principal, request: EngineRequest) -> Values:
        """The engine's answer. Raises APIError, also where another model would answer, whose tokens
        are not this one's."""
        form = Whole()
        call = await ask(self._dispatcher, who, request, form, stays)
        if served_by(call) is not None:
            raise Unavailable(
                f"The model '{request.model}' cannot answer now, and its fallback cannot decide in "
                "its place.",
                param="model",
                retry_after=self._services.settings.gateway.retry_after_s,
            )
        return form.found

    async def token(self, who: Principal, model: str, endpoint: EndpointStatus, text: str) -> int:
        """The token that is this text for the model; -1: it takes several."""
        key = (endpoint.name, endpoint.generation, text)
        known = self._known.get(key)
        if known is None:
            body = {"model": model, "prompt": text, "add_special_tokens": False}
            request = EngineRequest(
                Kind.COMPLETIONS, _TOKENIZE, model, False, orjson.dumps(body), True
            )
            known = tuple((await self.ask(who, request))["tokens"])
            self._known[key] = known
            while len(self._known) > MOST_REMEMBERED:
                self._known.popitem(last=False)
        return known[0] if len(known) == 1 else -1


class _Reading:
    """The questions of one decision."""

    def __init__(
        self, decisions: Decisions, who: Principal, model: str, endpoint: EndpointStatus, state: str
    ) -> None:
        self._decisions = decisions
        self._who = who
        self._model = model
        self._endpoint = endpoint
        self._state = state
        self._session = uuid.uuid4().hex  # they begin alike: one replica has its cache
        self._turn = asyncio.Semaphore(AT_ONCE)

    async def read(self, question: Question) -> Read:
        """Raises APIError, which names the question."""
        async with self._turn:
            try:
                return await self._try(question)
            except APIError as error:
                raise _about(question, error) from None

    async def _try(self, question: Question) -> Read:
        labels, tokens = await self._labels(question)
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": question.prompt(self._state, labels)}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            # Of just these the engine tells the logprobs, however unlikely they are.
            "logprob_token_ids": tokens,
            # The first token must be the answer's.
            "chat_template_kwargs": {"enable_thinking": False},
        }
        request = EngineRequest(
            Kind.CHAT, _CHAT, self._model, False, orjson.dumps(body), True, session=self._session
        )
        answer = await self._decisions.ask(self._who, request)
        weights = _weights(answer, labels)
        mass = sum(weights)
        usage = answer.get("usage") or {}
        return Read(
            [weight / mass for weight in weights],
            min(mass, 1.0),
            usage.get("prompt_tokens") or 0,
            usage.get("completion_tokens") or 0,
        )

    async def _labels(self, question: Question) -> tuple[list[str], list[int]]:
        """The first labels that suit the model's tokenizer, and the tokens that stand for them."""
        for labels in question.labels:
            tokens: list[int] = []
            for label in labels:
                found = {await self._token(text) for text in spellings(label)} - {-1}
                if not found or found & set(tokens):
                    break
                tokens += sorted(found)
            else:
                return labels, tokens
        raise InvalidRequest(
            f"The model '{self._model}' cannot decide: its tokenizer splits the labels of the "
            "options, or takes two for the same.",
            param="model",
            code="invalid_value",
        )

    async def _token(self, text: str) -> int:
        return await self._decisions.token(self._who, self._model, self._endpoint, text)


def spellings(label: str) -> list[str]:
    """How a model may write it; a letter or a digit has no other case that means the same."""
    words = [label] if len(label) == 1 else [label, label.capitalize()]
    return [space + word for space in ("", " ") for word in words]


def _weights(answer: Values, labels: list[str]) -> list[float]:
    """How likely the first token is to be each of the labels, however it is written. By the tokens'
    texts: where an endpoint is changing, the engine may have another tokenizer than was asked."""
    places = {text.strip(): n for n, label in enumerate(labels) for text in spellings(label)}
    weights: list[float | None] = [None] * len(labels)
    try:
        [first] = answer["choices"][0]["logprobs"]["content"]
        for each in first["top_logprobs"]:
            place = places.get(each["token"].strip())
            if place is not None:
                weights[place] = (weights[place] or 0.0) + math.exp(each["logprob"])
    except (KeyError, TypeError, ValueError, IndexError):
        weights = [None]
    told = [weight for weight in weights if weight is not None]
    if len(told) < len(labels) or not 0 < sum(told) < math.inf:
        raise InternalError("The engine did not tell how likely the options are. Send it again.")
    return told


def _about(question: Question, error: APIError) -> APIError:
    """The same error, and which question it is about."""
    ours = isinstance(error, InvalidRequest) and error.param != "model"
    return type(error)(
        f"Question '{question.shown}': {error.message}",
        param=f"questions.{question.shown}" if ours else error.param,
        code=error.code,
        status=error.status,
        retry_after=error.retry_after,
    )


@contextlib.asynccontextmanager
async def _together() -> AsyncIterator[asyncio.TaskGroup]:
    """As a TaskGroup, but with the first error itself."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as several:
        raise several.exceptions[0] from None
