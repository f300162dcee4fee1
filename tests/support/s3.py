"""S3 servers for tests, each a process of its own: moto's, which starts quickly and believes every
signature, and Ceph's, which is no mock.

    with MotoServer() as server:
        storage = S3Storage(server.new_bucket(), server.settings())

Whoever connects needs `server.environment`: the credentials lie there, where boto3 finds them.
"""

import functools
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any, Self

import boto3
import httpx
from botocore.config import Config

from llm_engine.config_data import StorageSettings
from tests.support.cluster import free_port

START_TIMEOUT_S = 120
#: Set where Ceph's packages must be there: its tests then run, or fail.
ENV_CEPH = "TEST_CEPH"
CEPH_BINARIES = ("monmaptool", "ceph", "ceph-mon", "ceph-mgr", "ceph-osd", "radosgw")


def ceph_is_wanted() -> bool:
    return os.environ.get(ENV_CEPH) == "1" or all(shutil.which(name) for name in CEPH_BINARIES)


class S3Server:
    """One that runs; see MotoServer and CephServer."""

    access_key, secret_key = "test", "test-secret"

    def __init__(self) -> None:
        self.port = free_port()
        self._folder = Path(tempfile.mkdtemp(prefix="le-s3-", dir="/tmp"))
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)  # all that it has started, too
            with self._process:
                self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def settings(self, **given: Any) -> StorageSettings:
        """As an operator would write them for it."""
        own = {"s3_endpoint_url": self.url, "s3_region": "us-east-1", "s3_path_style": True}
        return StorageSettings(**own | given)

    def new_bucket(self) -> str:
        """The s3:// URL of a fresh one."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=name)
        return f"s3://{name}"

    @functools.cached_property
    def client(self) -> Any:
        """A view of it that is not ours."""
        return boto3.session.Session(self.access_key, self.secret_key).client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
        )

    def _start(self) -> None:
        raise NotImplementedError

    def _run(self, *command: str, **options: Any) -> subprocess.Popen:
        self._process = subprocess.Popen(command, start_new_session=True, **options)
        return self._process


class MotoServer(S3Server):
    def _start(self) -> None:
        with (self._folder / "log").open("wb") as log:
            process = self._run(
                *(sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)),
                stdout=log,
                stderr=log,
            )
        ends_at = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < ends_at and process.poll() is None:
            try:
                httpx.get(f"{self.url}/moto-api/", timeout=5)
                return
            except httpx.TransportError:
                time.sleep(0.1)
        raise RuntimeError(f"moto did not start: {(self._folder / 'log').read_text()[-2000:]}")


class CephServer(S3Server):
    def _start(self) -> None:
        script = Path(__file__).with_name("ceph.sh")
        log = self._folder / "log"
        with log.open("wb") as errors:
            process = self._run(
                *(str(script), str(self._folder), str(self.port), str(free_port())),
                *(self.access_key, self.secret_key),
                stdin=subprocess.PIPE,  # it ends when we do, however that happens
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        told, _, _ = select.select([process.stdout], [], [], START_TIMEOUT_S)
        if not told or process.stdout.readline() != b"ready\n":
            logs = [path for path in (log, self._folder / "daemons.log") if path.exists()]
            raise RuntimeError("\n".join(path.read_text()[-2000:] for path in logs))
