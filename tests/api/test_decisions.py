"""/v1/decisions, with sference's client and its command line, over real sockets.

The fake engine finds the first label that it is asked about twice as likely as the second, that one
twice as likely as the third, and so on.
"""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from sference_sdk import AsyncSferenceClient, SferenceClient
from sference_sdk.client import ApiError

from tests.support.cluster import eventually
from tests.support.gateway import GatewayThread, fake_endpoint
from tests.support.sference import client_of, http, problem, sference
from tests.support.upstream import KEY, Upstream, gateway_with_registry, new_key, register

CHOICE = {
    "type": "choice",
    "instructions": "What is it?",
    "criteria": {"a dog": None, "a cat": "x"},
}
SCORE = {"type": "score", "instructions": {"rate": "it"}, "criteria": ["bad", {"so": "so"}, "good"]}
NOUL = {"type": "noul", "instructions": "Is it small?"}


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayThread]:
    engines = [
        fake_endpoint("fake"),
        fake_endpoint("slow", vllm_args={"token_delay_s": 0.3}),
        fake_endpoint("narrow", max_queue=1),
        fake_endpoint("vectors", task="embed"),
    ]
    with Upstream() as upstream, gateway_with_registry(engines, api_keys=[KEY]) as running:
        register(running, "ext", KEY, url=upstream.url, model="theirs", default_key="sk-theirs")
        register(running, "alias", KEY, model="fake", max_token_count=4000)
        yield running


@pytest.fixture
def client(gateway: GatewayThread) -> Iterator[SferenceClient]:
    with client_of(gateway) as made:
        yield made


def decide(gateway: GatewayThread, path: str = "/sference/v1/decisions", **asked: Any) -> Any:
    body = {"model": "fake", "state": "s", "questions": {"what": CHOICE}} | asked
    with http(gateway) as plain:
        return plain.post(path, json={k: v for k, v in body.items() if v is not ...})


def test_each_kind_of_question_has_its_answer(client: SferenceClient):
    found = client.create_decision(
        model="fake", state={"it": "barks"}, questions={"what": CHOICE, "how": SCORE, "small": NOUL}
    )
    what, how, small = (found.answers[name] for name in ("what", "how", "small"))
    assert (found.model, what.choice) == ("fake", "a dog")
    assert what.probabilities == pytest.approx({"a dog": 2 / 3, "a cat": 1 / 3})
    assert what.confidence == pytest.approx(1 / 2)  # of all that the model could say
    assert how.probabilities == pytest.approx({"0": 4 / 7, "1": 2 / 7, "2": 1 / 7})
    assert how.score == pytest.approx(4 / 7)
    assert how.legend == {"0": "bad", "1": {"so": "so"}, "2": "good"}
    assert small.noul == pytest.approx(2 / 3)
    assert (found.usage.input_tokens, found.usage.output_tokens) == (3, 3)


def test_at_every_address_and_by_every_name(gateway: GatewayThread):
    expected = decide(gateway).json()
    for path in ("/v1/decisions", "/sference-legacy/v1/decisions"):
        assert decide(gateway, path).json() == expected
    found = decide(gateway, model="alias").json()
    assert found == expected | {"model": "alias"}


def test_the_async_client_and_the_command_line(gateway: GatewayThread, tmp_path):
    async def ask() -> Any:
        url = f"{gateway.url}/sference"
        async with AsyncSferenceClient(base_url=url, api_key=KEY) as client:
            return await client.create_decision(model="fake", state="s", questions={"q": NOUL})

    assert asyncio.run(ask()).answers["q"].noul == pytest.approx(2 / 3)
    questions = json.dumps({"what": CHOICE, "how": SCORE})
    told = sference(
        gateway.url, tmp_path,
        "decisions", "create", "--model", "fake", "--state", "s", "--questions", questions,
    )  # fmt: skip
    assert "a dog (confidence 0.50)" in told and "0.57" in told


def test_as_many_questions_and_options_as_there_may_be(client: SferenceClient):
    many = {"type": "choice", "criteria": {f"option {n}": None for n in range(26)}}
    levels = {"type": "score", "criteria": list(range(26))}
    questions = {f"q{n}": levels if n % 2 else many for n in range(64)}
    found = client.create_decision(model="fake", state="s", questions=questions)
    assert list(found.answers) == list(questions)
    for answer in found.answers.values():
        assert len(answer.probabilities) == 26
        assert sum(answer.probabilities.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"model": ...}, "model"),
        ({"model": 5}, "model"),
        ({"state": ...}, "state"),
        ({"questions": ...}, "questions"),
        ({"questions": []}, "questions"),
        ({"questions": {}}, "questions"),
        ({"questions": {str(n): NOUL for n in range(65)}}, "questions"),
        ({"questions": {"": NOUL}}, "questions"),
        ({"questions": {"x" * 257: NOUL}}, "questions"),
        ({"questions": {"q": "is it?"}}, "questions.q"),
        ({"questions": {"q": {"criteria": {"a": None}}}}, "questions.q.type"),
        ({"questions": {"q": {"type": "rank"}}}, "questions.q.type"),
        ({"questions": {"q": {"type": ["choice"]}}}, "questions.q.type"),
        ({"questions": {"q": NOUL | {"weight": 1}}}, "questions.q.weight"),
        ({"questions": {"q": {"type": "choice"}}}, "questions.q.criteria"),
        ({"questions": {"q": {"type": "choice", "criteria": {}}}}, "questions.q.criteria"),
        ({"questions": {"q": {"type": "choice", "criteria": ["a"]}}}, "questions.q.criteria"),
        ({"questions": {"q": {"type": "choice", "criteria": {"": "a"}}}}, "questions.q.criteria"),
        ({"questions": {"q": {"type": "choice", "criteria": {str(n): 1 for n in range(27)}}}},
         "questions.q.criteria"),
        ({"questions": {"q": {"type": "score", "criteria": ["a"]}}}, "questions.q.criteria"),
        ({"questions": {"q": {"type": "score", "criteria": {"a": 1}}}}, "questions.q.criteria"),
        ({"questions": {"q": NOUL | {"criteria": {"maybe": "x"}}}}, "questions.q.criteria.maybe"),
        ({"questions": {"q": NOUL | {"criteria": "x"}}}, "questions.q.criteria"),
        ({"images": ["data:image/png;base64,AA=="]}, "images"),
        ({"input": "OpenAI's form"}, "input"),
        ({"model": "ext"}, "model"),
        ({"model": "vectors"}, "model"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(gateway: GatewayThread, changes: dict[str, Any], param: str):
    assert problem(decide(gateway, **changes))[1] == param


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"a": NaN}', b'"x"', b"\xff"])
def test_what_is_no_json_object_is_refused(gateway: GatewayThread, content: bytes):
    with http(gateway) as plain:
        problem(plain.post("/sference/v1/decisions", content=content))


@pytest.mark.parametrize(
    "content",
    [
        b'{"model": "fake", "questions": {}, "state": ' + b"[" * 600 + b"]" * 600 + b"}",
        # It could be read, and written as far down as it is, but not where the legend has it.
        b'{"model": "fake", "state": "s", "questions": {"q": {"type": "score", "criteria": ["a", '
        + b"[" * 252 + b"]" * 252 + b"]}}}",
    ],
    ids=["state", "level"],
)  # fmt: skip
def test_what_is_nested_too_deeply_is_refused(gateway: GatewayThread, content: bytes):
    with http(gateway) as plain:
        told, _ = problem(plain.post("/sference/v1/decisions", content=content))
    assert "nested too deeply" in told


def test_an_unknown_model_and_a_key_that_may_not(gateway: GatewayThread):
    assert problem(decide(gateway, model="none"), 404)[1] == "model"
    files = client_of(gateway, new_key(gateway, KEY, "ann", "files"))
    with files as client, pytest.raises(ApiError, match=r"^403"):
        client.create_decision(model="fake", state="s", questions={"q": NOUL})


def test_an_error_says_which_question_it_is_about(gateway: GatewayThread):
    """The engine holds one request; the gateway asks more at a time."""
    answers = {f"q{n}": CHOICE for n in range(30)}
    told, _ = problem(decide(gateway, model="narrow", questions=answers), 429)
    assert told.startswith("Question 'q")


def test_who_leaves_is_not_decided_for(gateway: GatewayThread):
    body = {"model": "slow", "state": "s", "questions": {f"q{n}": NOUL for n in range(64)}}
    with http(gateway) as plain, pytest.raises(Exception, match="timed out"):
        plain.post("/v1/decisions", json=body, timeout=0.7)
    eventually(lambda: gateway.load("slow").depth == 0, 15)
    done = gateway.load("slow").generated_tokens
    time.sleep(0.7)
    assert gateway.load("slow").generated_tokens == done < 40
