"""Responses as records: one worker at a time, one end, a feed that skips and repeats nothing."""

import contextlib
import time
from typing import Any

import pytest

from llm_engine.errors import Conflict, InvalidRequest, LeaseLost, NotFound, Overloaded
from llm_engine.ids import new_id
from llm_engine.responses import Conversation, ResponseEnd, ResponseRecord, StoredChat, Stream
from llm_engine.statuses import ResponseState, StreamState
from llm_engine.store.idempotency import Once
from llm_engine.store.sql import Store
from tests.stores.making import codes, message, race, race_of, response

_S = ResponseState
LEASE_S = 30.0
MANY = 10**6  # bytes
DONE = ResponseEnd(
    _S.COMPLETED,
    output=[message("hi", "assistant")],
    usage={"input_tokens": 3, "output_tokens": 2, "total_tokens": 5},
)


def add(store: Store, **facts: Any) -> ResponseRecord:
    return store.responses.add(response(**facts))


def claimed(store: Store, worker: str = "w1", **facts: Any) -> ResponseRecord:
    made = add(store, **facts)
    found = {each.id: each for each in store.responses.claim(worker, LEASE_S, 1000)}
    return found[made.id]


def conversation(store: Store, owner: str = "ann") -> str:
    made = Conversation(new_id("conv"), owner, time.time())
    store.conversations.add(made, [])
    return made.id


def stream(store: Store, owner: str = "ann") -> str:
    now = time.time()
    made = Stream(new_id("stream"), owner, "mail", "24h", StreamState.OPEN, now, now)
    store.streams.add(made, 10)
    return made.id


# -- as its client sees it


def test_what_was_added_is_there_for_other_processes(store: Store, other: Store):
    made = add(store, request={"temperature": 0.5, "metadata": {"a": "b"}}, custom_id="c")
    assert other.responses.get(made.id) == made


def test_an_expired_one_is_gone_and_then_swept(store: Store):
    made = add(store, state=_S.COMPLETED, expires_at=time.time() - 1)
    with pytest.raises(NotFound):
        store.responses.get(made.id)
    assert store.responses.sweep(time.time()) == 1
    assert store.responses.feed(None, None, limit=10) == ([], False)


def test_deleted_with_its_events(store: Store):
    made = claimed(store)
    store.responses.tell(made, [b"{}"])
    store.responses.delete(made.id)
    assert store.responses.events(made.id, -1) == []
    with pytest.raises(NotFound):
        store.responses.delete(made.id)
    with pytest.raises(LeaseLost):
        store.responses.end(made, DONE)


def test_an_idempotency_key_makes_one(store: Store):
    once = Once("ann", "responses", "k", b"1" * 32)
    first = store.responses.add(response(), once=once)
    assert store.responses.add(response(), once=once).id == first.id
    with pytest.raises(Conflict):
        store.responses.add(response(), once=once._replace(digest=b"2" * 32))


def test_the_key_of_one_that_was_swept_makes_another(store: Store):
    once = Once("ann", "responses", "k", b"1" * 32)
    first = store.responses.add(response(expires_at=time.time() - 1, state=_S.COMPLETED), once=once)
    store.responses.sweep(time.time())
    assert store.responses.add(response(), once=once).id != first.id


def test_the_open_ones_of_an_owner_are_limited(store: Store):
    store.responses.add(response(), max_open=1)
    with pytest.raises(Overloaded, match="max_open"):
        store.responses.add(response(), max_open=1)
    store.responses.add(response(owner="bob"), max_open=1)
    store.responses.add(response(state=_S.COMPLETED), max_open=1)


def test_pages_are_of_one_owner_and_newest_first(store: Store):
    made = [add(store).id for _ in range(5)]
    add(store, owner="bob")
    first, more = store.responses.page("ann", limit=3)
    rest, none = store.responses.page("ann", limit=3, after=first[-1].id)
    assert [each.id for each in first + rest] == made[::-1]
    assert (more, none) == (True, False)


@pytest.mark.parametrize("name", ["no", "a\0b"])
def test_no_such_response(store: Store, name: str):
    for ask in (store.responses.get, store.responses.delete, store.responses.ask_cancel):
        with pytest.raises(NotFound):
            ask(name)


# -- chains


def chain(store: Store, length: int, **facts: Any) -> list[ResponseRecord]:
    made: list[ResponseRecord] = []
    for _ in range(length):
        previous = made[-1].id if made else None
        made.append(add(store, state=_S.COMPLETED, previous=previous, **facts))
    return made


def test_a_chain_comes_back_from_its_beginning(store: Store):
    made = chain(store, 5)
    assert [each.id for each in store.responses.chain(made[-1].id, 100, MANY)] == [
        x.id for x in made
    ]
    assert [each.id for each in store.responses.chain(made[2].id, 100, MANY)] == [
        x.id for x in made[:3]
    ]


def test_a_chain_that_is_too_long_or_broken_shows_it(store: Store):
    made = chain(store, 5)
    assert store.responses.chain(made[-1].id, 3, MANY)[0].previous == made[1].id
    store.responses.delete(made[1].id)
    assert store.responses.chain(made[-1].id, 100, MANY)[0].previous == made[1].id


def test_a_chain_that_is_too_large_is_refused(store: Store):
    made = chain(store, 5)
    with pytest.raises(InvalidRequest, match="over 100 bytes") as refused:
        store.responses.chain(made[-1].id, 100, 100)
    assert refused.value.code == "context_length_exceeded"


def test_what_a_response_goes_on_from_lives_as_long_as_itself(store: Store):
    made = chain(store, 3, expires_at=time.time() + 0.3)
    last = add(store, state=_S.COMPLETED, previous=made[-1].id)
    time.sleep(0.4)
    assert len(store.responses.chain(last.id, 100, MANY)) == 4


# -- as a gateway works on it


def test_claimed_once_and_oldest_first(store: Store, other: Store):
    made = [add(store).id for _ in range(20)]
    first = store.responses.claim("w0", LEASE_S, 3)
    assert [each.id for each in first] == made[:3]
    given = race_of([store, other, store, other], lambda s, n: s.responses.claim(f"w{n}", 30.0, 8))
    ids = [each.id for part in [first, *given] for each in part]
    assert sorted(ids) == made
    assert not store.responses.any_waiting()


def test_a_dead_gateways_are_claimed_by_another(store: Store):
    add(store)
    (zombie,) = store.responses.claim("zombie", -1, 9)
    assert store.responses.any_waiting()
    (taken,) = store.responses.claim("alive", LEASE_S, 9)
    assert (taken.id, taken.starts) == (zombie.id, 2)
    for write in (
        lambda: store.responses.tell(zombie, [b"{}"]),
        lambda: store.responses.end(zombie, DONE),
    ):
        with pytest.raises(LeaseLost):
            write()
    assert store.responses.end(taken, DONE).state is _S.COMPLETED


def test_a_gateway_that_lives_keeps_what_it_has(store: Store):
    made, other = add(store), add(store)
    store.responses.claim("w1", 0.2, 9)
    store.responses.beat("w1", LEASE_S, [made.id])
    time.sleep(0.3)
    assert store.responses.claim("w2", LEASE_S, 9, abandoned=False) == []
    assert [each.id for each in store.responses.claim("w2", LEASE_S, 9)] == [other.id]


def test_what_a_gateway_gives_up_is_anybodys_and_counts(store: Store):
    made = claimed(store)
    store.responses.abandon("w2", [made.id])
    assert store.responses.claim("w2", LEASE_S, 9) == []
    store.responses.abandon("w1", [made.id])
    (again,) = store.responses.claim("w2", LEASE_S, 9)
    assert (again.id, again.starts) == (made.id, 2)


def test_a_gateway_that_stops_gives_back_what_it_has(store: Store):
    made = claimed(store)
    store.responses.release("w1")
    (again,) = store.responses.claim("w2", LEASE_S, 9)
    assert (again.id, again.starts) == (made.id, 1)


def test_one_whose_model_is_away_waits_again_and_its_start_does_not_count(store: Store):
    made, other = add(store), add(store)
    store.responses.claim("w1", LEASE_S, 9)
    assert not store.responses.put_back("w2", made.id)
    assert not store.responses.any_waiting()
    assert store.responses.put_back("w1", made.id)
    (again,) = store.responses.claim("w2", LEASE_S, 9)
    assert (again.id, again.starts) == (made.id, 1)
    assert store.responses.put_back("w2", made.id, counts=True)
    (again,) = store.responses.claim("w2", LEASE_S, 9)
    assert (again.id, again.starts) == (made.id, 2)
    store.responses.ask_cancel(other.id)
    assert not store.responses.put_back("w1", other.id)
    assert store.responses.held("w1") == {other.id: True}


def test_claimed_by_its_model(store: Store):
    of = {model: [add(store, model=model).id for _ in range(3)] for model in ("a", "b", "c")}
    a, b = ("ann", "a"), ("ann", "b")
    others = store.responses.claim("w1", LEASE_S, 9, without=[a, b])
    assert [each.id for each in others] == of["c"]
    assert not store.responses.any_waiting([a, b]) and store.responses.any_waiting([a])
    assert store.responses.any_waiting([a, ("bob", "b")])
    assert not store.responses.claim("w1", LEASE_S, 1, of=("bob", "b"))
    (one,) = store.responses.claim("w1", LEASE_S, 1, of=b)
    assert one.id == of["b"][0]
    assert len(store.responses.claim("w1", LEASE_S, 9)) == 5


def test_one_that_answers_while_its_client_waits_is_nobodys_to_claim(store: Store):
    add(store, state=_S.IN_PROGRESS, background=False)
    assert not store.responses.any_waiting()


def test_what_has_come_of_it(store: Store):
    ended = store.responses.end(claimed(store), DONE)
    found = store.responses.get(ended.id)
    assert found == ended
    assert (found.state, found.output, found.usage) == (_S.COMPLETED, DONE.output, DONE.usage)
    assert found.worker is None and found.ended_at is not None


def test_it_ends_once(store: Store, other: Store):
    made = claimed(store)

    def end(to: Store) -> str:
        try:
            return to.responses.end(made, DONE).state
        except LeaseLost:
            return "lost"

    given = race_of([store, other] * 3, lambda to, _: end(to))
    assert sorted(given) == ["completed"] + ["lost"] * 5
    assert len(store.responses.feed(None, None, limit=9)[0]) == 1


# -- cancelling


def test_cancelled_at_once_where_nobody_works_on_it(store: Store):
    made = add(store)
    assert store.responses.ask_cancel(made.id).state is _S.CANCELLED
    assert store.responses.ask_cancel(made.id).state is _S.CANCELLED
    assert store.responses.claim("w", LEASE_S, 9) == []


def test_whoever_works_on_it_is_told(store: Store):
    made = claimed(store)
    assert store.responses.held("w1") == {made.id: False}
    assert store.responses.ask_cancel(made.id).state is _S.IN_PROGRESS
    assert store.responses.held("w1") == {made.id: True}
    store.responses.end(made, ResponseEnd(_S.CANCELLED))
    assert store.responses.held("w1") == {}


def test_cancelled_where_its_gateway_is_dead(store: Store):
    made = add(store)
    store.responses.claim("zombie", -1, 9)
    assert store.responses.ask_cancel(made.id).state is _S.CANCELLED


def test_an_end_stays(store: Store):
    made = store.responses.end(claimed(store), DONE)
    assert store.responses.ask_cancel(made.id) == made


# -- events


def test_events_are_read_from_anywhere(store: Store, other: Store):
    made = claimed(store)
    made = store.responses.tell(made, [b'{"n":0}', b'{"n":1}'])
    made = store.responses.tell(made, [b'{"n":2}'])
    store.responses.end(made, DONE, [b'{"n":3}'])
    everything = [b'{"n":%d}' % n for n in range(4)]
    for after in range(-1, 5):
        assert other.responses.events(made.id, after) == everything[after + 1 :]
    assert other.responses.standing([made.id, "no"]) == {made.id: (4, True)}


def test_events_whose_writing_was_not_heard_of_are_not_written_twice(store: Store):
    made = claimed(store)
    first = [b'{"n":0}', b'{"n":1}']
    store.responses.tell(made, first)
    assert store.responses.tell(made, first).told == 2
    assert store.responses.tell(made, [*first, b'{"n":2}']).told == 3
    store.responses.end(made, DONE, [*first, b'{"n":2}', b'{"n":3}'])
    assert store.responses.events(made.id, -1) == [b'{"n":%d}' % n for n in range(4)]


# -- the feed


def test_the_feed_tells_ends_in_their_order(store: Store):
    made = [claimed(store) for _ in range(3)]
    for each in (made[1], made[0], made[2]):
        store.responses.end(each, DONE)
    newest, _ = store.responses.feed("ann", None, limit=9)
    assert [each.response.id for each in newest] == [made[2].id, made[0].id, made[1].id]
    first = newest[-1].serial
    later, more = store.responses.feed("ann", None, limit=1, after=first)
    assert [each.response.id for each in later] == [made[0].id] and more
    earlier, _ = store.responses.feed("ann", None, limit=9, before=newest[0].serial)
    assert [each.response.id for each in earlier] == [made[0].id, made[1].id]
    assert store.responses.feed("bob", None, limit=9) == ([], False)
    assert store.responses.news(newest[1].serial) == (newest[0].serial, {("ann", None)})


def test_a_stream_has_its_own_feed(store: Store):
    mail = stream(store)
    inside = store.responses.end(claimed(store, stream=mail), DONE)
    outside = store.responses.end(claimed(store), DONE)
    for name, wanted in ((mail, inside), (None, outside)):
        found, _ = store.responses.feed("ann", name, limit=9)
        assert [each.response.id for each in found] == [wanted.id]


def test_a_reader_misses_nothing_while_writers_race(store: Store, other: Store):
    made = [claimed(store, worker=f"w{n}") for n in range(24)]
    seen: list[int] = []

    def read() -> None:
        deadline = time.monotonic() + 30
        while len(seen) < len(made) and time.monotonic() < deadline:
            after = seen[-1] if seen else 0
            found, _ = other.responses.feed(None, None, limit=5, after=after)
            seen.extend(each.serial for each in found)

    def writer(records: list[ResponseRecord], to: Store) -> None:
        for record in records:
            to.responses.end(record, DONE)

    race(
        read,
        *[lambda n=n: writer(made[n::4], (store, other)[n % 2]) for n in range(4)],
    )
    assert len(seen) == len(made) and seen == sorted(set(seen))
    everything, _ = store.responses.feed(None, None, limit=100, after=0)
    assert seen == [each.serial for each in everything]


def test_serials_do_not_begin_anew(store: Store):
    first = add(store, state=_S.COMPLETED)
    last, _ = store.responses.news(0)
    store.responses.delete(first.id)
    add(store, state=_S.COMPLETED)
    assert store.responses.news(0)[0] > last


def test_the_last_serial_does_not_go_with_its_entry(store: Store, other: Store):
    before = store.responses.last_serial()
    made = [add(store, state=_S.COMPLETED) for _ in range(2)]
    newest, _ = store.responses.feed(None, None, limit=1)
    last = newest[0].serial
    assert before < last == other.responses.last_serial()
    for each in made:
        store.responses.delete(each.id)
    assert store.responses.last_serial() == last


# -- conversations


def test_a_conversation_goes_on_with_each_response(store: Store):
    talk = conversation(store)
    made = claimed(store, conversation=talk)
    store.responses.end(made, DONE)
    placed, more = store.conversations.items(talk, limit=10, most_bytes=MANY)
    assert [each.data for each in placed] == [*made.input, *DONE.output] and not more
    earlier, _ = store.conversations.items(talk, limit=10, most_bytes=MANY, until=placed[0].serial)
    assert [each.data for each in earlier] == made.input


def test_a_failed_response_leaves_its_conversation(store: Store):
    talk = conversation(store)
    store.responses.end(claimed(store, conversation=talk), ResponseEnd(_S.FAILED))
    assert store.conversations.items(talk, limit=10, most_bytes=MANY) == ([], False)


def test_a_response_outlives_its_conversation(store: Store):
    talk = conversation(store)
    made = claimed(store, conversation=talk)
    store.conversations.delete(talk)
    assert store.responses.end(made, DONE).state is _S.COMPLETED


def test_items_of_a_conversation(store: Store):
    talk = conversation(store)
    new = [message(str(n)) for n in range(5)]
    store.conversations.add_items(talk, new, 5)
    with pytest.raises(Conflict, match="max_conversation_items"):
        store.conversations.add_items(talk, [message()], 5)
    page, more = store.conversations.items(talk, limit=2, most_bytes=MANY, newest_first=True)
    assert [each.data for each in page] == new[:2:-1] and more
    rest, _ = store.conversations.items(
        talk, limit=9, most_bytes=MANY, newest_first=True, after=new[3]["id"]
    )
    assert [each.data for each in rest] == new[2::-1]
    assert store.conversations.item(talk, new[0]["id"]) == new[0]
    store.conversations.delete_item(talk, new[0]["id"])
    for ask in (
        lambda: store.conversations.item(talk, new[0]["id"]),
        lambda: store.conversations.item("no", "no"),
        lambda: store.conversations.items(talk, limit=1, most_bytes=MANY, after="no"),
        lambda: store.conversations.change("no", {}),
    ):
        with pytest.raises(NotFound):
            ask()
    assert store.conversations.change(talk, {"a": "b"}).metadata == {"a": "b"}


def test_items_are_no_more_than_so_many_bytes_but_at_least_one(store: Store):
    talk = conversation(store)
    new = store.conversations.add_items(talk, [message("x" * 1000) for _ in range(4)], 5)

    def page(**asked: Any) -> tuple[list[str], bool]:
        placed, more = store.conversations.items(talk, limit=4, **asked)
        return [each.data["id"] for each in placed], more

    ids = [item["id"] for item in new]
    assert page(most_bytes=5000) == (ids, False)
    assert page(most_bytes=3000) == (ids[:2], True)
    assert page(most_bytes=3000, newest_first=True) == (ids[:1:-1], True)
    assert page(most_bytes=3000, after=ids[1]) == (ids[2:], False)
    assert page(most_bytes=10) == (ids[:1], True)
    assert page(most_bytes=10, after=ids[2]) == (ids[3:], False)
    assert page(most_bytes=10, after=ids[3]) == ([], False)


# -- streams


def test_a_cancelled_stream_cancels_what_has_not_begun(store: Store):
    mail = stream(store)
    running = claimed(store, stream=mail)
    waiting = add(store, stream=mail)
    store.streams.close(mail, StreamState.CANCELLED)
    assert store.responses.get(waiting.id).state is _S.CANCELLED
    store.responses.end(running, DONE)
    counts = store.streams.counts(mail)
    assert (counts.total, counts.completed, counts.cancelled) == (2, 1, 1)
    assert (counts.input_tokens, counts.output_tokens) == (3, 2)
    assert counts.last is not None and counts.last.response.id == running.id


def test_a_stream_is_archived_for_good(store: Store):
    mail = stream(store)
    assert store.streams.close(mail, StreamState.ARCHIVED).archived_at is not None
    with pytest.raises(Conflict):
        store.streams.close(mail, StreamState.CANCELLED)


@pytest.mark.parametrize("state", [StreamState.CANCELLED, StreamState.ARCHIVED])
def test_nothing_is_put_into_a_stream_that_is_not_open(store: Store, state: StreamState):
    mail = stream(store)
    store.streams.close(mail, state)
    with pytest.raises(Conflict, match=f"is {state}"):
        add(store, stream=mail)


def test_nothing_slips_into_a_stream_while_it_is_cancelled(store: Store, other: Store):
    mail = stream(store)

    def put() -> None:
        with contextlib.suppress(Conflict):
            for _ in range(20):
                add(store, stream=mail)

    race(put, put, put, lambda: other.streams.close(mail, StreamState.CANCELLED))
    counts = other.streams.counts(mail)
    assert counts.pending == 0 and counts.total == counts.cancelled


def test_streams_are_limited_and_listed(store: Store):
    first, second = stream(store), stream(store)
    stream(store, "bob")
    now = time.time()
    with pytest.raises(Conflict, match="max_streams"):
        store.streams.add(Stream("s", "ann", "x", "24h", StreamState.OPEN, now, now), 2)
    assert [each.id for each in store.streams.page("ann", 9)] == [second, first]
    with pytest.raises(NotFound):
        store.streams.get("no")


# -- stored chats


def chat(number: int, owner: str = "ann", **facts: Any) -> StoredChat:
    given = {"model": "m", "created_at": 1000.0 + number, "expires_at": time.time() + 60}
    return StoredChat(f"chatcmpl-{number}", owner, **given | facts)


def test_stored_chats_in_pages(store: Store):
    for number in range(4):
        store.chats.add(chat(number, metadata={"even": str(number % 2 == 0)}))
    store.chats.add(chat(9, "bob"))
    first, more = store.chats.page("ann", limit=3)
    rest, _ = store.chats.page("ann", limit=3, after=first[-1].id)
    assert [each.id for each in first + rest] == [f"chatcmpl-{n}" for n in range(4)] and more
    even, _ = store.chats.page("ann", limit=9, metadata={"even": "True"}, newest_first=True)
    assert [each.id for each in even] == ["chatcmpl-2", "chatcmpl-0"]
    assert store.chats.page("ann", limit=9, model="other") == ([], False)
    with pytest.raises(NotFound):
        store.chats.page("ann", limit=9, after="chatcmpl-9")


@pytest.mark.parametrize("key", ["a", 'a"b', "a.b", "a[0]", "$", "", "ä"])
def test_stored_chats_are_found_by_any_key(store: Store, key: str):
    store.chats.add(chat(1, metadata={key: "x", "other": "y"}))
    store.chats.add(chat(2, metadata={key: "z"}))
    store.chats.add(chat(3))
    found, _ = store.chats.page("ann", limit=9, metadata={key: "x", "other": "y"})
    assert [each.id for each in found] == ["chatcmpl-1"]


def test_a_page_of_stored_chats_leaves_their_requests_out(store: Store):
    store.chats.add(chat(1, request={"messages": ["long"]}, answer={"id": "chatcmpl-1"}))
    [found], _ = store.chats.page("ann", limit=9)
    assert (found.request, found.answer) == ({}, {"id": "chatcmpl-1"})
    assert store.chats.get(found.id).request == {"messages": ["long"]}


def test_a_stored_chat_changes_and_goes(store: Store):
    store.chats.add(chat(1))
    store.chats.add(chat(2, expires_at=time.time() - 1))
    assert store.chats.change("chatcmpl-1", {"a": "b"}).metadata == {"a": "b"}
    assert store.chats.sweep(time.time()) == 1
    store.chats.delete("chatcmpl-1")
    for name in ("chatcmpl-1", "chatcmpl-2", "a\0"):
        with pytest.raises(NotFound):
            store.chats.get(name)


def test_racing_requests_with_one_key_make_one(store: Store, other: Store):
    once = Once("ann", "responses", "k", b"1" * 32)
    given = race_of([store, other] * 3, lambda s, _: s.responses.add(response(), once=once).id)
    assert codes(given) == [] and len(set(given)) == 1
