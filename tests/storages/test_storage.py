"""What every storage promises: the folder, S3 as moto plays it, S3 as Ceph serves it."""

import os
import threading
import time
import tracemalloc
from collections.abc import Iterator

import pytest

from llm_engine.errors import StoreUnavailable
from llm_engine.storage import ownership, s3
from llm_engine.storage.base import CHUNK, NoSuchObject, Storage, is_key

MB = 10**6
HARD_KEYS = [
    "with space/a b",
    "grüße/файл/文件 🙂",
    "signs/a+b=c&d?e#f%20g;h:i@j!k*l'm(n)~o",
    "names/.hidden",
    "long/" + "x" * 255,
]


def whole(storage: Storage, key: str, *area: int) -> bytes:
    return b"".join(storage.read(key, *area))


def keys(storage: Storage, prefix: str) -> list[str]:
    return [found.key for found in storage.list(prefix)]


# Writing.


def test_what_is_put_is_read(storage):
    storage.put("a/b", b"hello")
    assert whole(storage, "a/b") == b"hello"


def test_an_object_may_be_empty(storage):
    storage.put("empty", b"")
    assert whole(storage, "empty") == b""
    assert storage.stat("empty").bytes == 0


def test_stat_tells_size_and_time(storage):
    before = time.time()
    storage.put("a/b", b"hello")
    found = storage.stat("a/b")
    assert (found.key, found.bytes) == ("a/b", 5)
    assert before - 2 < found.modified_at < time.time() + 2


@pytest.mark.parametrize("size", [3, s3.PART + 3], ids=["small", "in parts"])
def test_an_object_is_there_once_its_writer_ends(storage, size):
    with storage.writer("a/b") as writer:
        writer.write(bytes(size - 1))
        assert storage.stat("a/b") is None
        assert keys(storage, "") == []
        writer.write(b"!")
        assert writer.bytes == size
    assert storage.stat("a/b").bytes == size
    assert whole(storage, "a/b", size - 2) == b"\0!"


@pytest.mark.parametrize("size", [3, s3.PART + 3], ids=["small", "in parts"])
def test_an_exception_leaves_what_was_there(storage, size):
    storage.put("a/b", b"old")
    with pytest.raises(KeyError), storage.writer("a/b") as writer:
        writer.write(bytes(size))
        raise KeyError
    assert whole(storage, "a/b") == b"old"


@pytest.mark.parametrize("size", [3, s3.PART + 3], ids=["small", "in parts"])
def test_an_exception_leaves_nothing(storage, size):
    with pytest.raises(KeyError), storage.writer("a/b") as writer:
        writer.write(bytes(size))
        raise KeyError
    assert storage.stat("a/b") is None
    assert keys(storage, "") == []


def test_nothing_written_is_an_empty_object(storage):
    with storage.writer("a"):
        pass
    assert storage.stat("a").bytes == 0


def test_pieces_of_any_size_become_one_object(storage):
    pieces = [os.urandom(size) for size in (1, 0, s3.PART - 1, s3.PART, 2 * s3.PART + 7, 1)]
    with storage.writer("a") as writer:
        for piece in pieces:
            writer.write(piece)
    assert whole(storage, "a") == b"".join(pieces)


def test_of_writers_at_once_the_last_to_end_wins(storage):
    with storage.writer("a") as first:
        with storage.writer("a") as second:
            first.write(b"first")
            second.write(b"second")
        assert whole(storage, "a") == b"second"
    assert whole(storage, "a") == b"first"


def test_readers_see_the_old_bytes_or_the_new_ones(storage):
    """Never a mixture, and never nothing, however often it is replaced."""
    versions = [bytes([letter]) * 300_000 for letter in b"abcdefgh"]
    storage.put("a", versions[0])
    seen: list[bytes] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.append(whole(storage, "a"))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        for version in versions * 3:
            storage.put("a", version)
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert len(seen) > 3
    assert set(seen) <= set(versions)


def test_a_reader_who_has_begun_ends_with_what_it_began(storage):
    old, new = os.urandom(3 * CHUNK), os.urandom(3 * CHUNK)
    storage.put("a", old)
    pieces = storage.read("a")
    begun = next(pieces)
    storage.put("a", new)
    assert begun + b"".join(pieces) == old
    assert whole(storage, "a") == new


# Creating.


def test_create_says_whether_it_was_the_first(storage):
    assert storage.create("a/b", b"first") is True
    assert storage.create("a/b", b"second") is False
    assert whole(storage, "a/b") == b"first"


def test_create_after_delete(storage):
    storage.create("a/b", b"first")
    storage.delete("a/b")
    assert storage.create("a/b", b"second") is True


def test_of_twelve_who_create_at_once_one_wins(storage):
    for round in range(5):
        start = threading.Barrier(12)
        won: list[bytes] = []

        def create(name: bytes, round=round, start=start, won=won) -> None:
            start.wait()
            if storage.create(f"race/{round}", name):
                won.append(name)

        threads = [threading.Thread(target=create, args=(b"%d" % n,)) for n in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert whole(storage, f"race/{round}") == won[0]


# Reading.


@pytest.mark.parametrize(
    ("area", "expected"),
    [
        ((0,), b"0123456789"),
        ((3,), b"3456789"),
        ((3, 4), b"3456"),
        ((0, 1), b"0"),
        ((9, 1), b"9"),
        ((8, 100), b"89"),
        ((0, 100), b"0123456789"),
        ((5, 0), b""),
        ((10,), b""),
        ((10, 1), b""),
        ((11, 5), b""),
        ((10**12,), b""),
    ],
)
def test_ranges(storage, area, expected):
    storage.put("a", b"0123456789")
    assert whole(storage, "a", *area) == expected


@pytest.mark.parametrize("area", [(0,), (0, 0), (0, 5), (5, 5), (1,)])
def test_ranges_of_an_empty_object(storage, area):
    storage.put("a", b"")
    assert whole(storage, "a", *area) == b""


def test_pieces_have_a_largest_size(storage):
    storage.put("a", bytes(3 * CHUNK + 1))
    assert max(len(piece) for piece in storage.read("a")) <= CHUNK
    assert min(len(piece) for piece in storage.read("a")) > 0
    assert len(whole(storage, "a", 1, CHUNK + 5)) == CHUNK + 5


@pytest.mark.parametrize("area", [(), (5,), (0, 5), (0, 0)])
def test_what_is_not_there_is_told_before_the_first_piece(storage, area):
    with pytest.raises(NoSuchObject, match="a/b"):
        storage.read("a/b", *area)


def test_a_folder_is_no_object(storage):
    storage.put("a/b", b"x")
    assert storage.stat("a") is None
    storage.delete("a")
    assert whole(storage, "a/b") == b"x"
    with pytest.raises(NoSuchObject):
        storage.read("a")


def test_nothing_lies_under_an_object(storage):
    storage.put("a", b"x")
    assert storage.stat("a/b") is None
    storage.delete("a/b")
    assert keys(storage, "a/b/") == []
    with pytest.raises(NoSuchObject):
        storage.read("a/b")


def test_readers_may_stop_at_any_time(storage):
    storage.put("a", bytes(3 * CHUNK))
    for _ in range(50):  # more than there are connections
        storage.read("a")
        next(storage.read("a"))
    assert len(whole(storage, "a")) == 3 * CHUNK


# Deleting and listing.


def test_delete_may_be_repeated(storage):
    storage.put("a/b", b"x")
    storage.delete("a/b")
    storage.delete("a/b")
    assert storage.stat("a/b") is None
    with pytest.raises(NoSuchObject):
        storage.read("a/b")


def test_lists_are_sorted_and_cut_by_prefix(storage):
    made = ["b/2", "a/b", "a-b", "a/b-c", "a.b", "a/c/d", "b/10", "b/1", "c", "é", "Z"]
    for key in made:
        storage.put(key, key.encode())
    assert keys(storage, "") == sorted(made)
    assert keys(storage, "a/") == ["a/b", "a/b-c", "a/c/d"]
    assert keys(storage, "a/b") == ["a/b", "a/b-c"]
    assert keys(storage, "a") == ["a-b", "a.b", "a/b", "a/b-c", "a/c/d"]
    assert keys(storage, "b/1") == ["b/1", "b/10"]
    assert keys(storage, "nothing") == keys(storage, "not/here/") == keys(storage, "c/") == []
    assert [(each.key, each.bytes) for each in storage.list("b/")] == [
        ("b/1", 3),
        ("b/10", 4),
        ("b/2", 3),
    ]


@pytest.mark.slow
def test_long_lists_are_complete(storage):
    made = [f"many/{n:05}" for n in range(1_203)]
    for key in made:
        storage.put(key, b"")
    assert keys(storage, "many/") == made


@pytest.mark.parametrize("key", HARD_KEYS)
def test_hard_keys(storage, key):
    storage.put(key, b"old")
    assert storage.create(key, b"x") is False
    with storage.writer(key) as writer:
        writer.write(bytes(s3.PART + 1))
    assert storage.stat(key).key == key
    assert whole(storage, key, 1, 2) == b"\0\0"
    assert keys(storage, "") == keys(storage, key) == [key]
    storage.delete(key)
    assert keys(storage, "") == []


NO_KEYS = ["", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/./b", ".unfinished/a"]
UNFIT_KEYS = ["a\0b", "a\nb", "a\ud800", "x" * 256, "y/" * 450 + "y"]


@pytest.mark.parametrize("key", [*NO_KEYS, *UNFIT_KEYS], ids=lambda key: repr(key)[:20])
def test_what_is_no_key_reaches_nothing(storage, key):
    assert not is_key(key)
    for use in (storage.writer, storage.read, storage.stat, storage.delete):
        with pytest.raises(ValueError, match="no key"):
            use(key)


def test_check_leaves_nothing(storage):
    storage.check()
    assert keys(storage, "") == []


def test_it_is_shown_without_secrets(storage):
    assert storage.shown.endswith(("/some/prefix", "/storage"))


def test_it_works_on_after_close(storage):
    storage.put("a", b"x")
    storage.close()
    assert whole(storage, "a") == b"x"


# Of many, and large.


def test_threads_share_it(storage):
    failures: list[BaseException] = []

    def work(name: int) -> None:
        try:
            for n in range(10):
                key, data = f"threads/{name}/{n}", os.urandom(1000)
                storage.put(key, data)
                assert whole(storage, key) == data
                storage.delete(key)  # and the folder with it, while others come
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n % 4,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert keys(storage, "threads/") == []


@pytest.mark.slow
def test_100_mb_stream_both_ways_with_flat_memory(storage):
    piece = os.urandom(MB)

    def send() -> None:
        with storage.writer("large") as writer:
            for _ in range(100):
                writer.write(piece)

    def receive(pieces: Iterator[bytes]) -> int:
        return sum(len(each) for each in pieces)

    storage.put("warm", b"")
    tracemalloc.start()
    try:
        send()
        assert storage.stat("large").bytes == 100 * MB
        assert receive(storage.read("large")) == 100 * MB
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 * MB
    assert whole(storage, "large", 99 * MB + 5, 10) == piece[5:15]


def test_a_storage_is_one_stores(storage):
    assert ownership.claim(storage, "store_a") is None
    assert ownership.claim(storage, "store_a") is None
    assert ownership.claim(storage, "store_b") == "store_a"
    with pytest.raises(StoreUnavailable):
        ownership.claim(storage, None)
