"""What the tests of files share: limits, callers, forms as bytes, and what is in the storage."""

import time
from pathlib import Path

import openai

from llm_engine import files
from tests.support.cluster import eventually

KEY = "sk-admin"
LINE = b'{"custom_id": "a"}\n'
LIMITS = {
    "files": {"max_bytes": 4 * 2**20, "max_files": 40},
    "batches": {"max_file_bytes": 2 * 2**20},
}


def http(gateway, key=None, **options):
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return gateway.client(headers=headers | options.pop("headers", {}), **options)


def official(gateway, key, kind=openai.OpenAI):
    return kind(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0)


def kept(gateway):
    """Every file in the storage's folder, those that are being written too."""
    folder = Path(gateway.settings.storage_url)
    return [path for path in folder.rglob("*") if path.is_file()]


def clear(gateway):
    """All files go, and with them all bytes: none is left that no record tells of."""
    storage, store = gateway.services.storage, gateway.services.store
    for file in store.files.page(None, limit=1000)[0]:
        files.discard(storage, store, file.id)
    files.sweep(storage, store, time.time())
    eventually(lambda: kept(gateway) == [], 15, 0.05, "bytes are left")


def upload(gateway, key, content=LINE, name="a.jsonl", purpose="user_data", **options):
    headers = options.pop("headers", {})
    with http(gateway, key, headers=headers) as client:
        return client.post(
            "/v1/files", files={"file": (name, content)}, data={"purpose": purpose, **options}
        )


def made(gateway, key, *given, **options):
    answer = upload(gateway, key, *given, **options)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(answer, status=400, **facts):
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (answer.status_code, error | facts) == (status, error), answer.text
    return error["message"]


def form(*parts, end=b"--B--\r\n"):
    """A body of (headers, content), byte by byte as it is given."""
    return b"".join(b"--B\r\n%b\r\n\r\n%b\r\n" % part for part in parts) + end


def field(name, value):
    return b'Content-Disposition: form-data; name="%b"' % name, value


def a_file(content=LINE, name=b"a.jsonl", of=b"file"):
    return b'Content-Disposition: form-data; name="%b"; filename="%b"' % (of, name), content
