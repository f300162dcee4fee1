"""What one engine has in memory, and when."""

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from llm_engine.engine.adapter_cache import AdapterCache
from llm_engine.engine.adapters import AdapterFailed, Adapters, AdapterSource
from llm_engine.engine.base import AdapterProblem
from llm_engine.errors import StorageUnavailable
from llm_engine.fine_tunes.adapters import drop, publish
from llm_engine.storage.local import LocalStorage
from tests.support.adapters import adapter, folder_of


@dataclass
class Engine:
    """A host that looks whether it is used as an engine must be."""

    most: int
    has: dict[str, Path] = field(default_factory=dict)
    loads: Counter = field(default_factory=Counter)
    refuses: set[str] = field(default_factory=set)

    async def load(self, name: str, folder: Path) -> None:
        assert name not in self.has and (folder / "adapter_config.json").exists()
        await asyncio.sleep(0.01)
        if name in self.refuses:
            raise AdapterFailed(AdapterProblem.BROKEN, "it cannot be loaded")
        self.loads[name] += 1
        self.has[name] = folder
        assert len(self.has) <= self.most

    async def unload(self, name: str) -> None:
        assert self.has.pop(name).is_dir(), "its files stay until it is out"
        await asyncio.sleep(0)


class Fixture:
    def __init__(self, folder: Path, slots: int = 2, kept: int = 2) -> None:
        self.folder = folder
        self.storage = LocalStorage(folder / "storage")
        self.cache = AdapterCache(self.storage, folder / "cache", 10**6)
        self.engine = Engine(kept)
        self.adapters = Adapters(
            self.cache.open, self.cache.remove, self.engine,
            weights="none", slots=slots, kept=kept, most_waiting=100,
        )  # fmt: skip

    def publish(self, **values) -> str:
        made = adapter(**values)
        publish(self.storage, folder_of(self.folder / "trained" / made.id), made)
        return made.id

    async def ask(
        self, name: str, seconds: float = 0.0, until: asyncio.Event | None = None
    ) -> None:
        async with self.adapters.use(name):
            assert name in self.engine.has
            await asyncio.sleep(seconds)
            if until is not None:
                await until.wait()


@pytest.fixture
def made(tmp_path) -> Fixture:
    return Fixture(tmp_path)


async def test_requests_at_once_load_an_adapter_once(made):
    one = made.publish()
    await asyncio.gather(*(made.ask(one) for _ in range(20)))
    await made.ask(one)
    assert made.engine.loads == {one: 1} and made.adapters.loaded == (one,)


async def test_more_adapters_than_room_take_turns_and_the_least_used_goes(made):
    a, b, c = (made.publish() for _ in range(3))
    for name in (a, b, a, c):
        await made.ask(name)
    assert set(made.engine.has) == {a, c} and made.adapters.loaded == (a, c)
    await asyncio.gather(*(made.ask(name, 0.01) for name in (a, b, c) * 5))
    assert len(made.engine.has) == 2


async def test_more_may_be_kept_than_compute_at_a_time(tmp_path):
    made = Fixture(tmp_path, slots=1, kept=3)
    names = [made.publish() for _ in range(3)]
    await asyncio.gather(*(made.ask(name, 0.01) for name in names * 3))
    assert made.engine.loads == dict.fromkeys(names, 1)


async def test_what_is_missing_or_damaged_fails_by_itself(made):
    good, bad = made.publish(), made.publish()
    made.storage.put(f"adapters/{bad}/adapter_model.safetensors", b"x")
    for name, problem in ((bad, AdapterProblem.BROKEN), ("adapter-0", AdapterProblem.MISSING)):
        with pytest.raises(AdapterFailed) as failed:
            await made.ask(name)
        assert failed.value.problem is problem
    made.engine.refuses.add(good)
    with pytest.raises(AdapterFailed):
        await made.ask(good)
    made.engine.refuses.clear()
    await made.ask(good)
    assert made.adapters.loaded == (good,) and made.adapters.waiting == 0


async def test_an_outage_of_the_storage_hurts_only_what_is_not_here_yet(made, monkeypatch):
    here, there = made.publish(), made.publish()
    await made.ask(here)

    def away(*_: object) -> None:
        raise StorageUnavailable("away")

    monkeypatch.setattr(made.storage, "read", away)
    with pytest.raises(AdapterFailed) as failed:
        await made.ask(there)
    assert failed.value.problem is AdapterProblem.STORAGE and "away" in str(failed.value)
    await made.ask(here)


async def test_an_adapter_of_other_weights_is_not_loaded(made):
    other = made.publish(weights="builtin:chat")
    with pytest.raises(AdapterFailed) as failed:
        await made.ask(other)
    assert failed.value.problem is AdapterProblem.ELSEWHERE
    assert "builtin:chat" in str(failed.value) and not made.engine.has


async def test_a_deleted_adapter_goes_when_the_last_request_has_ended(made):
    one = made.publish()
    end = asyncio.Event()
    running = asyncio.create_task(made.ask(one, until=end))
    while one not in made.adapters.loaded:
        await asyncio.sleep(0.01)
    drop(made.storage, one)
    await made.adapters.forget([one, "adapter-unknown"])
    assert one in made.engine.has
    end.set()
    await running
    assert not made.engine.has and made.adapters.loaded == ()
    assert not any(path.name.startswith(one) for path in (made.folder / "cache").iterdir())
    with pytest.raises(AdapterFailed):
        await made.ask(one)


async def test_who_leaves_while_it_is_loaded_leaves_nothing_half_done(made):
    names = [made.publish() for _ in range(4)]
    for wait_s in (0, 0.001, 0.005, 0.012):
        tasks = [asyncio.create_task(made.ask(name)) for name in names]
        await asyncio.sleep(wait_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.gather(*(made.ask(name) for name in names))
    assert set(made.adapters.loaded) == set(made.engine.has) and len(made.engine.has) == 2
    assert not made.adapters._users and made.adapters.waiting == 0


async def test_a_storm_of_requests_deletions_and_departures(made):
    names = [made.publish() for _ in range(6)]

    async def one(number: int) -> None:
        task = asyncio.create_task(made.ask(names[number % 6], 0.003))
        if number % 5 == 0:
            await asyncio.sleep(0.001 * (number % 7))
            task.cancel()
        if number % 11 == 0:
            await made.adapters.forget([names[number % 6]])
        await asyncio.gather(task, return_exceptions=True)

    await asyncio.gather(*(one(n) for n in range(200)))
    assert set(made.adapters.loaded) == set(made.engine.has)
    assert not made.adapters._users and made.adapters.waiting == 0


def test_the_source_tells_where_and_no_secrets():
    from llm_engine.config import parse

    settings = parse({"storage": {"url": "s3://bucket/x"}, "cluster": {"state_dir": "/s"}}, {})
    source = AdapterSource.of(settings)
    assert source.storage["url"] == "s3://bucket/x" and source.folder == "/s/cache/adapters"
    assert "key" not in " ".join(source.storage).replace("kms_key", "")
