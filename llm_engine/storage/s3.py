"""Objects in an S3 bucket: AWS's, or any server's that speaks its language. All of boto3 is here.

Large objects go up as multipart uploads. One whose process is killed half-way stays in the bucket,
unseen and paid for: give the bucket a lifecycle rule that aborts incomplete uploads after a day.
"""

import contextlib
import functools
import re
import secrets
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlsplit

import boto3
import urllib3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)
from botocore.exceptions import ConnectionError as CannotConnect

from llm_engine.config_data import StorageSettings
from llm_engine.errors import ConfigError, StorageUnavailable
from llm_engine.storage.base import CHUNK, NoSuchObject, Storage, Stored, Writer, is_key

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 60
ATTEMPTS = 3
CONNECTIONS = 32  # kept open, at most
RETRY_AFTER_S = 5

PART = 8 * 2**20  # bytes, of the first parts; memory stays at one part
#: Parts double after so many: the 10,000 that S3 takes hold 8 TiB. (Servers that want parts of one
#: size, as Cloudflare's, therefore take no more than 8 GiB.)
_PARTS_OF_A_SIZE = 1000

_NO_CREDENTIALS = (
    NoCredentialsError,
    PartialCredentialsError,
    CredentialRetrievalError,
    ProfileNotFound,
)
#: What S3's codes ask of an operator. HEAD has no body, so that only the status tells.
_REMEDIES = {
    "NoSuchBucket": "there is no such bucket. Create it, or correct storage.url",
    **dict.fromkeys(
        ("AccessDenied", "AllAccessDisabled", "403"),
        "access is denied. The credentials need s3:GetObject, s3:PutObject, s3:DeleteObject, "
        "s3:AbortMultipartUpload and s3:ListBucket there",
    ),
    **dict.fromkeys(
        ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"),
        "the credentials are wrong, or have expired",
    ),
    **dict.fromkeys(
        ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"),
        "the bucket lies in another region. Set storage.s3_region",
    ),
    "RequestTimeTooSkewed": "this machine's clock is wrong",
}
_FULL = {"QuotaExceeded", "XMinioStorageFull", "507"}
_GONE = {"NoSuchKey", "404"}


class _Misconfigured(StorageUnavailable):
    """Which does not pass by itself."""


class S3Storage(Storage):
    def __init__(self, url: str, settings: StorageSettings) -> None:
        """`url`: s3://BUCKET or s3://BUCKET/PREFIX. Raises ConfigError."""
        self._bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self._prefix = prefix.strip("/")
        if not re.fullmatch(r"[\w.-]{3,255}", self._bucket, re.ASCII) or not (
            self._prefix == "" or is_key(self._prefix)
        ):
            raise ConfigError(f"storage.url: {url} is not like s3://BUCKET or s3://BUCKET/PREFIX")
        self._where = _checked_endpoint(settings.s3_endpoint_url)
        self._settings = settings
        asked = {"ServerSideEncryption": settings.s3_encryption, "SSEKMSKeyId": settings.s3_kms_key}
        self._encryption = {name: value for name, value in asked.items() if value is not None}

    @property
    def shown(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def writer(self, key: str) -> Writer:
        return _S3Writer(self, self._name(key))

    def put(self, key: str, data: bytes) -> None:
        with self.writer(key) as writer:
            writer.write(data)

    def create(self, key: str, data: bytes) -> bool:
        """By `If-None-Match: *`. A server that knows no conditional writes ignores it and writes
        over what is there: then every one of many wins. AWS, Ceph and MinIO do know them."""
        name, mark = self._name(key), secrets.token_hex(8)
        for pause in (0.1, 0.5, 2.0, None):
            with self.in_words(key):
                try:
                    self.put_object(name, data, IfNoneMatch="*", Metadata={"mark": mark})
                    return True
                except ClientError as error:
                    status = _status(error)
                    if status == 412:
                        return _repeated(error) and self._mark(name) == mark
                    if status != 409 or pause is None:
                        raise
            time.sleep(pause)  # another one writes it at this moment
        raise AssertionError("unreachable")

    def read(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        pieces = self._pieces(key, start, length)
        next(pieces)
        return pieces

    def stat(self, key: str) -> Stored | None:
        with contextlib.suppress(NoSuchObject), self.in_words(key):
            found = self.client.head_object(Bucket=self._bucket, Key=self._name(key))
            return Stored(key, found["ContentLength"], found["LastModified"].timestamp())
        return None

    def delete(self, key: str) -> None:
        with contextlib.suppress(NoSuchObject), self.in_words(key):
            self.client.delete_object(Bucket=self._bucket, Key=self._name(key))

    def list(self, prefix: str) -> Iterator[Stored]:
        base = f"{self._prefix}/" if self._prefix else ""
        with self.in_words(prefix):
            pages = self.client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=base + prefix):
                for found in page.get("Contents", ()):
                    key = found["Key"].removeprefix(base)
                    if is_key(key):  # consoles make "folders", whose names end with a slash
                        yield Stored(key, found["Size"], found["LastModified"].timestamp())

    def link(self, key: str, seconds: int, filename: str) -> str | None:
        """Presigned. It ends earlier where the credentials do, as a role's may."""
        wanted = {
            "Bucket": self._bucket,
            "Key": self._name(key),
            "ResponseContentDisposition": _attachment(filename),
        }
        with self.in_words(key):
            return self.client.generate_presigned_url(
                "get_object", Params=wanted, ExpiresIn=seconds
            )

    def check(self) -> None:
        probe = f"check-{secrets.token_hex(8)}"
        try:
            self.put(probe, b"-")
            b"".join(self.read(probe))
            next(self.list(probe), None)
            self.delete(probe)
        except _Misconfigured as error:
            raise ConfigError(f"storage.url: {error}") from None
        except NoSuchObject:
            raise ConfigError(
                f"storage.url: what is written to {self.shown} is not there to be read"
            ) from None

    def close(self) -> None:
        self.client.close()

    # For its writers.

    @property
    def client(self) -> Any:
        settings = self._settings
        return _client(settings.s3_endpoint_url, settings.s3_region, settings.s3_path_style)

    def put_object(self, name: str, data: bytes | bytearray, **conditions: Any) -> None:
        self.client.put_object(
            Bucket=self._bucket, Key=name, Body=data, **self._encryption, **conditions
        )

    def start_upload(self, name: str) -> "_Upload":
        mark = secrets.token_hex(8)
        where = {"Bucket": self._bucket, "Key": name}
        begun = self.client.create_multipart_upload(
            **where, **self._encryption, Metadata={"mark": mark}
        )
        return _Upload(self.client, where | {"UploadId": begun["UploadId"]}, mark)

    def finish_upload(self, upload: "_Upload") -> None:
        try:
            upload.complete()
        except ClientError as error:
            # It was completed, and the connection broke before we heard of it: the repetition
            # finds no such upload any more.
            if not _repeated(error) or self._mark(upload.where["Key"]) != upload.mark:
                raise

    @contextlib.contextmanager
    def in_words(self, key: str) -> Iterator[None]:
        """Every error of boto3 as one of ours: which place, what is wrong, what to do."""
        try:
            yield
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in _GONE:
                raise NoSuchObject(f"There is no {key} in {self.shown}.") from None
            raise self._answered(error) from error
        except _NO_CREDENTIALS as error:
            _forget_clients()  # there may be some next time
            raise _Misconfigured(
                f"The storage {self.shown} cannot be used: there are no credentials. Operators: "
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role."
            ) from error
        except (CannotConnect, HTTPClientError, urllib3.exceptions.HTTPError) as error:
            raise StorageUnavailable(
                f"The storage {self.shown} cannot be reached now at {self._where} "
                f"({type(error).__name__}).",
                retry_after=RETRY_AFTER_S,
            ) from error
        except RecursionError:
            # boto3 asks the server that redirects where to go, and is redirected, and asks.
            raise _Misconfigured(
                f"The storage {self.shown} cannot be used: {self._where} redirects without end. "
                "Operators: correct storage.s3_endpoint_url, http or https included."
            ) from None
        except BotoCoreError as error:
            raise _Misconfigured(
                f"The storage {self.shown} cannot be used ({type(error).__name__})."
            ) from error

    def _answered(self, error: ClientError) -> StorageUnavailable:
        code, status = error.response.get("Error", {}).get("Code", ""), _status(error)
        if code in _FULL or status == 507:
            return StorageUnavailable(
                f"The storage is full: {self.shown} takes no more. Operators: raise its quota, or "
                "set storage.url to a larger place.",
                code="storage_full",
            )
        remedy = _REMEDIES.get(code) or (_REMEDIES["PermanentRedirect"] if status == 301 else None)
        if remedy is not None:
            return _Misconfigured(f"The storage {self.shown} cannot be used: {remedy}.")
        told = f"The storage {self.shown} answered {status} ({code or 'no code'})."
        if status is not None and 400 <= status < 500 and status != 429:
            return _Misconfigured(told)
        return StorageUnavailable(told, retry_after=RETRY_AFTER_S)

    def _name(self, key: str) -> str:
        if not is_key(key):
            raise ValueError(f"no key of a storage: {key!r}")
        return f"{self._prefix}/{key}" if self._prefix else key

    def _mark(self, name: str) -> str | None:
        """Which of the writers has written it."""
        found = self.client.head_object(Bucket=self._bucket, Key=name)
        return found.get("Metadata", {}).get("mark")

    def _pieces(self, key: str, start: int, length: int | None) -> Iterator[bytes]:
        """Opens at the first `next`, which gives nothing. A connection that breaks is made anew,
        and goes on where the last one ended."""
        at, end = start, None if length is None else start + length
        version, breaks = None, 0
        with self.in_words(key):
            while (found := self._get(key, at, end)) is not None:
                with contextlib.closing(found["Body"]) as body:
                    if version not in (None, found["ETag"]):
                        break
                    try:
                        if version is None:
                            version = found["ETag"]
                            yield b""
                        while piece := body.read(CHUNK):
                            at, breaks = at + len(piece), 0
                            yield piece
                        return
                    except (BotoCoreError, urllib3.exceptions.HTTPError):
                        breaks += 1
                        if breaks == ATTEMPTS:
                            raise
            if version is not None:
                raise StorageUnavailable(
                    f"{key} in {self.shown} was replaced while it was read. Read it again."
                )
            yield b""  # no byte lies there

    def _get(self, key: str, start: int, end: int | None) -> dict[str, Any] | None:
        """Bytes [start, end); None where there are none."""
        where = {"Bucket": self._bucket, "Key": self._name(key)}
        if end is not None and end <= start:
            self.client.head_object(**where)
            return None
        if start or end is not None:
            where["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        try:
            return self.client.get_object(**where)
        except ClientError as error:
            if _status(error) == 416:
                return None
            raise


class _S3Writer(Writer):
    """Keeps one part in memory; an object that is no larger than that is written in one go."""

    def __init__(self, storage: S3Storage, name: str) -> None:
        self._storage = storage
        self._name = name
        self._part = bytearray()
        self._upload: _Upload | None = None
        self.bytes = 0

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while len(rest):
            room = self._part_bytes - len(self._part)
            if not room:
                self._send()
                continue
            self._part += rest[:room]
            rest = rest[room:]
        self.bytes += len(data)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        except BaseException:
            self._abort()
            raise
        if kind is not None:
            self._abort()

    @property
    def _part_bytes(self) -> int:
        sent = len(self._upload.etags) if self._upload else 0
        return PART << (sent // _PARTS_OF_A_SIZE)

    def _send(self) -> None:
        with self._storage.in_words(self._name):
            if self._upload is None:
                self._upload = self._storage.start_upload(self._name)
            part, self._part = self._part, bytearray()
            self._upload.add(part)

    def _finish(self) -> None:
        if self._upload is None:
            with self._storage.in_words(self._name):
                self._storage.put_object(self._name, self._part)
            return
        if self._part:
            self._send()
        with self._storage.in_words(self._name):
            self._storage.finish_upload(self._upload)

    def _abort(self) -> None:
        if self._upload is not None:
            with contextlib.suppress(BotoCoreError, ClientError):  # a lifecycle rule will
                self._upload.abort()


class _Upload:
    """A multipart upload that is under way."""

    def __init__(self, client: Any, where: dict[str, str], mark: str) -> None:
        self._client = client
        self.where = where
        self.mark = mark
        self.etags: list[str] = []

    def add(self, part: bytearray) -> None:
        sent = self._client.upload_part(**self.where, PartNumber=len(self.etags) + 1, Body=part)
        self.etags.append(sent["ETag"])

    def complete(self) -> None:
        parts = [{"PartNumber": n, "ETag": etag} for n, etag in enumerate(self.etags, 1)]
        self._client.complete_multipart_upload(**self.where, MultipartUpload={"Parts": parts})

    def abort(self) -> None:
        self._client.abort_multipart_upload(**self.where)


_making = threading.Lock()  # making one is slow, and no two threads may use a session


def _client(endpoint: str | None, region: str | None, path_style: bool) -> Any:
    """One for all storages of this process; it may be used from any thread."""
    with _making:
        return _make_client(endpoint, region, path_style)


@functools.cache
def _make_client(endpoint: str | None, region: str | None, path_style: bool) -> Any:
    config = Config(
        signature_version="s3v4",
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        max_pool_connections=CONNECTIONS,
        tcp_keepalive=True,
        # boto3's own checksums are unknown to many servers. The signature covers the bytes.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path" if path_style else "auto"},
    )
    session = boto3.session.Session(region_name=region)
    return session.client("s3", endpoint_url=endpoint, config=config)


def _forget_clients() -> None:
    with _making:
        _make_client.cache_clear()


def _checked_endpoint(url: str | None) -> str:
    """Where it is, for people. Raises ConfigError."""
    if url is None:
        return "AWS"
    with contextlib.suppress(ValueError):  # a port that is none
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.username is None:
            _ = parts.port
            return f"{parts.scheme}://{parts.netloc}"
    raise ConfigError("storage.s3_endpoint_url must be like https://host or https://host:port")


def _attachment(filename: str) -> str:
    plain = re.sub(r'[^ -~]|["\\%]', "_", filename)
    exact = quote(filename, safe="", errors="replace")
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{exact}"


def _status(error: ClientError) -> int | None:
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")


def _repeated(error: ClientError) -> bool:
    """Whether boto3 had sent the request before: then it may have been heard the first time."""
    return error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0) > 0
