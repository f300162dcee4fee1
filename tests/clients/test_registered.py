"""Registered models on the running system: Root Signals' client, OpenAI's, calute's, fallback."""

import json
import subprocess
import sys
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import Cluster, eventually

pytestmark = [pytest.mark.slow, pytest.mark.alone]

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
CALUTE = """
import asyncio, json, sys
from calute.llms import OpenAILLM
llm = OpenAILLM(model="demo-chat", api_key=sys.argv[2], base_url=sys.argv[1])
question = "What is the capital of France?"
answer = asyncio.run(llm.generate_completion(question, max_tokens=20, temperature=0.0))
text = answer.choices[0].message.content
print(json.dumps({"max_model_len": llm.config.max_model_len, "text": text}))
"""


@pytest.fixture(scope="module")
def signals(cluster: Cluster) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from root import RootSignals
    return RootSignals(api_key=cluster.KEY, base_url=f"{cluster.url}/rootsignals")


@pytest.fixture
def name() -> Iterator[str]:
    yield f"registered-{uuid.uuid4().hex[:6]}"


def say(cluster: Cluster, model: str, **fields: Any) -> Any:
    return cluster.openai().chat.completions.create(
        model=model, messages=QUESTION, max_tokens=20, temperature=0, **fields
    )


def test_an_alias_answers_under_its_own_name(cluster: Cluster, signals: Any, name: str):
    made = signals.models.create(name=name, model="demo-chat")
    eventually(lambda: name in [m.id for m in cluster.openai().models.list()], 10)
    for _ in range(8):  # whichever ingress replica is asked
        answer = say(cluster, name)
        assert answer.model == name and "Paris" in answer.choices[0].message.content
    chunks = list(say(cluster, name, stream=True))
    assert {chunk.model for chunk in chunks} == {name}
    listed = {m.name: m for m in signals.models.list()}
    assert name in listed
    signals.models.delete(made)
    eventually(lambda: name not in [m.id for m in cluster.openai().models.list()], 10)


def test_an_external_model_is_called_in_the_callers_place(
    cluster: Cluster, signals: Any, name: str
):
    """The upstream is this system itself, under another name and with a key of its own."""
    made = signals.models.create(
        name=name, model="demo-chat", url=f"{cluster.url}/v1", default_key=cluster.KEY,
        max_output_token_count=800,
    )  # fmt: skip
    eventually(lambda: name in [m.id for m in cluster.openai().models.list()], 10)
    answer = say(cluster, name)
    assert answer.model == name and "Paris" in answer.choices[0].message.content
    chunks = list(say(cluster, name, stream=True))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == answer.choices[0].message.content and {c.model for c in chunks} == {name}
    with cluster.client() as client:
        stored = client.get("/rootsignals/v1/models/", headers=api_key(cluster)).text
    assert cluster.KEY not in stored
    signals.models.delete(made)


def api_key(cluster: Cluster) -> dict[str, str]:
    return {"Authorization": f"Api-Key {cluster.KEY}"}


def test_another_model_answers_for_one_that_cannot(cluster: Cluster, name: str):
    with cluster.client() as client:
        settings = {"name": name, "model": "/nowhere", "fallback": "demo-chat", "num_cpus": 0.1}
        assert client.post("/v1/endpoints", json=settings).status_code == 201
        cluster.wait_until(name, "UPDATE_FAILED", 60)
        answer = cluster.openai().chat.completions.with_raw_response.create(
            model=name, messages=QUESTION, max_tokens=20, temperature=0
        )
        assert answer.headers["x-llm-engine-served-by"] == "demo-chat"
        parsed = answer.parse()
        assert parsed.model == "demo-chat" and "Paris" in parsed.choices[0].message.content
        client.delete(f"/v1/endpoints/{name}")
        eventually(lambda: client.get(f"/v1/endpoints/{name}").status_code == 404, 60, 0.3)


def test_calute_learns_the_context_length_from_the_list_of_models(cluster: Cluster, tmp_path: Path):
    """In an environment of its own: what it depends on is at odds with Ray."""
    script = tmp_path / "ask.py"
    script.write_text(CALUTE)
    uv = Path(sys.executable).parent / "uv"
    done = subprocess.run(
        [uv, "run", "--quiet", "--isolated", "--no-project", "--python", sys.executable,
         "--with", "calute==0.1.5", "python", script, f"{cluster.url}/v1", cluster.KEY],
        capture_output=True, text=True, timeout=240, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["max_model_len"] == 2048 and "Paris" in told["text"]
