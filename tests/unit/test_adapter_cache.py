"""Adapters on a node's disk."""

import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from llm_engine.engine import adapter_cache
from llm_engine.engine.adapter_cache import AdapterCache
from llm_engine.errors import StorageUnavailable
from llm_engine.fine_tunes.adapters import AdapterBroken, publish
from llm_engine.storage.base import NoSuchObject
from llm_engine.storage.local import LocalStorage
from tests.support.adapters import adapter, folder_of

SIZE = 1_000


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "storage")


@pytest.fixture
def published(tmp_path: Path, storage: LocalStorage):
    def publish_one(weights: bytes = b"w" * SIZE) -> str:
        made = adapter()
        publish(storage, folder_of(tmp_path / "trained" / made.id, weights), made)
        return made.id

    return publish_one


def cache_of(tmp_path: Path, storage: LocalStorage, max_bytes: int = 10 * SIZE) -> AdapterCache:
    return AdapterCache(storage, tmp_path / "cache", max_bytes)


def kept(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()}


def test_an_adapter_is_fetched_once_and_read_from_here_afterwards(tmp_path, storage, published):
    one = published()
    with_storage = cache_of(tmp_path, storage)
    opened = with_storage.open(one)
    assert (opened.path / "adapter_model.safetensors").read_bytes() == b"w" * SIZE
    assert opened.manifest.weights == "none" and opened.manifest.rank == 8
    opened.close()
    for cache in (with_storage, cache_of(tmp_path, LocalStorage(tmp_path / "gone"))):
        cache.open(one).close()


def test_what_there_is_not(tmp_path, storage):
    cache = cache_of(tmp_path, storage)
    for name in ("adapter-0", "../../etc", "", "a/b", "x" * 300):
        with pytest.raises(NoSuchObject):
            cache.open(name)
    assert not list((tmp_path / "cache").iterdir()), "no locks are left behind"


def test_damaged_bytes_in_the_storage_are_refused_and_good_ones_taken_later(
    tmp_path, storage, published
):
    one = published()
    key = f"adapters/{one}/adapter_model.safetensors"
    good = b"".join(storage.read(key))
    storage.put(key, b"x" + good[1:])
    cache = cache_of(tmp_path, storage)
    with pytest.raises(AdapterBroken, match="damaged"):
        cache.open(one)
    assert kept(tmp_path) == set()
    storage.put(key, good)
    cache.open(one).close()


@pytest.mark.parametrize("damage", ["changed", "cut", "missing", "manifest"])
def test_damaged_bytes_on_the_disk_are_fetched_anew(tmp_path, storage, published, damage):
    one = published()
    cache_of(tmp_path, storage).open(one).close()
    weights = tmp_path / "cache" / one / "adapter_model.safetensors"
    match damage:
        case "changed":
            weights.write_bytes(b"v" * SIZE)
        case "cut":
            weights.write_bytes(b"w")
        case "missing":
            weights.unlink()
        case "manifest":
            (tmp_path / "cache" / f"{one}.json").write_text("{")
    opened = cache_of(tmp_path, storage).open(one)  # another process: it compares anew
    assert (opened.path / "adapter_model.safetensors").read_bytes() == b"w" * SIZE
    opened.close()


def test_an_adapter_that_is_damaged_and_in_use_elsewhere_is_told_not_waited_for(
    tmp_path, storage, published, monkeypatch
):
    monkeypatch.setattr(adapter_cache, "LONGEST_S", 0.2)
    one = published()
    opened = cache_of(tmp_path, storage).open(one)
    (opened.path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(OSError, match="in use"):
        cache_of(tmp_path, storage).open(one)
    opened.close()


def test_the_least_recently_used_go_but_none_that_an_engine_has_loaded(
    tmp_path, storage, published
):
    cache = cache_of(tmp_path, storage, max_bytes=4 * SIZE)
    loaded, *others = [published() for _ in range(5)]
    opened = cache.open(loaded)
    for each in others[:3]:
        time.sleep(0.01)
        cache.open(each).close()
    # Each is a little larger than SIZE: three fit.
    assert kept(tmp_path) == {loaded, *others[1:3]}
    time.sleep(0.01)
    cache.open(others[1]).close()
    time.sleep(0.01)
    cache.open(others[3]).close()
    assert kept(tmp_path) == {loaded, others[1], others[3]}
    opened.close()
    time.sleep(0.01)
    cache.open(others[0]).close()
    assert loaded not in kept(tmp_path)


def test_one_that_is_larger_than_the_bound_is_served_all_the_same(tmp_path, storage, published):
    cache = cache_of(tmp_path, storage, max_bytes=10)
    opened = cache.open(published())
    assert opened.path.is_dir()
    opened.close()


def test_a_deleted_one_goes_once_nobody_has_it_loaded(tmp_path, storage, published):
    one = published()
    cache, neighbour = cache_of(tmp_path, storage), cache_of(tmp_path, storage)
    mine, theirs = cache.open(one), neighbour.open(one)
    mine.close()
    assert not cache.remove(one)
    theirs.close()
    assert neighbour.remove(one) and neighbour.remove(one)
    assert not list((tmp_path / "cache").iterdir())


def test_what_killed_engines_have_left_goes(tmp_path, storage, published):
    cache = cache_of(tmp_path, storage)
    one = published()
    cache.open(one).close()
    folder_of(tmp_path / "cache" / "adapter-half")  # without its manifest
    old, new = (folder_of(tmp_path / "cache" / f".adapter-{n}.0") for n in ("old", "new"))
    os.utime(old, (0, 0))
    cache.open(published()).close()
    assert {"adapter-half", old.name} & kept(tmp_path) == set()
    assert {one, new.name} <= kept(tmp_path)


def test_an_outage_of_the_storage_is_told(tmp_path, storage, published, monkeypatch):
    one = published()

    def away(*_: object) -> None:
        raise StorageUnavailable("away")

    monkeypatch.setattr(storage, "read", away)
    with pytest.raises(StorageUnavailable):
        cache_of(tmp_path, storage).open(one)


def test_many_threads_fetch_once(tmp_path, storage, published, monkeypatch):
    one, fetched = published(), []
    fetch = adapter_cache.fetch

    def slow(*args: object):
        fetched.append(args)
        time.sleep(0.2)
        return fetch(*args)

    monkeypatch.setattr(adapter_cache, "fetch", slow)
    caches = [cache_of(tmp_path, storage) for _ in range(5)]
    threads = [threading.Thread(target=lambda c=c: c.open(one).close()) for c in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1


def _use(folder: Path, adapters: list[str], failures) -> None:
    """As an engine: loads, looks, unloads, while others make room."""
    cache = AdapterCache(LocalStorage(folder / "storage"), folder / "cache", 3 * SIZE)
    for _ in range(20):
        for each in adapters:
            opened = cache.open(each)
            try:
                if len((opened.path / "adapter_model.safetensors").read_bytes()) != SIZE:
                    failures.put("short")
            except OSError as error:
                failures.put(str(error))
            finally:
                opened.close()


def test_engines_that_share_a_folder_do_not_take_it_from_under_each_other(
    tmp_path, storage, published
):
    adapters = [published() for _ in range(6)]
    context = multiprocessing.get_context("spawn")
    failures = context.Queue()
    users = [
        context.Process(target=_use, args=(tmp_path, adapters[i:] + adapters[:i], failures))
        for i in range(3)
    ]
    for user in users:
        user.start()
    for user in users:
        user.join(60)
        assert user.exitcode == 0
    assert failures.empty()
