"""Which storage a URL means, and which paths a client may name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_engine import config
from llm_engine.config import Settings
from llm_engine.errors import ConfigError, InvalidRequest
from llm_engine.storage.local import LocalStorage
from llm_engine.storage.opening import open_path, open_storage
from tests.unit.test_architecture import importers


def settings(
    tmp_path: Path, *data_paths: str, url: str | None = None, **storage: object
) -> Settings:
    raw = {
        "cluster": {"state_dir": str(tmp_path / "state")},
        "storage": {"url": url, **storage},
        "batches": {"data_paths": list(data_paths)},
    }
    return config.parse(raw, {})


def opened(settings: Settings, path: str, owner: str = "ann") -> tuple[str, str]:
    storage, key = open_path(settings, path, owner=owner, param="input_data_path")
    return storage.shown, key


# The platform's own.


def test_a_folder(tmp_path):
    own = open_storage(settings(tmp_path))
    assert own.shown == str(tmp_path / "state" / "storage")
    assert not (tmp_path / "state").exists()  # nothing is touched yet
    assert open_storage(settings(tmp_path, url=str(tmp_path))).shown == str(tmp_path)


def test_a_bucket(tmp_path):
    assert (
        open_storage(settings(tmp_path, url="s3://bucket/pre/fix")).shown == "s3://bucket/pre/fix"
    )
    assert open_storage(settings(tmp_path, url="s3://bucket/")).shown == "s3://bucket"


def test_a_bucket_that_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match=r"storage\.url"):
        open_storage(settings(tmp_path, url="s3://b!"))


def test_boto3_is_imported_in_one_place_and_only_for_s3():
    assert importers("boto3") == importers("botocore") == {"llm_engine/storage/s3.py"}
    code = "import sys, llm_engine.services as s; print('botocore' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "False\n"


# A client's path.


def test_a_relative_path_lies_with_its_owners_data(tmp_path):
    own = str(tmp_path / "state" / "storage")
    assert opened(settings(tmp_path), "rows.json") == (own, "data/ann/rows.json")
    assert opened(settings(tmp_path), "a b/ü.json") == (own, "data/ann/a b/ü.json")
    in_s3 = settings(tmp_path, url="s3://bucket/own")
    assert opened(in_s3, "rows.json") == ("s3://bucket/own", "data/ann/rows.json")


def test_owners_do_not_meet(tmp_path):
    some = settings(tmp_path)
    keys = [opened(some, "c", owner)[1] for owner in ("a", "a/b", "a%2Fb", "B c")]
    assert keys == ["data/a/c", "data/a%2Fb/c", "data/a%252Fb/c", "data/B%20c/c"]


@pytest.mark.parametrize("owner", ["..", ".", ""])
def test_no_owner_is_a_way_out(tmp_path, owner):
    with pytest.raises(InvalidRequest):
        opened(settings(tmp_path), "files/file-1", owner)


NO_PATHS = [
    *("", ".", "..", "../bob/rows", "a/../../bob/rows", "a//b", "a/", "./a", "a\0b", "a\nb"),
    *("x" * 256, "y/" * 500, ".unfinished/a"),
    *("/", "//", "/data/../etc/passwd", "/data//a", "/data/./a", "/data/a/", "/data/a\0"),
    *("s3://", "s3://bucket", "s3://bucket/", "s3://bucket/a/../b", "s3://bucket//a"),
]


@pytest.mark.parametrize("path", NO_PATHS, ids=lambda path: repr(path)[:30])
def test_paths_that_are_none(tmp_path, path):
    allowing = settings(tmp_path, "/data", "s3://bucket", "/")
    with pytest.raises(InvalidRequest) as told:
        opened(allowing, path)
    assert told.value.status == 400 and told.value.param == "input_data_path"


@pytest.mark.parametrize(
    "path", ["https://host/a", "gs://bucket/a", "file:///etc/passwd", "S3://b/a"]
)
def test_other_schemes(tmp_path, path):
    with pytest.raises(InvalidRequest, match="cannot be opened"):
        opened(settings(tmp_path, "/"), path)


@pytest.mark.parametrize("path", ["/etc/passwd", "/data2/a", "s3://other/a", "s3://bucket/in2/a"])
def test_the_operator_names_the_places(tmp_path, path):
    for some in (settings(tmp_path), settings(tmp_path, "/data", "s3://bucket/in")):
        with pytest.raises(InvalidRequest, match=r"batches\.data_paths"):
            opened(some, path)


def test_buckets_that_the_operator_names(tmp_path):
    some = settings(tmp_path, "s3://bucket/in/", "s3://whole")
    assert opened(some, "s3://bucket/in/x/y.json") == ("s3://bucket/in", "x/y.json")
    assert opened(some, "s3://whole/y.json") == ("s3://whole", "y.json")


def test_folders_that_the_operator_names(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    some = settings(tmp_path, str(folder))
    assert opened(some, f"{folder}/x/y.json") == (str(folder), "x/y.json")
    storage, key = open_path(some, f"{folder}/x/y.json", owner="ann")
    storage.put(key, b"x")
    assert (folder / "x" / "y.json").read_bytes() == b"x"


def test_what_is_written_for_a_client_can_be_read_by_others(tmp_path):
    old = os.umask(0o022)
    try:
        for private, mode in ((True, 0o600), (False, 0o644)):
            LocalStorage(tmp_path, private=private).put("a", b"x")
            assert (tmp_path / "a").stat().st_mode & 0o777 == mode
    finally:
        os.umask(old)


def test_symlinks_lead_nowhere_else(tmp_path):
    folder, secret = tmp_path / "data", tmp_path / "secret"
    folder.mkdir()
    secret.mkdir()
    (folder / "out").symlink_to(secret)
    (folder / "in").symlink_to(folder / "x")
    some = settings(tmp_path, str(folder))
    with pytest.raises(InvalidRequest, match=r"batches\.data_paths"):
        opened(some, f"{folder}/out/a")
    assert opened(some, f"{folder}/in/a") == (str(folder), "x/a")
    (tmp_path / "link").symlink_to(folder)
    assert opened(settings(tmp_path, f"{tmp_path}/link"), f"{folder}/a") == (str(folder), "a")
    assert opened(some, f"{tmp_path}/link/a") == (str(folder), "a")


def test_the_platforms_own_bytes_are_never_a_clients(tmp_path):
    """However carelessly the operator has allowed folders and buckets around them."""
    some = settings(tmp_path, str(tmp_path))
    for path in ("state/llm-engine.db", "state/storage/files/file-1", "state/x"):
        with pytest.raises(InvalidRequest, match=r"batches\.data_paths"):
            opened(some, f"{tmp_path}/{path}")
    elsewhere = settings(tmp_path, str(tmp_path), url=str(tmp_path / "bytes"))
    with pytest.raises(InvalidRequest):
        opened(elsewhere, f"{tmp_path}/bytes/files/file-1")
    bucket = settings(tmp_path, "s3://bucket", url="s3://bucket/own/")
    assert opened(bucket, "s3://bucket/owner/a") == ("s3://bucket", "owner/a")
    with pytest.raises(InvalidRequest):
        opened(bucket, "s3://bucket/own/files/file-1")


def test_a_place_among_them_may_be_named_by_itself(tmp_path):
    shared = tmp_path / "state" / "shared"
    some = settings(tmp_path, str(tmp_path), str(shared))
    assert opened(some, f"{shared}/a") == (str(shared), "a")
    with pytest.raises(InvalidRequest):
        opened(some, f"{tmp_path}/state/a")
    bucket = settings(tmp_path, "s3://bucket", "s3://bucket/in", url="s3://bucket")
    assert opened(bucket, "s3://bucket/in/a") == ("s3://bucket/in", "a")
    with pytest.raises(InvalidRequest):
        opened(bucket, "s3://bucket/a")
