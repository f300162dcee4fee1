"""Servers that refuse, hang, fail and break off; disks that are full; places that are not ours."""

import contextlib
import itertools
import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llm_engine.errors import ConfigError, StorageUnavailable
from llm_engine.storage import s3
from llm_engine.storage.local import LocalStorage
from llm_engine.storage.s3 import S3Storage
from tests.support.cluster import free_port
from tests.support.faults import Answer, Fault, FaultyProxy
from tests.support.s3 import S3Server

LARGE = s3.PART + 1_000_000
OPERATIONS: dict[str, Callable] = {
    "put": lambda storage: storage.put("a", b"x"),
    "write": lambda storage: storage.put("a", bytes(LARGE)),
    "create": lambda storage: storage.create("a", b"x"),
    "read": lambda storage: storage.read("a"),
    "stat": lambda storage: storage.stat("a"),
    "delete": lambda storage: storage.delete("a"),
    "list": lambda storage: list(storage.list("")),
    "check": lambda storage: storage.check(),
}
each_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)


@pytest.fixture(autouse=True)
def no_client_is_kept() -> Iterator[None]:
    s3._forget_clients()
    yield
    s3._forget_clients()


@pytest.fixture
def proxy(server: S3Server) -> Iterator[FaultyProxy]:
    with FaultyProxy(server.port) as running:
        yield running


@pytest.fixture
def direct(server: S3Server) -> Iterator[S3Storage]:
    with contextlib.closing(S3Storage(server.new_bucket(), server.settings())) as opened:
        yield opened


@pytest.fixture
def through(direct: S3Storage, proxy: FaultyProxy, server: S3Server) -> Iterator[S3Storage]:
    """The same bucket as `direct`, by way of the proxy."""
    settings = server.settings(s3_endpoint_url=proxy.url)
    with contextlib.closing(S3Storage(direct.shown, settings)) as opened:
        yield opened


def half_uploaded(server: S3Server, storage: S3Storage) -> list:
    bucket = storage.shown.removeprefix("s3://")
    return server.client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])


# S3 that does not answer.


@pytest.fixture
def refused(server: S3Server) -> S3Storage:
    nobody = f"http://127.0.0.1:{free_port()}"
    return S3Storage("s3://some-bucket/x", server.settings(s3_endpoint_url=nobody))


@each_operation
def test_nobody_listens(refused, operation, monkeypatch):
    monkeypatch.setattr(s3, "ATTEMPTS", 2)
    started = time.monotonic()
    with pytest.raises(StorageUnavailable) as told:
        operation(refused)
    assert time.monotonic() - started < 10
    assert (told.value.status, told.value.code) == (503, "storage_unavailable")
    assert "s3://some-bucket/x" in str(told.value) and "http://127.0.0.1:" in str(told.value)
    assert "test-secret" not in str(told.value)


def test_a_server_that_hangs_is_given_up(through, proxy, monkeypatch):
    monkeypatch.setattr(s3, "READ_TIMEOUT_S", 0.3)
    proxy.judge = lambda request, earlier: Fault.HANG
    started = time.monotonic()
    with pytest.raises(StorageUnavailable, match="cannot be reached"):
        through.put("a", b"x")
    assert time.monotonic() - started < 0.3 * s3.ATTEMPTS + 10  # and its pauses
    assert len(proxy.requests) == s3.ATTEMPTS


@pytest.mark.slow
@each_operation
def test_two_failures_are_overcome(direct, through, proxy, operation):
    direct.put("a", b"x")
    direct.delete("a") if operation is OPERATIONS["create"] else None
    bad = itertools.chain([Answer(500, "InternalError"), Answer(503, "SlowDown")])
    proxy.judge = lambda request, earlier: next(bad, None)
    operation(through)
    assert len(proxy.requests) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
def test_failures_without_end_are_told(through, proxy, status):
    proxy.judge = lambda request, earlier: Answer(status)
    with pytest.raises(StorageUnavailable, match=str(status)) as told:
        through.put("a", b"x")
    assert told.value.status == 503 and told.value.retry_after
    with pytest.raises(StorageUnavailable, match=str(status)):
        through.check()


# S3 whose connections break.


@pytest.mark.parametrize("size", [100_000, LARGE], ids=["small", "in parts"])
def test_a_write_that_breaks_for_ever_leaves_nothing(direct, through, proxy, server, size):
    direct.put("a", b"old")
    proxy.judge = lambda request, earlier: Fault.CUT if request.startswith("PUT") else None
    with pytest.raises(StorageUnavailable):
        through.put("a", bytes(size))
    assert b"".join(direct.read("a")) == b"old"
    assert [found.key for found in direct.list("")] == ["a"]
    assert half_uploaded(server, direct) == []


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.LOSE])
@pytest.mark.parametrize("size", [100_000, LARGE], ids=["small", "in parts"])
def test_a_write_that_breaks_once_is_whole(direct, through, proxy, fault, size):
    content = os.urandom(size)
    proxy.judge = lambda request, earlier: fault if "PUT" in request and not earlier else None
    through.put("a", content)
    assert b"".join(direct.read("a")) == content


def test_an_upload_whose_end_was_not_heard_has_ended(direct, through, proxy, server):
    content = os.urandom(LARGE)

    def judge(request: str, earlier: int) -> Fault | None:
        first_end = "uploadId" in request and earlier == 1  # the first POST begins it
        return Fault.LOSE if request.startswith("POST") and first_end else None

    proxy.judge = judge
    through.put("a", content)
    assert b"".join(direct.read("a")) == content
    assert sum(each.startswith("POST") for each in proxy.requests) >= 3
    assert half_uploaded(server, direct) == []


def test_the_winner_of_create_knows_it_though_the_answer_was_lost(direct, through, proxy):
    proxy.judge = lambda request, earlier: (
        Fault.LOSE if request.startswith("PUT") and not earlier else None
    )
    assert through.create("a", b"ours") is True
    assert b"".join(direct.read("a")) == b"ours"


def test_the_loser_of_create_knows_it_though_it_asked_twice(direct, through, proxy):
    direct.create("a", b"theirs")
    proxy.judge = lambda request, earlier: (
        Answer(500) if request.startswith("PUT") and not earlier else None
    )
    assert through.create("a", b"ours") is False
    assert b"".join(direct.read("a")) == b"theirs"


def test_create_waits_for_another_that_is_under_way(direct, through, proxy):
    proxy.judge = lambda request, earlier: (
        Answer(409, "ConditionalRequestConflict") if request.startswith("PUT") and not earlier
        else None
    )  # fmt: skip
    assert through.create("a", b"ours") is True
    assert b"".join(direct.read("a")) == b"ours"


@pytest.mark.parametrize("area", [(), (1_000_000, 4_000_000)])
def test_a_read_that_breaks_goes_on_where_it_was(direct, through, proxy, area):
    content = os.urandom(6_000_000)
    direct.put("a", content)
    proxy.judge = lambda request, earlier: Fault.HALVE if earlier < 2 else None
    start, length = area or (0, 6_000_000)
    assert b"".join(through.read("a", *area)) == content[start : start + length]
    assert len(proxy.requests) == 3


def test_a_read_that_breaks_for_ever_is_told(direct, through, proxy):
    direct.put("a", bytes(100))
    proxy.judge = lambda request, earlier: Fault.HALVE if not earlier else Answer(500)
    with pytest.raises(StorageUnavailable, match="500"):
        b"".join(through.read("a"))


def test_a_read_does_not_go_on_in_other_bytes(direct, through, proxy):
    direct.put("a", bytes(4_000_000))
    proxy.judge = lambda request, earlier: Fault.HALVE if not earlier else None
    pieces = through.read("a")
    next(pieces)
    direct.put("a", os.urandom(4_000_000))
    with pytest.raises(StorageUnavailable, match="replaced"):
        b"".join(pieces)


# S3 that refuses.


@pytest.mark.parametrize(
    ("answer", "remedy"),
    [
        (Answer(403, "AccessDenied"), "s3:PutObject"),
        (Answer(403, "InvalidAccessKeyId"), "credentials"),
        (Answer(400, "ExpiredToken"), "expired"),
        (Answer(301), "redirects without end.*storage.s3_endpoint_url"),
        (Answer(403, "RequestTimeTooSkewed"), "clock"),
        (Answer(404, "NoSuchBucket"), "no such bucket"),
        (Answer(418, "Teapot"), "418 .Teapot."),
    ],
    ids=lambda each: each.code if isinstance(each, Answer) else "",
)
def test_refusals_name_the_place_and_the_remedy(through, proxy, answer, remedy):
    proxy.judge = lambda request, earlier: answer
    with pytest.raises(ConfigError, match=f"storage.url: .*{through.shown}.*{remedy}"):
        through.check()
    with pytest.raises(StorageUnavailable, match=remedy):
        through.put("a", b"x")


def test_a_bucket_in_another_region(through, proxy):
    proxy.judge = lambda request, earlier: (
        None if request.startswith("HEAD") else Answer(301, "PermanentRedirect")
    )
    with pytest.raises(ConfigError, match=r"another region. Set storage.s3_region"):
        through.check()


@pytest.mark.parametrize(
    "answer", [Answer(403, "QuotaExceeded"), Answer(507, "XMinioStorageFull")], ids=str
)
def test_a_bucket_that_is_full(through, proxy, answer):
    proxy.judge = lambda request, earlier: answer
    with pytest.raises(StorageUnavailable) as told:
        through.put("a", b"x")
    assert told.value.code == "storage_full"


def test_a_bucket_that_is_not_there(server):
    storage = S3Storage("s3://no-such-bucket-at-all", server.settings())
    with pytest.raises(ConfigError, match=r"no-such-bucket-at-all.*Create it"):
        storage.check()
    with pytest.raises(StorageUnavailable, match="no such bucket"):
        storage.put("a", b"x")


def test_without_credentials_until_there_are_some(server, monkeypatch):
    url = server.new_bucket()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    storage = S3Storage(url, server.settings())
    with pytest.raises(ConfigError, match=f"{url} .*no credentials.*AWS_ACCESS_KEY_ID"):
        storage.check()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    storage.check()


@pytest.mark.s3real
def test_a_wrong_secret(ceph, monkeypatch):
    wrong = ceph.environment | {"AWS_SECRET_ACCESS_KEY": "not-the-secret"}
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="the credentials are wrong") as told:
        S3Storage(ceph.new_bucket(), ceph.settings()).check()
    assert "not-the-secret" not in str(told.value)


# Folders.


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of 2 MB; where that may not be made, files that may not be larger."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)], capture_output=True
    )
    if mounted.returncode == 0:
        try:
            yield
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("piece", [1_000, 100_000, 5_000_000])
def test_a_disk_that_is_full_is_left_clean(tmp_path, piece):
    storage = LocalStorage(tmp_path / "disk")
    with small_disk(tmp_path / "disk"):
        storage.put("old", b"old")
        with pytest.raises(StorageUnavailable, match="no room left") as told:
            with storage.writer("new") as writer:
                while writer.bytes < 5_000_000:
                    writer.write(bytes(piece))
        assert (told.value.status, told.value.code) == (503, "storage_full")
        files = [path.name for path in (tmp_path / "disk").rglob("*") if path.is_file()]
        assert files == ["old"]
        storage.put("new", bytes(1_000_000))  # there is room again
        assert b"".join(storage.read("old")) == b"old"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    storage = LocalStorage(tmp_path / "file" / "storage")
    with pytest.raises(ConfigError, match=r"storage.url: .*cannot be written: Not a directory"):
        storage.check()
    with pytest.raises(StorageUnavailable, match="Not a directory"):
        storage.put("a", b"x")


@contextlib.contextmanager
def somebody_else() -> Iterator[None]:
    """root may write everywhere; others see what everybody sees."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_may_not_be_written(tmp_path):
    (tmp_path / "storage").mkdir(mode=0o500)
    storage = LocalStorage(tmp_path / "storage")
    with somebody_else():
        with pytest.raises(ConfigError, match=r"storage.url: .*cannot be written: Permission"):
            storage.check()
        with pytest.raises(StorageUnavailable, match="Permission denied"):
            storage.put("a", b"x")


def test_nobody_else_looks_into_what_is_made(tmp_path):
    LocalStorage(tmp_path / "a" / "storage").put("files/1", b"x")
    made = [path for path in (tmp_path / "a").rglob("*")]
    assert len(made) == 4
    assert [path.name for path in [tmp_path / "a", *made] if path.stat().st_mode & 0o077] == []


def test_what_the_dead_have_left_goes_in_time(tmp_path):
    storage = LocalStorage(tmp_path)
    with storage.writer("a") as writer:
        writer.write(b"x")
        [unfinished] = (tmp_path / ".unfinished").iterdir()
        storage.check()
        assert unfinished.exists()
        os.utime(unfinished, (0, time.time() - 2 * 86400))
        storage.check()
        assert not unfinished.exists()
        unfinished.write_bytes(b"x")


def test_an_object_whose_unfinished_bytes_were_taken_away(tmp_path):
    storage = LocalStorage(tmp_path)
    with pytest.raises(StorageUnavailable), storage.writer("a/b") as writer:
        for path in (tmp_path / ".unfinished").iterdir():
            path.unlink()
        writer.write(b"x")
    assert storage.stat("a/b") is None


def test_a_file_in_the_way_is_not_taken_for_the_winner(tmp_path):
    storage = LocalStorage(tmp_path)
    storage.put("a", b"x")
    with pytest.raises(StorageUnavailable):
        storage.create("a/b", b"x")
