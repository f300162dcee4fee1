"""Keys: made, found by digest, revoked once and for good."""

import time

import pytest

from llm_engine.errors import Conflict, NotFound
from tests.stores.making import LIMIT, codes, key, kinds, race_of


def test_a_key_is_found_by_its_digest_on_every_replica(store, other):
    first, second = key(), key("ben", expires_at=1e10 + 0.123456, scopes=())
    for record in (first, second):
        store.keys.add(record, LIMIT)
    assert other.keys.find([first.digest]) == [first]
    assert other.keys.find([second.digest, b"nobody's"]) == [second]
    assert other.keys.find([]) == []
    assert sorted(other.keys.find({first.digest, second.digest}), key=lambda k: k.owner) == [
        first,
        second,
    ]
    assert kinds(store, first.id) == ["key.created"]


def test_an_owner_sees_their_own_keys_oldest_first(store):
    records = []
    for owner in ("ann", "ben", "ann"):
        records.append(key(owner))
        store.keys.add(records[-1], LIMIT)
        time.sleep(0.002)  # ids sort by milliseconds
    assert store.keys.all() == records
    assert store.keys.all("ann") == [records[0], records[2]]
    assert store.keys.all("nobody") == []


def test_a_revoked_key_stays_revoked_from_the_first_time_on(store):
    record = key()
    store.keys.add(record, LIMIT)
    before = time.time()
    revoked = store.keys.revoke(record.id)
    assert before <= revoked.revoked_at <= time.time()
    assert store.keys.revoke(record.id, "ann") == revoked
    assert store.keys.find([record.digest]) == [revoked]
    assert kinds(store, record.id) == ["key.created", "key.revoked"]


def test_of_many_who_revoke_a_key_all_succeed_and_one_did_it(store, other):
    record = key()
    store.keys.add(record, LIMIT)
    given = race_of([store, other] * 4, lambda each, _: each.keys.revoke(record.id))
    assert set(given) == {store.keys.all()[0]}
    assert kinds(store, record.id) == ["key.created", "key.revoked"]


@pytest.mark.parametrize("known", [True, False])
def test_another_owners_key_cannot_be_told_from_one_that_never_was(store, known):
    record = key()
    if known:
        store.keys.add(record, LIMIT)
    with pytest.raises(NotFound) as refused:
        store.keys.revoke(record.id, "ben")
    assert refused.value.code == "key_not_found"
    assert refused.value.message == f"There is no key '{record.id}'."
    assert store.keys.all() == [record] * known
    assert kinds(store, record.id) == ["key.created"] * known


def test_what_postgresql_knows_no_text_for_is_no_key(store):
    with pytest.raises(NotFound) as refused:
        store.keys.revoke("\0")
    assert refused.value.code == "key_not_found"


def test_the_limit_is_kept_and_revoked_keys_make_room(store):
    records = [key(), key()]
    for record in records:
        store.keys.add(record, 2)
    with pytest.raises(Conflict) as refused:
        store.keys.add(key(), 2)
    assert refused.value.code == "too_many_keys"
    assert {each.id for each in store.keys.all()} == {each.id for each in records}
    store.keys.revoke(records[0].id)
    third = key()
    store.keys.add(third, 2)
    assert {each.id for each in store.keys.all()} == {records[1].id, third.id}


def test_the_limit_is_kept_by_those_who_add_at_once(store, other):
    given = race_of([store, other] * 6, lambda each, _: each.keys.add(key(), 3))
    assert len(store.keys.all()) == 3
    assert codes(given) == ["too_many_keys"] * 9
