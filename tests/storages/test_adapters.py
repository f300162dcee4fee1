"""Adapters and checkpoints in each storage: there whole, or not there at all."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import orjson
import pytest

from llm_engine.errors import LeaseLost
from llm_engine.fine_tunes import adapters
from llm_engine.fine_tunes.adapters import AdapterBroken
from llm_engine.fine_tunes.checkpoints import Checkpoint, Checkpoints
from llm_engine.records import AdapterRecord
from llm_engine.storage.base import NoSuchObject, Storage

FILES = {
    "adapter_model.safetensors": b"weights" * 1000,
    "adapter_config.json": b'{"r": 4, "rank_pattern": {"q_proj": 16}}',
    "tokenizer.json": b"{}",
    "special_tokens_map.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "README.md": b"# it",
}
TRAINERS = {"optimizer.pt": b"moments", "trainer_state.json": b"{}", "rng/0.pth": b"dice"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As the trainer leaves it."""
    folder = tmp_path / "checkpoint-7"
    for name, content in (FILES | TRAINERS).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def published(storage: Storage, folder: Path) -> str:
    size, rank = adapters.measure(folder)
    made = adapters.new_adapter_id()
    record = AdapterRecord(
        made, "ft:m:ann::1", "ann", "m", "w", rank, size, time.time(), "ftjob-1", 7, {"loss": 0.5}
    )
    adapters.publish(storage, folder, record)
    return made


def read(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def alone(folder: Path) -> bool:
    """There is nothing beside it that was begun and not finished."""
    return [path.name for path in folder.parent.iterdir()] == [folder.name]


# -- adapters


def test_only_what_serving_needs_is_published(storage, folder, tmp_path):
    made = published(storage, folder)
    target = tmp_path / "cache" / made
    manifest = adapters.fetch(storage, made, target)
    assert read(target) == FILES and alone(target)
    assert (manifest.id, manifest.name, manifest.rank, manifest.step) == (
        made,
        "ft:m:ann::1",
        16,
        7,
    )
    assert manifest.metrics == {"loss": 0.5} and manifest == adapters.manifest(storage, made)
    assert sum(file.bytes for file in manifest.files) == adapters.measure(folder)[0]


@pytest.mark.parametrize("name", ["adapter-none", "../files/file-1", "a/b", "", "\0", "x" * 300])
def test_there_is_no_adapter_that_nobody_published(storage, name, tmp_path):
    with pytest.raises(NoSuchObject):
        adapters.fetch(storage, name, tmp_path / "cache" / "a")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", [b"weights" * 999, b"weights" * 1001, b"weight$" * 1000, b""])
def test_damaged_bytes_are_told_and_leave_nothing(storage, folder, tmp_path, content):
    made = published(storage, folder)
    storage.put(f"adapters/{made}/adapter_model.safetensors", content)
    target = tmp_path / "cache" / made
    with pytest.raises(AdapterBroken, match=r"adapter_model\.safetensors is damaged"):
        adapters.fetch(storage, made, target)
    assert list(target.parent.iterdir()) == []


def test_a_file_that_is_missing_is_told(storage, folder, tmp_path):
    made = published(storage, folder)
    storage.delete(f"adapters/{made}/tokenizer.json")
    with pytest.raises(AdapterBroken, match=r"tokenizer\.json is missing"):
        adapters.fetch(storage, made, tmp_path / "cache" / made)


@pytest.mark.parametrize(
    "manifest",
    [b"", b"{", b"[]", b"{}", b'{"files": [{}]}', b'{"files": [1]}',
     b'{"files": [{"name": "../../evil", "bytes": 1, "sha256": "0"}]}'],
)  # fmt: skip
def test_a_manifest_that_makes_no_sense_is_told(storage, folder, tmp_path, manifest):
    made = published(storage, folder)
    storage.put(f"adapters/{made}/manifest.json", manifest)
    with pytest.raises(AdapterBroken):
        adapters.fetch(storage, made, tmp_path / "cache" / made)


def test_one_that_is_deleted_meanwhile_is_not_there_and_not_damaged(storage, folder, tmp_path):
    made = published(storage, folder)
    manifest = adapters.manifest(storage, made)
    adapters.drop(storage, made)
    assert list(storage.list("adapters/")) == []
    with pytest.raises(NoSuchObject):
        adapters.folders.get(storage, f"adapters/{made}", manifest.files, tmp_path / "c" / "a")
    adapters.drop(storage, made)  # again


def test_many_who_fetch_at_once_find_it_whole(storage, folder, tmp_path):
    made = published(storage, folder)
    target = tmp_path / "cache" / made
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: adapters.fetch(storage, made, target), range(6)))
    assert read(target) == FILES and alone(target)


def test_what_is_no_adapter_is_not_measured(tmp_path):
    (tmp_path / "adapter_config.json").write_bytes(b'{"r": 8}')
    with pytest.raises(ValueError, match="no adapter"):
        adapters.measure(tmp_path)


# -- checkpoints


def put(checkpoints: Checkpoints, folder: Path, step: int, **facts) -> Checkpoint:
    given = {"epoch_end": False, "metrics": {}, "history": (), "rows": b"1,2\n", "tokens": 9}
    return checkpoints.put(folder, step, **{"check": lambda: None} | given | facts)


def test_the_newest_checkpoint_is_gone_on_from(storage, folder, tmp_path):
    checkpoints = Checkpoints(storage, "ftjob-1", "a")
    assert checkpoints.newest() is None
    first = put(checkpoints, folder, 9, epoch_end=True, metrics={"x": 1.0})
    second = put(checkpoints, folder, 10, history=first.history, rows=b"3,4\n")
    assert Checkpoints(storage, "ftjob-1", "b").newest() == second
    assert second.history == (*first.history, "fine_tunes/ftjob-1/metrics/00000010-a.csv")
    assert checkpoints.fetch(second, tmp_path / "there") and read(tmp_path / "there") == (
        FILES | TRAINERS
    )
    assert checkpoints.newest([second.prefix]) == first
    checkpoints.drop_older(second)
    assert checkpoints.newest([second.prefix]) is None
    assert len(list(storage.list("fine_tunes/ftjob-1/metrics/"))) == 2


def test_one_that_was_not_finished_is_not_there(storage, folder):
    checkpoints = Checkpoints(storage, "ftjob-1", "a")

    def lost() -> None:
        raise LeaseLost("another process works on it")

    with pytest.raises(LeaseLost):
        put(checkpoints, folder, 10, check=lost)
    assert checkpoints.newest() is None
    kept = put(Checkpoints(storage, "ftjob-1", "b"), folder, 11)
    checkpoints.drop_older(kept)
    assert {each.key.split("/")[3] for each in storage.list("fine_tunes/ftjob-1/checkpoints/")} == {
        "00000011-b"
    }


def test_a_damaged_one_is_told_apart(storage, folder, tmp_path):
    checkpoints = Checkpoints(storage, "ftjob-1", "a")
    kept = put(checkpoints, folder, 10)
    storage.put(f"{kept.prefix}/optimizer.pt", b"momentum")
    assert not checkpoints.fetch(kept, tmp_path / "there") and not (tmp_path / "there").exists()
    told = orjson.loads(b"".join(storage.read(f"{kept.prefix}/manifest.json")))
    storage.put(f"{kept.prefix}/manifest.json", orjson.dumps(told | {"step": "x"}))
    assert checkpoints.newest() is None
