"""/v1/responses and /v1/conversations over real sockets, with the real client."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from llm_engine.api.replicas import Replicas
from llm_engine.errors import Unavailable
from tests.support.cluster import eventually
from tests.support.gateway import GatewayThread, fake_endpoint


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayThread]:
    engines = [
        fake_endpoint("fake"),
        fake_endpoint("slow", vllm_args={"token_delay_s": 0.05}),
        fake_endpoint("slowest", vllm_args={"token_delay_s": 10}),
        fake_endpoint("tired", fallback="fake"),
        fake_endpoint("vectors", task="embed"),
    ]
    with GatewayThread(engines, sections={"responses": {"max_open": 500}}) as running:
        yield running


@pytest.fixture
def client(gateway: GatewayThread) -> Iterator[OpenAI]:
    with gateway.openai("none") as made:
        yield made


def say(client: OpenAI, **asked: Any) -> Any:
    """`seed` is vLLM's; the fake engine begins its answer with it."""
    extra = {"seed": asked.pop("seed", 1)} | asked.pop("extra_body", {})
    return client.responses.create(
        **{"model": "fake", "input": "hello", "extra_body": extra} | asked
    )


def done(client: OpenAI, response: str, within_s: float = 20) -> Any:
    def ended() -> Any:
        found = client.responses.retrieve(response)
        return found.status not in ("queued", "in_progress") and found

    return eventually(ended, within_s, 0.02)


# -- while the client waits


def test_a_response_is_answered_and_kept(client: OpenAI):
    made = say(client, instructions="Be brief.", metadata={"a": "b"}, max_output_tokens=3)
    assert made.output_text == "1 word word word "
    assert (made.status, made.object, made.store) == ("completed", "response", True)
    assert (made.metadata, made.instructions, made.max_output_tokens) == (
        {"a": "b"},
        "Be brief.",
        3,
    )
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens
    assert client.responses.retrieve(made.id) == made


def test_not_stored_is_nowhere(client: OpenAI):
    made = say(client, store=False)
    assert made.output_text and made.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_a_stream_tells_each_step_and_is_kept(client: OpenAI):
    events = list(say(client, stream=True, max_output_tokens=5))
    assert [event.type for event in events] == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added", *["response.output_text.delta"] * 6,
        "response.output_text.done", "response.content_part.done", "response.output_item.done",
        "response.completed",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kept = client.responses.retrieve(events[0].response.id)
    assert events[-1].response == kept and kept.output_text == "1 " + "word " * 5


def test_the_streaming_helper(client: OpenAI):
    with client.responses.stream(model="fake", input="hi", extra_body={"seed": 7}) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert final.output_text == text and text.startswith("7 ")


def test_deleted_it_is_gone(client: OpenAI):
    made = say(client)
    client.responses.delete(made.id)
    for ask in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError):
            ask(made.id)


# -- what came before


def test_a_chain_gives_the_engine_all_that_came_before(client: OpenAI):
    first = say(client)
    second = say(client, previous_response_id=first.id)
    third = say(client, previous_response_id=second.id, input=[{"role": "user", "content": "b"}])
    # The fake engine counts items: question and answer of each turn, and the new question.
    assert [each.usage.input_tokens for each in (first, second, third)] == [1, 3, 5]
    assert third.previous_response_id == second.id


def test_instructions_are_not_inherited(client: OpenAI):
    first = say(client, instructions="x")
    assert say(client, previous_response_id=first.id).instructions is None


def test_input_items_in_pages(client: OpenAI):
    made = say(client, input=[{"role": "user", "content": str(n)} for n in range(5)])
    newest = client.responses.input_items.list(made.id, limit=2)
    texts = [item.content[0].text for item in newest]
    assert texts == ["4", "3", "2", "1", "0"]
    oldest = client.responses.input_items.list(made.id, order="asc", limit=2)
    assert [item.content[0].text for item in oldest.data] == ["0", "1"] and oldest.has_more


def test_a_conversation_grows_with_each_response(client: OpenAI):
    talk = client.conversations.create(
        metadata={"topic": "x"}, items=[{"role": "user", "content": "first"}]
    )
    one = say(client, conversation=talk.id, input="second")
    two = say(client, conversation={"id": talk.id}, input="third", stream=True)
    last = list(two)[-1].response
    assert (one.usage.input_tokens, last.usage.input_tokens) == (2, 4)
    assert last.conversation.id == talk.id
    items = list(client.conversations.items.list(talk.id, order="asc", limit=2))
    assert [item.role for item in items] == ["user", "user", "assistant", "user", "assistant"]
    after = say(client, previous_response_id=one.id)
    assert after.usage.input_tokens == 4  # what the conversation was then


def test_conversations_change_and_go(client: OpenAI):
    talk = client.conversations.create()
    assert client.conversations.update(talk.id, metadata={"a": "b"}).metadata == {"a": "b"}
    added = client.conversations.items.create(
        talk.id, items=[{"type": "message", "role": "user", "content": "hi"}]
    )
    item = added.data[0]
    assert client.conversations.items.retrieve(item.id, conversation_id=talk.id) == item
    client.conversations.items.delete(item.id, conversation_id=talk.id)
    assert client.conversations.items.list(talk.id).data == []
    assert client.conversations.delete(talk.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.conversations.retrieve(talk.id)
    with pytest.raises(openai.NotFoundError):
        say(client, conversation=talk.id)


def test_two_items_with_one_id_are_refused_and_nothing_is_added(client: OpenAI):
    def item(name: str, text: str) -> Any:
        return {"type": "message", "role": "user", "content": text, "id": name}

    talk = client.conversations.create(items=[item("msg_1", "A")])
    for several in ([item("msg_1", "B")], [item("msg_2", "B"), item("msg_2", "C")]):
        with pytest.raises(openai.BadRequestError) as refused:
            client.conversations.items.create(talk.id, items=several)
        assert (refused.value.code, refused.value.param) == ("duplicate_item", "items")
    with pytest.raises(openai.BadRequestError):
        client.conversations.create(items=[item("msg_1", "A"), item("msg_1", "B")])
    [kept] = client.conversations.items.list(talk.id).data
    assert kept.content[0].text == "A"


def test_items_may_be_as_large_as_any_request(client: OpenAI):
    long = {"type": "message", "role": "user", "content": "x" * (3 * 2**20)}
    talk = client.conversations.create(items=[long])
    client.conversations.items.create(talk.id, items=[long])
    assert len(client.conversations.items.list(talk.id).data) == 2


def test_a_conversation_that_is_too_large_is_not_gone_on_from():
    item = {"type": "message", "role": "user", "content": "x" * 1500}
    small = GatewayThread([fake_endpoint("fake")], max_body_bytes=4096)
    with small as gateway, gateway.openai("none") as client:
        talk = client.conversations.create(items=[item])
        early = say(client, conversation=talk.id)
        for _ in range(3):
            client.conversations.items.create(talk.id, items=[item])
        with pytest.raises(openai.BadRequestError, match=r"4096 bytes .gateway.max_body") as caught:
            say(client, conversation=talk.id)
        problem = (caught.value.code, caught.value.param)
        assert problem == ("context_length_exceeded", "conversation")
        assert say(client, previous_response_id=early.id).status == "completed"  # small then
        page = client.conversations.items.list(talk.id, limit=100)
        assert len(page.data) == 2 and page.has_more
        assert len(list(page)) == 6  # the client asks for the rest


# -- what engines are asked


def test_engines_fields_are_checked_here_as_in_chats(client: OpenAI):
    with pytest.raises(openai.BadRequestError) as refused:
        say(client, extra_body={"vllm_xargs": {"kv_transfer_params": "x"}})
    assert refused.value.param == "vllm_xargs.kv_transfer_params"


def test_a_field_that_is_null_is_as_if_it_were_not_there(client: OpenAI):
    for background in (False, True):
        made = say(client, background=background, extra_body={"suppress_tokens": None})
        assert done(client, made.id).status == "completed"


def test_who_answered_instead_is_told(client: OpenAI, monkeypatch: pytest.MonkeyPatch):
    serve = Replicas.serve

    async def is_tired(self: Replicas, call: Any, request: Any, form: Any, endpoint: Any) -> None:
        if endpoint.name == "tired":
            raise Unavailable("It is tired.")
        await serve(self, call, request, form, endpoint)

    monkeypatch.setattr(Replicas, "serve", is_tired)
    raw = client.responses.with_raw_response
    for stream in (False, True):
        answer = raw.create(model="tired", input="hi", stream=stream)
        assert answer.headers["x-llm-engine-served-by"] == "fake"
        made = answer.parse()
        if stream:
            events = list(made)
            assert events[0].response.model == "fake"
            made = events[-1].response
        assert made.model == "fake" == client.responses.retrieve(made.id).model
    later = client.responses.create(model="tired", input="hi", background=True)
    assert done(client, later.id).model == "fake"


# -- in the background


def test_in_the_background_it_is_answered_later(client: OpenAI):
    made = say(client, model="slow", background=True)
    assert made.status == "queued" and made.background
    ended = done(client, made.id)
    assert (ended.status, ended.output_text) == ("completed", "1 " + "word " * 16)
    assert ended.completed_at >= ended.created_at


def test_a_background_stream_can_be_taken_up_anywhere(client: OpenAI):
    events = list(say(client, model="slow", background=True, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:3]] == [
        "response.created", "response.queued", "response.in_progress",
    ]  # fmt: skip
    response = events[0].response.id
    for after in (0, 7, len(events) - 2, len(events) + 5):
        again = client.responses.retrieve(response, stream=True, starting_after=after)
        assert list(again) == events[after + 1 :]


def test_a_reader_hears_events_while_they_come(client: OpenAI):
    asked = {"model": "slow", "background": True, "stream": True, "max_output_tokens": 60}
    made = list_until(say(client, **asked), 1)[0].response.id
    began = time.monotonic()
    arrived = [time.monotonic() - began for _ in client.responses.retrieve(made, stream=True)]
    assert arrived[-1] - arrived[0] > 0.3
    assert client.responses.retrieve(made).status == "completed"


def list_until(stream: Any, count: int) -> list[Any]:
    """The first events, and then the client goes."""
    found = []
    for event in stream:
        found.append(event)
        if len(found) == count:
            stream.close()
            return found
    return found


def test_the_last_events_do_not_wait_for_the_next_ones(client: OpenAI):
    """This engine says a word in ten seconds."""
    asked = {"model": "slowest", "input": "hi", "background": True, "stream": True}
    stream = client.responses.create(**asked)
    began = time.monotonic()
    made = next(stream).response
    assert any(event.type == "response.content_part.added" for event in stream)
    assert time.monotonic() - began < 5
    stream.close()
    client.responses.cancel(made.id)


def test_cancelled_within_a_second(client: OpenAI, gateway: GatewayThread):
    made = say(client, model="slow", background=True, max_output_tokens=500)
    eventually(lambda: client.responses.retrieve(made.id).status == "in_progress", 15, 0.02)
    began = time.monotonic()
    assert client.responses.cancel(made.id).status == "cancelled"
    assert time.monotonic() - began < 5, "its tokens take 25 seconds"
    assert client.responses.cancel(made.id).status == "cancelled"
    eventually(lambda: gateway.load("slow").depth == 0, 15)


def test_a_cancelled_stream_ends(client: OpenAI):
    stream = say(client, model="slow", background=True, stream=True, max_output_tokens=500)
    seen = []
    for event in stream:
        seen.append(event)
        if len(seen) == 6:
            threading.Thread(target=client.responses.cancel, args=(seen[0].response.id,)).start()
    assert seen[-1].type == "response.cancelled"


def test_many_at_once_are_all_answered(client: OpenAI):
    made = [say(client, background=True, seed=n).id for n in range(150)]
    for number, response in enumerate(made):
        assert done(client, response, 60).output_text.startswith(f"{number} word")


def test_an_idempotency_key_makes_one(client: OpenAI):
    headers = {"Idempotency-Key": "k1"}
    first = say(client, background=True, extra_headers=headers)
    assert say(client, background=True, extra_headers=headers).id == first.id
    with pytest.raises(openai.ConflictError):
        say(client, background=True, extra_headers=headers, input="other")


# -- whose it is


@pytest.fixture(scope="module")
def keys(gateway: GatewayThread) -> list[str]:
    """Of two owners."""
    made = []
    with gateway.client() as admin:
        for owner in ("ann", "bob"):
            asked = {"owner": owner, "scopes": ["inference"]}
            made.append(admin.post("/v1/keys", json=asked).raise_for_status().json()["key"])
    return made


def test_nobody_sees_another_owners(gateway: GatewayThread, keys: list[str]):
    with (
        gateway.openai(keys[0]) as ann,
        gateway.openai(keys[1]) as bob,
    ):
        made, talk = say(ann, background=True), ann.conversations.create()
        for ask in (
            lambda: bob.responses.retrieve(made.id),
            lambda: bob.responses.retrieve(made.id, stream=True),
            lambda: bob.responses.cancel(made.id),
            lambda: bob.responses.delete(made.id),
            lambda: bob.responses.input_items.list(made.id),
            lambda: say(bob, conversation=talk.id),
            lambda: bob.conversations.retrieve(talk.id),
            lambda: bob.conversations.update(talk.id, metadata={}),
            lambda: bob.conversations.delete(talk.id),
            lambda: bob.conversations.items.list(talk.id),
            lambda: bob.conversations.items.create(
                talk.id, items=[{"type": "message", "role": "user", "content": "x"}]
            ),
        ):
            with pytest.raises(openai.NotFoundError):
                ask()
        done(ann, made.id)
        with pytest.raises(openai.BadRequestError) as error:
            say(bob, previous_response_id=made.id)
        assert error.value.code == "previous_response_not_found"
        assert ann.conversations.retrieve(talk.id).id == talk.id


# -- bad input


@pytest.mark.parametrize(
    ("asked", "param", "code"),
    [
        ({"previous_response_id": "no"}, "previous_response_id", "previous_response_not_found"),
        ({"previous_response_id": "a", "conversation": "b"}, "previous_response_id",
         "mutually_exclusive_parameters"),
        ({"background": True, "store": False}, "background", "invalid_value"),
        ({"conversation": "c", "store": False}, "conversation", "invalid_value"),
        ({"temperature": 3}, "temperature", "decimal_above_max_value"),
        ({"max_output_tokens": 0}, "max_output_tokens", "integer_below_min_value"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "object_above_max_properties"),
        ({"metadata": {"k" * 65: "v"}}, None, None),
        ({"prompt": {"id": "p"}}, "prompt", "unsupported_parameter"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", None),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"input": []}, "input", None),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "invalid_value"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "invalid_value"),
        ({"messages": []}, "messages", "unknown_parameter"),
        ({"model": "vectors"}, "model", None),
    ],
)  # fmt: skip
def test_a_wrong_request_is_told_what_is_wrong(
    client: OpenAI, asked: dict[str, Any], param: str | None, code: str | None
):
    extra = {key: asked.pop(key) for key in [k for k in asked if k in ("messages",)]}
    with pytest.raises(openai.BadRequestError) as error:
        say(client, **asked, extra_body=extra)
    if param is not None:
        assert error.value.param == param
    if code is not None:
        assert error.value.code == code


def test_an_unknown_model(client: OpenAI):
    for background in (True, False):
        with pytest.raises(openai.NotFoundError) as error:
            say(client, model="none", background=background)
        assert error.value.code == "model_not_found"


def test_a_synchronous_response_has_no_stream_and_no_cancellation(client: OpenAI):
    made = say(client)
    for ask in (
        lambda: client.responses.cancel(made.id),
        lambda: list(client.responses.retrieve(made.id, stream=True)),
        lambda: client.responses.retrieve(made.id, extra_query={"starting_after": 1}),
    ):
        with pytest.raises(openai.BadRequestError):
            ask()


def test_one_that_still_runs_cannot_be_gone_on_from(client: OpenAI):
    made = say(client, model="slow", background=True)
    with pytest.raises(openai.BadRequestError, match=r"queued|in_progress"):
        say(client, previous_response_id=made.id)
    done(client, made.id)


def nested(levels: int) -> list[Any]:
    made: list[Any] = []
    for _ in range(levels):
        made = [made]
    return made


@pytest.mark.parametrize(
    "item",
    [
        {"type": ["x"]},
        {"type": "message", "role": "user", "content": [{"type": []}]},
        {"type": "message", "role": "user", "content": "x", "id": "a\0"},
        {"role": "user", "content": "x", "deep": nested(300)},
    ],
    ids=["type", "part", "id", "deep"],
)
def test_odd_items_are_no_failure_of_the_server(client: OpenAI, item: dict[str, Any]):
    talk = client.conversations.create()
    for ask in (
        lambda: say(client, input=[item]),
        lambda: client.conversations.items.create(talk.id, items=[item]),
    ):
        with pytest.raises(openai.BadRequestError):
            ask()
