"""Files, uploads and idempotency keys as records, and what a sweep takes away."""

import time
from dataclasses import replace

import pytest

from llm_engine import files
from llm_engine.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    StorageUnavailable,
    StoreUnavailable,
)
from llm_engine.statuses import BatchState
from llm_engine.storage.local import LocalStorage
from llm_engine.store.idempotency import KEPT_S, Once
from llm_engine.store.uploads import GRACE_S
from tests.stores.making import batch, codes, file, part, race_of, upload

DIGEST, OTHER_DIGEST = b"d" * 32, b"e" * 32
ONCE = Once("ann", "files", "k", DIGEST)


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(tmp_path / "storage")


def stored(storage, prefix=""):
    return [each.key for each in storage.list(prefix)]


def add(store, **facts):
    return store.files.add(file(**facts))


def past(seconds=1):
    return time.time() - seconds


# -- files


def test_what_was_added_is_read_back_as_it_was_written(store, other):
    record = file(bytes=2**40, filename="häßlich 文件.jsonl", expires_at=time.time() + 60)
    assert store.files.add(record) == record
    assert other.files.get(record.id) == record


def test_an_expired_file_is_as_good_as_gone(store):
    gone = add(store, expires_at=past())
    with pytest.raises(NotFound):
        store.files.get(gone.id)
    with pytest.raises(NotFound):
        store.files.expire(gone.id)
    assert store.files.page("ann", limit=10) == ([], False)
    assert store.files.expired(time.time(), 10) == [gone]


def test_to_expire_is_at_once_and_only_once(store, other):
    record = add(store)
    store.files.expire(record.id)
    for again in (other.files.get, other.files.expire):
        with pytest.raises(NotFound):
            again(record.id)


@pytest.mark.parametrize("id", ["file-none", "", "file-\0", "x" * 5000, "'; --", "ﬁle-1"])
def test_an_id_that_is_none_is_not_found(store, id):
    for ask in (store.files.get, store.uploads.get):
        with pytest.raises(NotFound):
            ask(id)


@pytest.mark.parametrize("newest_first", [True, False])
def test_pages_go_through_all_of_an_owners_files(store, newest_first):
    mine = sorted((add(store) for _ in range(7)), key=lambda r: r.id, reverse=newest_first)
    add(store, owner="ben")
    seen, after, more = [], None, True
    while more:
        page, more = store.files.page("ann", limit=3, after=after, newest_first=newest_first)
        seen += page
        after = page[-1].id
    assert seen == mine
    assert len(store.files.page(None, limit=100)[0]) == 8


def test_a_page_goes_on_after_a_file_that_was_deleted_meanwhile(store):
    oldest, middle, newest = (add(store) for _ in range(3))
    assert store.files.page("ann", limit=2) == ([newest, middle], True)
    store.files.remove(middle.id)
    assert store.files.page("ann", limit=2, after=middle.id) == ([oldest], False)


def test_a_page_of_one_purpose(store):
    wanted = add(store, purpose="vision")
    add(store)
    assert store.files.page("ann", limit=9, purpose="vision") == ([wanted], False)


def test_the_limit_is_an_owners_and_counts_what_is_being_uploaded(store):
    store.files.add(file(), limit=3)
    store.uploads.create(upload(), limit=3)
    add(store, expires_at=past())  # does not count
    add(store, owner="ben")  # nor does this
    store.files.add(file(), limit=3)
    for one_more in (lambda: store.files.add(file(), 3), lambda: store.uploads.create(upload(), 3)):
        with pytest.raises(Conflict, match=r"files\.max_files") as refused:
            one_more()
        assert (refused.value.code, refused.value.status) == ("too_many_files", 400)


# -- the store takes a record, and its answer is lost


def deaf(monkeypatch, part_of_store, name):
    """What it does is done, and then it falls silent."""
    real = getattr(part_of_store, name)

    def call(*given, **named):
        real(*given, **named)
        raise StoreUnavailable("The store does not answer now.")

    monkeypatch.setattr(part_of_store, name, call)


def test_a_file_whose_record_may_be_there_keeps_its_bytes(store, storage, monkeypatch):
    deaf(monkeypatch, store.files, "add")
    with pytest.raises(StoreUnavailable):
        keep(storage, store)
    [[there], _] = store.files.page("ann", limit=10)
    assert b"".join(storage.read(there.key)) == b"abcde"
    assert files.sweep_orphans(storage, store, time.time() + 2 * files.ORPHAN_S) == 0


def test_an_upload_that_may_be_complete_keeps_its_bytes(store, storage, monkeypatch):
    begun, parts = with_bytes(storage, store, b"a", b"bc")
    deaf(monkeypatch, store.uploads, "complete")
    with pytest.raises(StoreUnavailable):
        files.assemble(storage, store, begun, parts, None, ONCE)
    done = store.uploads.get(begun.id)
    assert done.status == "completed"
    assert b"".join(storage.read(files.key_of(done.file_id))) == b"abc"


def test_bytes_without_a_record_go_after_a_while(store, storage):
    kept = keep(storage, store)
    expected = store.batches.create(batch(output_file_id="file-soon"), 10)
    for name in ("file-nobodys", "file-soon"):
        storage.put(files.key_of(name), b"x")
    later = time.time() + files.ORPHAN_S
    assert files.sweep_orphans(storage, store, later - 60) == 0  # it may be on its way
    assert files.sweep_orphans(storage, store, later + 60) == 1
    assert stored(storage, "files/") == sorted([kept.key, files.key_of("file-soon")])
    store.batches.end(expected, BatchState.FAILED, output_file_id=None)
    assert files.sweep_orphans(storage, store, later + 60) == 1


# -- idempotency


def test_a_key_stands_for_what_it_made_first(store, other):
    assert store.idempotency.find(*ONCE) is None
    assert store.idempotency.remember(*ONCE, "file-1") == "file-1"
    assert other.idempotency.remember(*ONCE, "file-2") == "file-1"
    assert other.idempotency.find(*ONCE) == "file-1"


def test_a_key_with_another_body_is_a_conflict(store):
    store.idempotency.remember(*ONCE, "file-1")
    for ask in (lambda once: store.idempotency.find(*once),
                lambda once: store.idempotency.remember(*once, "file-2")):  # fmt: skip
        with pytest.raises(Conflict) as refused:
            ask(ONCE._replace(digest=OTHER_DIGEST))
        assert refused.value.code == "idempotency_key_reused"


def test_a_key_is_its_owners_and_its_routes(store):
    store.idempotency.remember(*ONCE, "file-1")
    for other in (ONCE._replace(owner="ben"), ONCE._replace(route="batches")):
        assert store.idempotency.find(*other) is None
        assert store.idempotency.remember(*other, "file-2") == "file-2"


def test_of_many_with_one_key_one_makes_the_file(store, other):
    given = race_of([store, other] * 4, lambda each, _: each.files.add(file(), once=ONCE))
    assert len({record.id for record in given}) == 1
    assert [r.id for r in store.files.page("ann", limit=9)[0]] == [given[0].id]


def test_of_many_with_one_key_and_different_bodies_one_is_taken(store, other):
    given = race_of(
        [store, other] * 3,
        lambda each, n: each.files.add(file(), once=ONCE._replace(digest=bytes([n]) * 32)),
    )
    assert codes(given) == ["idempotency_key_reused"] * 5
    assert len(store.files.page("ann", limit=9)[0]) == 1


def test_a_key_is_free_again_once_its_file_is_deleted(store):
    first = store.files.add(file(), once=ONCE)
    store.files.expire(first.id)
    second = store.files.add(file(), once=ONCE)
    assert second.id != first.id and store.files.get(second.id) == second


def test_a_refused_file_leaves_its_key_free(store):
    add(store)
    with pytest.raises(Conflict):
        store.files.add(file(), limit=1, once=ONCE)
    assert store.idempotency.find(*ONCE) is None


def test_keys_are_kept_for_a_day(store, monkeypatch):
    store.idempotency.remember(*ONCE, "file-1")
    assert store.idempotency.forget_old(time.time()) == 0
    later = time.time() + KEPT_S
    monkeypatch.setattr(time, "time", lambda: later)
    assert store.idempotency.find(*ONCE) is None
    assert store.idempotency.remember(*ONCE._replace(digest=OTHER_DIGEST), "file-2") == "file-2"
    assert store.idempotency.forget_old(later + KEPT_S) == 1


# -- uploads


def pending(store, *sizes, **facts):
    """An upload with parts of these sizes."""
    record = store.uploads.create(upload(bytes=sum(sizes), **facts), 100)
    parts = [store.uploads.add_part(part(record, size), 10, 10**9) for size in sizes]
    return record, parts


def test_an_upload_and_its_parts_are_read_back(store, other):
    record, parts = pending(store, 3, 4, file_expires_after_s=7200)
    assert other.uploads.get(record.id) == record
    assert other.uploads.parts(record.id) == {each.id: each for each in parts}


def test_a_completed_upload_has_its_file_and_no_parts(store):
    record, _ = pending(store, 3, 4)
    made = store.uploads.complete(record.id, file(), ONCE)
    assert made == replace(record, status="completed", file_id=made.file_id)
    assert store.files.get(made.file_id).id == made.file_id
    assert store.uploads.parts(record.id) == {}


def test_of_many_completions_one_makes_the_file(store, other):
    record, _ = pending(store, 7)
    given = race_of([store, other] * 4, lambda e, _: e.uploads.complete(record.id, file(), ONCE))
    assert len({each.file_id for each in given}) == 1
    assert len(store.files.page("ann", limit=99)[0]) == 1


def test_completing_and_cancelling_at_once_does_one_of_them(store, other):
    record, _ = pending(store, 7)

    def end(each, number):
        if number % 2:
            return each.uploads.cancel(record.id)
        return each.uploads.complete(record.id, file(), ONCE)

    race_of([store, other] * 3, end)
    ended = store.uploads.get(record.id)
    assert ended.status in ("completed", "cancelled")
    assert (ended.file_id is not None) == (ended.status == "completed")
    assert len(store.files.page("ann", limit=99)[0]) == (ended.status == "completed")


@pytest.mark.parametrize("how", ["completed", "cancelled", "expired"])
def test_an_upload_that_has_ended_takes_no_part(store, how):
    late = {"expires_at": past()} if how == "expired" else {}
    record = store.uploads.create(upload(**late), 100)
    if how == "completed":
        store.uploads.complete(record.id, file(), ONCE)
    elif how == "cancelled":
        assert store.uploads.cancel(record.id).status == how
        assert store.uploads.cancel(record.id).status == how  # again does nothing
    assert store.uploads.get(record.id).status == how
    with pytest.raises(InvalidRequest, match=how) as refused:
        store.uploads.add_part(part(record), 10, 1000)
    assert (refused.value.status, refused.value.code) == (400, f"upload_{how}")
    if how != "cancelled":
        with pytest.raises(InvalidRequest, match=how):
            store.uploads.cancel(record.id)


def test_parts_are_bounded_in_number_and_bytes(store, other):
    record, _ = pending(store, 3)
    with pytest.raises(InvalidRequest, match=r"files\.max_parts"):
        store.uploads.add_part(part(record), 1, 1000)
    with pytest.raises(InvalidRequest, match="larger"):
        store.uploads.add_part(part(record, 5), 10, 7)
    given = race_of([store, other] * 4, lambda e, _: e.uploads.add_part(part(record), 4, 1000))
    assert codes(given) == ["too_many_parts"] * 5
    assert len(store.uploads.parts(record.id)) == 4


# -- the sweep


def keep(storage, store, **facts):
    given = {"owner": "ann", "purpose": "vision", "filename": "a", "pieces": [b"abc", b"de"]}
    return files.keep(storage, store, **given | facts)


def test_a_kept_file_is_in_both_and_a_discarded_one_in_neither(storage, store):
    record = keep(storage, store)
    assert b"".join(storage.read(record.key)) == b"abcde" and record.bytes == 5
    files.discard(storage, store, record.id)
    assert stored(storage) == [] and store.files.expired(time.time(), 9) == []
    with pytest.raises(NotFound):
        files.discard(storage, store, record.id)


def test_files_of_batches_go_after_thirty_days_and_others_never(storage, store):
    kept = keep(storage, store, purpose="batch")
    assert kept.expires_at == kept.created_at + 30 * 86400
    assert keep(storage, store).expires_at is None


class Stubborn(LocalStorage):
    """Deletes nothing until it is told that it can."""

    works = False

    def delete(self, key):
        if not self.works:
            raise StorageUnavailable("not now")
        super().delete(key)


def test_what_cannot_be_deleted_now_is_gone_all_the_same_and_swept_later(tmp_path, store):
    storage = Stubborn(tmp_path / "storage")
    record = keep(storage, store)
    files.discard(storage, store, record.id)
    with pytest.raises(NotFound):
        store.files.get(record.id)
    with pytest.raises(StorageUnavailable):
        files.sweep(storage, store, time.time())
    storage.works = True
    assert files.sweep(storage, store, time.time()) == 1
    assert stored(storage) == [] and files.sweep(storage, store, time.time()) == 0


def test_a_sweep_takes_expired_files_and_leaves_the_others(storage, store):
    kept = keep(storage, store, expires_after_s=60)
    gone = [keep(storage, store, expires_after_s=-1) for _ in range(3)]
    assert files.sweep(storage, store, time.time()) == 3
    assert stored(storage) == [kept.key]
    for record in gone:
        with pytest.raises(NotFound):
            store.files.remove(record.id)


def test_a_sweep_does_a_bounded_number(storage, store, monkeypatch):
    monkeypatch.setattr(files, "MOST_SWEPT", 2)
    for _ in range(3):
        keep(storage, store, expires_after_s=-1)
    assert [files.sweep(storage, store, time.time()) for _ in range(3)] == [2, 1, 0]


def test_two_sweeps_at_once_take_each_file_once(storage, store, other):
    for _ in range(12):
        keep(storage, store, expires_after_s=-1)
    taken = race_of([store, other], lambda e, _: files.sweep(storage, e, time.time()))
    assert sum(taken) == 12 and stored(storage) == []


def with_bytes(storage, store, *pieces, **facts):
    record, parts = pending(store, *[len(piece) for piece in pieces], **facts)
    for each, piece in zip(parts, pieces, strict=True):
        storage.put(each.key, piece)
    return record, parts


def test_parts_become_a_file_in_the_order_that_is_asked_for(storage, store):
    record, (a, b) = with_bytes(storage, store, b"one", b"two!")
    made = files.assemble(storage, store, record, [b, a], None, ONCE)
    assert b"".join(storage.read(files.key_of(made.file_id))) == b"two!one"
    assert stored(storage) == [files.key_of(made.file_id)]


def test_assembling_twice_at_once_leaves_one_file(storage, store, other):
    record, parts = with_bytes(storage, store, b"x" * 2**20, b"y" * 2**20)
    given = race_of(
        [store, other] * 2,
        lambda each, _: files.assemble(storage, each, record, parts, None, ONCE),
    )
    assert set(codes(given)) <= {"upload_completed"}  # its parts went while it read them
    done = store.uploads.get(record.id)
    assert stored(storage) == [files.key_of(done.file_id)]
    assert len(store.files.page("ann", limit=9)[0]) == 1


def test_wrong_bytes_leave_the_upload_as_it_was(storage, store):
    record, parts = with_bytes(storage, store, b"one")
    with pytest.raises(InvalidRequest) as refused:
        files.assemble(storage, store, record, parts, "0" * 32, ONCE)
    assert (refused.value.param, refused.value.code) == ("md5", "md5_mismatch")
    assert stored(storage) == [parts[0].key] and store.uploads.get(record.id) == record


def test_a_sweep_ends_uploads_whose_time_is_over_and_forgets_them_a_day_later(storage, store):
    record, _ = with_bytes(storage, store, b"one", expires_at=time.time() + 60)
    storage.put(files.part_key(record.id, "part_lost"), b"of a gateway that died")
    open_, (its_part,) = with_bytes(storage, store, b"two", expires_at=time.time() + 2 * 86400)
    over = record.expires_at + GRACE_S
    assert files.sweep(storage, store, over - 1) == 0  # a completion may be under way
    assert files.sweep(storage, store, over) == 1
    assert stored(storage) == [its_part.key] and store.uploads.parts(record.id) == {}
    assert store.uploads.get(record.id).status == "expired"
    assert files.sweep(storage, store, record.expires_at + KEPT_S) == 1
    with pytest.raises(NotFound):
        store.uploads.get(record.id)
    assert store.uploads.get(open_.id) == open_


# -- the first line of a batch's input

LONG = b"x" * files.FirstLine.LONGEST


@pytest.mark.parametrize("size", [1, 7, 100])
@pytest.mark.parametrize(
    "text",
    [b'{"a": 1}', b'\xef\xbb\xbf{"a": 1}\n', b'\n \r\n{"a": 1}\r\nnonsense', b"{}"],
    ids=["plain", "bom", "blank lines", "smallest"],
)
def test_a_first_line_that_is_an_object_will_do(text, size):
    fed(text, size).check()


@pytest.mark.parametrize("text", [b'{"a": "' + LONG + b'"}', b"\n" * 3 * len(LONG) + b"{}"])
def test_a_long_line_and_millions_of_blank_ones_are_no_matter(text):
    fed(text, 2**20).check()
    fed(text, 2**16).check()


@pytest.mark.parametrize("size", [1, 7, 2**20])
@pytest.mark.parametrize(
    ("text", "code"),
    [(b"", "empty_file"), (b" \r\n\n\t", "empty_file"), (b"\xef\xbb\xbf", "empty_file"),
     (b"x", "invalid_json_line"), (b"[1]\n{}", "invalid_json_line"), (b"1", "invalid_json_line"),
     (b'{"a": 1', "invalid_json_line"), (b"null\n", "invalid_json_line"),
     (b"\xff\xfe{}", "invalid_json_line"), (b"{\n}", "invalid_json_line"),
     (b"{}\xef\xbb\xbf{}", "invalid_json_line")],
)  # fmt: skip
def test_any_other_first_line_will_not(text, code, size):
    with pytest.raises(InvalidRequest) as refused:
        fed(text, size).check()
    assert refused.value.code == code


def test_a_long_line_must_at_least_begin_like_an_object():
    with pytest.raises(InvalidRequest):
        fed(b"[" + LONG, 2**20).check()


def fed(text, size):
    line = files.FirstLine()
    for start in range(0, len(text), size):
        line.feed(text[start : start + size])
    return line
