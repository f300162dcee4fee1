"""The command line: light, helpful, and never a traceback. For `up` and `down`: test_cli_up.py."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from llm_engine import config
from llm_engine.cli import chat, client, configuration, console, target
from llm_engine.cli.target import Target
from llm_engine.errors import LLMEngineError
from tests.support.cli import Server, run, serving, write_configuration

COMMANDS = (
    "up down status models chat config ray-env doctor version endpoints files batches keys"
).split()
ENDPOINT_COMMANDS = "create list get update scale delete watch".split()
FILE_COMMANDS = "upload list get download delete".split()
BATCH_COMMANDS = "create list get cancel download".split()
KEY_COMMANDS = "create list revoke".split()
EVERY_COMMAND = [
    *COMMANDS,
    *(f"endpoints {command}" for command in ENDPOINT_COMMANDS),
    *(f"files {command}" for command in FILE_COMMANDS),
    *(f"batches {command}" for command in BATCH_COMMANDS),
    *(f"keys {command}" for command in KEY_COMMANDS),
]
IMPORT_BUDGET_S = 0.3


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A folder with a configuration of its own, far from this machine's."""
    monkeypatch.chdir(tmp_path)
    write_configuration(tmp_path)
    return tmp_path


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running_server:
        running_server.answers["/health"] = (200, {"status": "degraded", "agents": 1})
        running_server.answers["/v1/endpoints"] = (200, {"data": [LOADING, READY]})
        yield running_server


READY = {
    "id": "talker", "task": "generate", "model": "builtin:chat", "status": "READY",
    "status_reason": None, "max_model_len": 2048, "replicas_wanted": 2, "replicas_ready": 2,
    "replicas": [{"load": {"running": 3, "waiting": 1}}, {"load": {"running": 4, "waiting": 0}}],
}  # fmt: skip
LOADING = {
    "id": "slow", "task": "generate", "model": "x/y", "status": "UPDATE_IN_PROGRESS",
    "status_reason": "a replica is loading the model", "max_model_len": None,
    "replicas_wanted": 1, "replicas_ready": 0, "replicas": [],
}  # fmt: skip


def events(*items: object) -> str:
    return "".join(f"data: {x if isinstance(x, str) else json.dumps(x)}\n\n" for x in items)


def piece(text: str, end: str | None = None) -> dict:
    return {"choices": [{"delta": {"content": text}, "finish_reason": end}]}


# Light, and helpful.


def test_importing_the_command_line_is_light():
    code = (
        "import time; t = time.perf_counter(); import llm_engine.cli, sys\n"
        "print(time.perf_counter() - t)\n"
        "print([m for m in ('ray', 'vllm', 'torch', 'httpx', 'rich', 'yaml', 'pydantic')"
        " if m in sys.modules])"
    )
    times = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        took, heavy = done.stdout.splitlines()
        times.append(float(took))
        assert heavy == "[]"
    assert min(times) < IMPORT_BUDGET_S


@pytest.mark.parametrize("command", EVERY_COMMAND)
def test_help_of_a_command_shows_an_example(command):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"llm-engine {command}" in result.stdout.partition("Example")[2]


def test_help_names_every_command():
    for group, commands in (
        ((), COMMANDS),
        (("endpoints",), ENDPOINT_COMMANDS),
        (("files",), FILE_COMMANDS),
        (("batches",), BATCH_COMMANDS),
        (("keys",), KEY_COMMANDS),
    ):
        text = run(*group, "--help").stdout
        assert all(command in text for command in commands)


def test_version():
    for words in (["version"], ["--version"]):
        assert run(*words).stdout.startswith("llm-engine ")


def test_a_mistake_in_the_configuration_is_a_sentence():
    Path("llm-engine.yaml").write_text("gatway: {}\n")
    for command in ("up", "down", "status", "config"):
        result = run(command)
        assert result.exit_code == 1
        assert "did you mean 'gateway'?" in result.stderr


# Whom to talk to.


def test_address_and_key_come_from_the_first_place_that_has_them(elsewhere, monkeypatch):
    Path("other.yaml").write_text("gateway: {port: 2, api_keys: [configured]}\n")
    assert target.find_target(None, None, None) == Target("http://127.0.0.1:1", None)
    assert target.find_target(None, None, Path("other.yaml")).key == "configured"
    monkeypatch.setenv("LLM_ENGINE_CONFIG", "other.yaml")
    assert target.find_target(None, None, None) == Target("http://127.0.0.1:2", "configured")
    monkeypatch.setenv("LLM_ENGINE_URL", "gateway.example:8000/v1/")
    # A configured key is not sent to an address that the configuration does not name.
    assert target.find_target(None, None, None) == Target("http://gateway.example:8000", None)
    monkeypatch.setenv("LLM_ENGINE_API_KEYS", " a , b")
    assert target.find_target(None, None, None).key == "a"
    monkeypatch.setenv("LLM_ENGINE_API_KEY", "mine")
    assert target.find_target(None, None, None).key == "mine"
    assert target.find_target("http://x", "given", None) == Target("http://x", "given")


def test_a_gateway_on_every_interface_is_reached_by_loopback():
    Path("llm-engine.yaml").write_text("gateway: {host: 0.0.0.0, port: 7}\n")
    assert target.find_target(None, None, None).url == "http://127.0.0.1:7"


def test_nothing_answers():
    for words in (["status"], ["models"], ["chat", "hi"]):
        result = run(*words)
        assert result.exit_code == 1
        sentence = "Nothing answers at http://127.0.0.1:1: start it with `llm-engine up`."
        assert sentence in result.stderr
        assert "Traceback" not in result.stderr + result.stdout


def test_something_else_answers(server):
    server.answers.clear()
    result = run("status", "--url", server.url)
    assert result.exit_code == 1 and "not as an llm-engine does (HTTP 404)" in result.stderr
    server.answers["/health"] = (200, "<html>")
    assert "not as an llm-engine does" in run("status", "--url", server.url).stderr
    assert run("status", "--url", "http://[::1").exit_code == 1


def test_a_key_that_is_refused_is_traced_to_where_it_came_from(server, monkeypatch):
    error = {"error": {"message": "Incorrect API key provided."}}
    server.answers["/v1/models"] = (401, error)
    missing = run("models", "--url", server.url)
    assert "(No key was sent: --api-key or LLM_ENGINE_API_KEY gives one.)" in missing.stderr
    monkeypatch.setenv("LLM_ENGINE_API_KEYS", "sk-le-abcdefghijkl,other")
    listed = run("models", "--url", server.url).stderr
    assert "from LLM_ENGINE_API_KEYS and begins with sk-le-abcd.)" in listed
    assert "efgh" not in listed
    monkeypatch.setenv("LLM_ENGINE_API_KEY", "sekret")
    named = run("models", "--url", server.url).stderr
    assert "from LLM_ENGINE_API_KEY.)" in named and "sekret" not in named
    server.answers["/v1/models"] = (403, error)
    result = run("models", "--url", server.url, "--api-key", "wrong")
    assert result.exit_code == 1 and "from --api-key.)" in result.stderr
    assert server.asked[-1]["key"] == "Bearer wrong"


def test_a_configured_key_that_is_refused_is_traced_to_its_file(server):
    port = server.server_port
    Path("mine.yaml").write_text(f"gateway: {{port: {port}, api_keys: [sekret]}}\n")
    server.answers["/v1/models"] = (401, {"error": {"message": "Incorrect API key provided."}})
    told = run("models", "--config", "mine.yaml").stderr
    assert "from gateway.api_keys of mine.yaml.)" in told and "sekret" not in told


# What it shows.


def test_status_shows_each_endpoint_and_why_it_is_not_ready(server):
    text = run("status", "--url", server.url).stdout
    assert "degraded: 1 of 2 endpoints ready" in text
    [talker] = [line.split() for line in text.splitlines() if "talker" in line]
    assert talker == ["talker", "READY", "2/2", "7", "1", "2048", "builtin:chat"]
    assert "a replica is loading the model" in text


def test_status_and_models_for_programs(server):
    told = json.loads(run("status", "--json", "--url", server.url).stdout)
    assert [row["id"] for row in told["endpoints"]] == ["slow", "talker"]
    assert told["health"]["status"] == "degraded" and told["address"] == server.url
    server.answers["/v1/models"] = (200, {"data": [{"id": "[bold]m", "status": "READY"}]})
    assert json.loads(run("models", "--json", "--url", server.url).stdout)[0]["id"] == "[bold]m"
    assert "[bold]m" in run("models", "--url", server.url).stdout


def test_config_prints_what_is_in_effect_without_the_keys():
    Path("llm-engine.yaml").write_text("gateway: {port: 9, api_keys: [sekret]}\n")
    text = run("config").stdout
    assert "sekret" not in text and "from llm-engine.yaml" in text
    told = yaml.safe_load(text)
    assert told["gateway"]["port"] == 9 and told["endpoints"][0]["name"] == "demo-chat"


def test_config_for_a_cluster_is_what_serve_takes(monkeypatch):
    from ray.serve.schema import ServeDeploySchema

    Path("llm-engine.yaml").write_text(
        "gateway: {host: 10.0.0.5, port: 9, api_keys: [sekret]}\n"
        "endpoints: [{name: a, model: m, vllm_args: {max_model_len: 512}}]\n"
    )
    text = run("config", "--serve").stdout
    assert "sekret" not in text and "LLM_ENGINE_API_KEYS" in text
    told = yaml.safe_load(text)
    ServeDeploySchema.model_validate(told)
    assert told["http_options"] == {"host": "0.0.0.0", "port": 9}
    [application] = told["applications"]
    assert application["args"] == {"gateway": {"host": "10.0.0.5", "port": 9}}
    [row] = application["deployments"][0]["user_config"]["endpoints"]
    assert row == {"name": "a", "model": "m", "vllm_args": {"max_model_len": 512}}


def test_config_check_gives_vllms_own_words(monkeypatch):
    Path("llm-engine.yaml").write_text(
        "endpoints: [{name: a, model: m}, {name: b, model: /no/such/folder}]\n"
    )
    asked = []

    def ask(endpoints):
        asked.extend(endpoint.name for endpoint in endpoints)
        return {"a": "vLLM refuses vllm_args: max_model_len", "b": None}

    monkeypatch.setattr(configuration, "ask_vllm", ask)
    result = run("config", "--check")
    assert result.exit_code == 1 and asked == ["a", "b"]
    assert "a: vLLM refuses vllm_args: max_model_len" in result.stderr
    assert "there is no folder /no/such/folder" in result.stderr
    Path("llm-engine.yaml").write_text("endpoints: [{name: f, model: m, engine: fake}]\n")
    assert run("config", "--check").exit_code == 0


@pytest.mark.slow
def test_vllm_itself_judges_the_arguments():
    rows = [
        {"name": "good", "model": "builtin:chat", "vllm_args": {"max_model_len": "1k"}},
        {"name": "bad", "model": "builtin:chat", "vllm_args": {"no_such_thing": 1}},
    ]
    settings = config.parse({"endpoints": rows}, {})
    answers = configuration.ask_vllm(list(settings.endpoints))
    assert answers["good"] is None and "--no-such-thing" in answers["bad"]


# Chat.


def test_chat_streams_the_answer_of_the_first_ready_model(server):
    server.answers["/v1/chat/completions"] = (
        200,
        events(piece("Par"), ": a comment", piece("is.", "stop"), "[DONE]").replace(
            "data: : a", ": a"
        ),
    )
    result = run("chat", "Capital?", "--url", server.url, "--system", "Be brief.",
                 "--temperature", "0", "--max-tokens", "5")  # fmt: skip
    assert (result.exit_code, result.stdout) == (0, "Paris.\n")
    assert server.asked[-1]["body"] == {
        "model": "talker",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Capital?"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "max_completion_tokens": 5,
    }


def test_chat_reads_a_question_from_a_pipe(server):
    server.answers["/v1/chat/completions"] = (200, events(piece("Yes.\n"), "[DONE]"))
    result = run("chat", "--url", server.url, "--model", "named", given="Is it?\n")
    assert result.stdout == "Yes.\n"
    assert server.asked[-1]["body"]["messages"] == [{"role": "user", "content": "Is it?"}]
    assert server.asked[-1]["body"]["model"] == "named"
    assert run("chat", "--url", server.url, given="").exit_code == 1


@pytest.mark.parametrize(
    "status, answer, sentence",
    [
        (404, {"error": {"message": "The model 'x' does not exist."}}, "The model 'x' does not"),
        (200, events(piece("a"), {"error": {"message": "the engine died"}}), "the engine died"),
        (200, events(piece("a")), "the answer ended early"),
        (200, "data: {broken\n\n", "not as an llm-engine does"),
        (502, "Bad gateway", "not as an llm-engine does (HTTP 502)"),
    ],
)
def test_chat_says_what_went_wrong_in_a_sentence(server, status, answer, sentence):
    server.answers["/v1/chat/completions"] = (status, answer)
    result = run("chat", "hi", "-m", "x", "--url", server.url)
    assert result.exit_code == 1 and sentence in result.stderr


def test_chat_says_why_no_model_can_answer(server):
    server.answers["/v1/endpoints"] = (200, {"data": [LOADING]})
    result = run("chat", "hi", "--url", server.url)
    expected = "slow is UPDATE_IN_PROGRESS (a replica is loading the model)"
    assert result.exit_code == 1 and expected in result.stderr


def test_a_conversation_remembers_what_was_answered(server):
    server.answers["/v1/chat/completions"] = (200, events(piece("One"), piece("!"), "[DONE]"))
    with client.Gateway(Target(server.url, None)) as gateway:
        talk = chat.Chat(gateway, "m")
        answer = talk.ask("First?", lambda text, thought: None)
        assert answer.tokens == 2 and "2 tokens" in answer.summary

        def interrupt(text: str, thought: bool) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):  # a part of an answer counts as one
            talk.ask("Second?", interrupt)
        server.answers["/v1/chat/completions"] = (429, {"error": {"message": "later"}})
        with pytest.raises(LLMEngineError, match="later"):
            talk.ask("Third?", lambda text, thought: None)
    said = [(message["role"], message["content"]) for message in talk.messages]
    assert said == [
        ("user", "First?"), ("assistant", "One!"), ("user", "Second?"), ("assistant", "One")
    ]  # fmt: skip
    talk.reset()
    assert talk.messages == []


def test_a_conversation_survives_errors_and_interrupts(server, monkeypatch, capsys):
    lines = iter(["hello", KeyboardInterrupt, "", "/reset", "/what", "hello", EOFError])

    def next_line(prompt: str) -> str:
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", next_line)
    server.answers["/v1/chat/completions"] = (429, {"error": {"message": "The queue is full."}})
    with client.Gateway(Target(server.url, None)) as gateway:
        chat.converse(chat.Chat(gateway, "m"))
    shown = capsys.readouterr()
    assert shown.err.count("The queue is full.") == 2
    assert "starts anew" in shown.out


def test_a_model_cannot_steer_the_terminal():
    assert console.plain("a\x1b[2Jb\x07\nc\td\x9b") == "a[2Jb\nc\td"
