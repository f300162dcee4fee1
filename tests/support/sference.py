"""What the tests of sference's dialect share: its clients, and what a job would do to a batch."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import httpx
import orjson
from sference_sdk import SferenceClient

from llm_engine import files
from llm_engine.batches.rows import row_id
from llm_engine.records import BatchPart, BatchRecord, Usage
from llm_engine.statuses import BatchState
from tests.support.gateway import GatewayThread

KEY = "sk-admin"
BIN = Path(sys.executable).parent
HI = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
ROWS = [{"custom_id": "a", "body": HI}, {"custom_id": None, "body": HI},
        {"custom_id": "c", "body": {"model": "fake", "input": "hi"}}]  # fmt: skip
OLD_CLIENT = """
import json, sys
from sference_sdk import SferenceClient
with SferenceClient(base_url=sys.argv[1], api_key=sys.argv[2]) as client:
    for call in sys.argv[3:]:
        method, arguments = json.loads(call)
        found = getattr(client, method)(**arguments)
        print(json.dumps(found.model_dump() if hasattr(found, "model_dump") else found))
"""


def client_of(gateway: GatewayThread, key: str = KEY) -> SferenceClient:
    return SferenceClient(base_url=f"{gateway.url}/sference", api_key=key)


def http(gateway: GatewayThread, key: str = KEY) -> httpx.Client:
    return gateway.client(headers={"authorization": f"Bearer {key}"})


def submit(gateway: GatewayThread, requests: Any, **fields: Any) -> httpx.Response:
    with http(gateway) as client:
        return client.post("/sference/v1/batches", json={"requests": requests, **fields})


def problem(answer: httpx.Response, status: int = 400) -> tuple[str, str | None]:
    """The sentence, and the field that it is about."""
    assert answer.status_code == status, answer.text
    told = answer.json()
    assert set(told) == {"status_code", "detail", "extra"} and told["status_code"] == status
    return told["detail"], told["extra"]["param"]


def written(gateway: GatewayThread, batch: str) -> list[dict[str, Any]]:
    """The requests that a job would find."""
    services = gateway.services
    file = services.store.files.get(services.store.batches.get(batch).input_file_id)
    content = b"".join(services.storage.read(file.key))
    return [json.loads(line) for line in content.splitlines()]


def begin(gateway: GatewayThread, batch: str) -> BatchRecord:
    batches = gateway.services.store.batches
    record = batches.claim(batch, "worker", 60)
    rows = written(gateway, batch)
    return batches.move(
        record, [BatchState.VALIDATING], BatchState.IN_PROGRESS, total=len(rows), model="fake"
    )


def work(
    gateway: GatewayThread,
    batch: str,
    failed: Set[int] = frozenset(),
    to: BatchState = BatchState.COMPLETED,
    done: int | None = None,
) -> BatchRecord:
    """Bring a batch that has begun to its end. `done`: how many rows are finished."""
    batches = gateway.services.store.batches
    record = batches.get(batch)
    rows = list(enumerate(written(gateway, batch)))[:done]
    good = [_line(batch, i, row, i in failed) for i, row in rows if i not in failed]
    bad = [_line(batch, i, row, i in failed) for i, row in rows if i in failed]
    numbers = tuple(i for i, _ in rows)
    usage = Usage(prompt_tokens=7 * len(good), completion_tokens=2 * len(good))
    record = batches.add_part(record, BatchPart(0, "batches/x", numbers, len(bad), usage))
    kept = {
        field: files.keep(
            gateway.services.storage, gateway.services.store, owner=record.owner,
            purpose="batch_output", filename="results.jsonl", pieces=lines,
        ).id
        for field, lines in (("output_file_id", good), ("error_file_id", bad))
        if lines
    }  # fmt: skip
    return batches.finish(record, to, [], **kept)


def _line(batch: str, number: int, row: dict[str, Any], failed: bool) -> bytes:
    if failed:
        status, body = 400, {"error": {"message": "too hot", "code": "invalid_value"}}
    else:
        message = {"role": "assistant", "content": f"answer {number}"}
        status, body = 200, {"object": "chat.completion", "choices": [{"message": message}]}
    response = {"status_code": status, "request_id": "r", "body": body}
    line = {"id": row_id(batch, number), "custom_id": row["custom_id"], "response": response}
    return orjson.dumps(line | {"error": None}, option=orjson.OPT_APPEND_NEWLINE)


def old_client(url: str, key: str, folder: Path, *calls: Any, version: str = "0.0.8") -> list[Any]:
    """What each of these calls gives, in a client of its own environment."""
    done = subprocess.run(
        [BIN / "uv", "run", "--quiet", "--isolated", "--no-project", "--python", sys.executable,
         "--with", f"sference-sdk=={version}", "python", "-c", OLD_CLIENT, url, key,
         *(json.dumps(call) for call in calls)],
        capture_output=True, text=True, timeout=120, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def sference(url: str, folder: Path, *arguments: Any, key: str = KEY) -> str:
    """What the command prints, with all that it remembers in `folder`."""
    done = subprocess.run(
        [BIN / "sference", *arguments], env=_environment(url, folder, key),
        capture_output=True, text=True, timeout=60, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextlib.contextmanager
def sference_lines(
    url: str, folder: Path, *arguments: Any, key: str = KEY
) -> Iterator[Iterator[str]]:
    """The lines of a command that runs until it is stopped, which happens at the end."""
    running = subprocess.Popen(
        [BIN / "sference", *arguments], env=_environment(url, folder, key), cwd=folder,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with running:
        try:
            assert running.stdout is not None
            yield iter(running.stdout)
        finally:
            running.terminate()


def _environment(url: str, folder: Path, key: str) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"], "HOME": str(folder), "SFERENCE_API_KEY": key,
        "SFERENCE_BASE_URL": f"{url}/sference", "COLUMNS": "200",
        "SFERENCE_STREAM_CACHE": str(folder / "stream_cache.json"),
        "SFERENCE_STREAM_CHECKPOINTS": str(folder / "checkpoints.json"),
    }  # fmt: skip
