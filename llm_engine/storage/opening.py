"""From a URL, or from the path that a client has given, to the storage behind it."""

from pathlib import Path
from urllib.parse import quote

from llm_engine.config import Settings
from llm_engine.config_data import StorageSettings
from llm_engine.errors import InvalidRequest
from llm_engine.storage.base import Storage, is_key
from llm_engine.storage.local import LocalStorage

S3 = "s3://"


def open_storage(settings: Settings) -> Storage:
    """The platform's own. Connects to nothing yet; raises ConfigError for a URL that can't be."""
    url = settings.storage_url
    return _s3(url, settings.storage) if url.startswith(S3) else LocalStorage(Path(url))


def open_path(
    settings: Settings, path: str, *, owner: str, param: str | None = None
) -> tuple[Storage, str]:
    """The storage and the key that a client's path means; there need be nothing there.

    "rows.json" lies in the platform's own storage, under data/OWNER; "/folder/rows.json" and
    "s3://bucket/rows.json" where the operator lets clients read and write. Else InvalidRequest.
    """
    if path.startswith(S3):
        return _in_bucket(settings, path, param)
    if "://" in path:
        raise InvalidRequest(
            f"'{path}' cannot be opened: a path is relative, or a folder's, or begins with s3://.",
            param=param,
        )
    if path.startswith("/"):
        return _in_folder(settings, path, param)
    key = f"data/{quote(owner, safe='')}/{path}"
    if not is_key(key):
        raise _no_path(path, param)
    return open_storage(settings), key


# Where everybody's files lie is no client's, however wide the places around it that are allowed;
# only a place within that the operator has named by itself is.


def _in_bucket(settings: Settings, path: str, param: str | None) -> tuple[Storage, str]:
    if not is_key(path.removeprefix(S3)):
        raise _no_path(path, param)
    own = settings.storage_url.rstrip("/") + "/"
    for allowed in (each.rstrip("/") + "/" for each in settings.batches.data_paths):
        named_within = allowed.startswith(own) and allowed != own
        if path.startswith(allowed) and (named_within or not path.startswith(own)):
            return _s3(allowed, settings.storage), path.removeprefix(allowed)
    raise _not_allowed(path, param)


def _in_folder(settings: Settings, path: str, param: str | None) -> tuple[Storage, str]:
    if not is_key(path.removeprefix("/")):
        raise _no_path(path, param)
    target = Path(path).resolve()  # where it really leads
    own = [settings.cluster.state_dir.resolve()]
    if not settings.storage_url.startswith(S3):
        own.append(Path(settings.storage_url).resolve())
    for allowed in settings.batches.data_paths:
        folder = Path(allowed).expanduser().resolve()
        if allowed.startswith(S3) or folder not in target.parents:
            continue
        if all(each in folder.parents or not target.is_relative_to(each) for each in own):
            return LocalStorage(folder, private=False), target.relative_to(folder).as_posix()
    raise _not_allowed(path, param)


def _no_path(path: str, param: str | None) -> InvalidRequest:
    return InvalidRequest(
        f"'{path}' is no path of an object: it must have plain names between single slashes, "
        "without '.' and '..', of at most 255 bytes each and 900 together.",
        param=param,
    )


def _not_allowed(path: str, param: str | None) -> InvalidRequest:
    return InvalidRequest(
        f"'{path}' is in no place that may be read and written here. A path that is relative "
        "always may. Operators: batches.data_paths names further folders and s3:// prefixes.",
        param=param,
    )


def _s3(url: str, settings: StorageSettings) -> Storage:
    from llm_engine.storage.s3 import S3Storage  # boto3 takes a while

    return S3Storage(url, settings)
