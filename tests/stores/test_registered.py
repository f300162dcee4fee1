"""Registered models: an owner's names are their own."""

import pytest

from llm_engine.errors import Conflict, NotFound
from tests.stores.making import LIMIT, codes, kinds, model, race_of


def test_what_was_registered_is_read_back_as_it_was_written(store, other):
    record = model(
        url="https://models.example/v1", sealed_key=bytes(range(256)), max_token_count=4096,
        max_output_token_count=1024, fallback="m", public=True,
    )  # fmt: skip
    store.registered.add(record, LIMIT)
    assert other.registered.get(record.id) == record
    assert other.registered.all() == [record]
    assert kinds(store, record.id) == ["model.created"]


def test_a_name_is_unique_to_its_owner_and_free_for_others(store):
    mine, theirs = model("ann", "fast"), model("ben", "fast")
    store.registered.add(mine, LIMIT)
    store.registered.add(theirs, LIMIT)
    with pytest.raises(Conflict) as refused:
        store.registered.add(model("ann", "fast"), LIMIT)
    assert (refused.value.code, refused.value.param) == ("name_taken", "name")
    assert sorted(record.id for record in store.registered.all()) == sorted([mine.id, theirs.id])


def test_of_many_who_register_one_name_one_gets_it(store, other):
    given = race_of([store, other] * 4, lambda each, _: each.registered.add(model(), LIMIT))
    assert codes(given) == ["name_taken"] * 7
    assert len(store.registered.all()) == 1


def test_the_limit_is_kept_and_one_that_goes_makes_room(store):
    first = model(name="a")
    store.registered.add(first, 1)
    with pytest.raises(Conflict) as refused:
        store.registered.add(model(name="b"), 1)
    assert refused.value.code == "too_many_models"
    store.registered.remove(first.id)
    store.registered.add(model(name="b"), 1)


def test_the_limit_is_kept_by_those_who_register_at_once(store, other):
    race_of([store, other] * 6, lambda each, n: each.registered.add(model(name=f"m{n}"), 3))
    assert len(store.registered.all()) == 3


def test_a_change_changes_what_it_names_and_nothing_else(store):
    record = model(sealed_key=b"sealed", url="https://a.example")
    store.registered.add(record, LIMIT)
    changed = store.registered.change(record.id, model="other", sealed_key=None)
    assert (changed.model, changed.sealed_key, changed.url) == ("other", None, "https://a.example")
    assert changed.updated_at > record.updated_at and changed.created_at == record.created_at
    assert store.registered.get(record.id) == changed
    assert kinds(store, record.id) == ["model.created", "model.changed"]


def test_a_new_name_must_be_free(store):
    a, b, theirs = model(name="a"), model(name="b"), model("ben", "c")
    for record in (a, b, theirs):
        store.registered.add(record, LIMIT)
    with pytest.raises(Conflict) as refused:
        store.registered.change(a.id, name="b", model="other")
    assert (refused.value.code, refused.value.param) == ("name_taken", "name")
    assert store.registered.get(a.id) == a
    assert kinds(store, a.id) == ["model.created"]
    assert store.registered.change(a.id, name="c").name == "c", "that is only another owner's"
    assert store.registered.change(b.id, name="a").name == "a", "it is free by now"


def test_what_is_not_there_is_not_found(store):
    for attempt in (
        lambda: store.registered.get("model_0"),
        lambda: store.registered.change("model_0", name="a"),
        lambda: store.registered.remove("model_0"),
    ):
        with pytest.raises(NotFound) as refused:
            attempt()
        assert refused.value.code == "model_not_found"
    assert kinds(store, "model_0") == []


def test_a_model_is_removed_once(store):
    record = model()
    store.registered.add(record, LIMIT)
    store.registered.remove(record.id)
    with pytest.raises(NotFound):
        store.registered.remove(record.id)
    assert kinds(store, record.id) == ["model.created", "model.deleted"]
    store.registered.add(model(), LIMIT)


def test_of_many_who_remove_a_model_one_did_it(store, other):
    record = model()
    store.registered.add(record, LIMIT)
    stores = [store, other] * 4
    given = race_of(stores, lambda each, _: each.registered.remove(record.id))
    assert codes(given) == ["model_not_found"] * (len(stores) - 1)
    assert kinds(store, record.id) == ["model.created", "model.deleted"]
