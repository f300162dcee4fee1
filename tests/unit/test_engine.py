"""Engine processes: started, watched, explained, ended. vLLM's own are in tests/serve."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from llm_engine.config import EndpointSettings
from llm_engine.engine import server
from llm_engine.engine.process import EngineProcess, engine_environment, explain
from llm_engine.engine.server import EngineSpec
from llm_engine.engine.vllm import effective_args, to_command_line
from llm_engine.errors import EngineError


def settings(**changes) -> EndpointSettings:
    return EndpointSettings(**{"name": "m", "model": "none", "engine": "fake", **changes})


async def test_start_answer_stop():
    engine = EngineProcess(settings())
    address = await engine.start()
    assert address.port and address.max_model_len == 8192
    assert (await engine.load()).generated_tokens == 1, "ready means answered"
    await engine.check_health()
    pid = engine.pid
    await engine.stop()
    await engine.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_dead_engine_is_unhealthy_and_says_how_it_died():
    engine = EngineProcess(settings())
    await engine.start()
    os.kill(engine.pid, signal.SIGKILL)
    await asyncio.sleep(0.3)
    with pytest.raises(EngineError, match="SIGKILL"):
        await engine.check_health()
    with pytest.raises(EngineError, match="SIGKILL"):
        await engine.load()
    await engine.stop()


async def test_a_hung_engine_is_unhealthy(monkeypatch):
    monkeypatch.setattr("llm_engine.engine.process.PROBE_TIMEOUT_S", 0.5)
    engine = EngineProcess(settings())
    await engine.start()
    os.kill(engine.pid, signal.SIGSTOP)
    with pytest.raises(EngineError, match="does not answer"):
        await engine.check_health()
    os.kill(engine.pid, signal.SIGCONT)
    await engine.stop()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vllm_args": {"nonsense": 1}}, "the fake engine has no nonsense"),
        ({"engine": "vllm", "model": "/nowhere"}, "there is no folder /nowhere"),
        ({"engine": "vllm", "model": os.path.dirname(__file__)}, "it has no config.json"),
    ],
)
async def test_what_cannot_start_says_why(changes, said):
    with pytest.raises(EngineError, match=said):
        await EngineProcess(settings(**changes)).start()


async def test_a_start_that_takes_too_long_is_given_up():
    slow = settings(start_timeout_s=0.01)
    with pytest.raises(EngineError, match="start_timeout_s"):
        await EngineProcess(slow).start()


def test_an_engine_dies_with_its_parent():
    """Even when the parent is killed and can clean nothing up."""
    code = (
        "import asyncio\n"
        "from llm_engine.config import EndpointSettings\n"
        "from llm_engine.engine.process import EngineProcess\n"
        "async def main():\n"
        "    engine = EngineProcess(EndpointSettings(name='m', model='x', engine='fake'))\n"
        "    await engine.start()\n"
        "    print(engine.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with parent.stdout:
        pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    end = time.monotonic() + 5
    while os.path.exists(f"/proc/{pid}") and _state(pid) != "Z":
        assert time.monotonic() < end, "the engine outlived its parent"
        time.sleep(0.05)


def _state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "Z"


def test_the_cause_is_found_in_an_engines_output():
    output = [
        "(EngineCore pid=7) ERROR 11-21 07:14 [core.py:9] ValueError: no valid architectures",
        "(EngineCore pid=7) RuntimeError: Engine core initialization failed. "
        "See root cause above. Failed core proc(s): {}",
    ]
    assert explain(output) == "ValueError: no valid architectures"
    assert explain(["all is well"]) is None


def test_an_engine_does_not_see_the_gateways_keys(monkeypatch):
    monkeypatch.setenv("LLM_ENGINE_API_KEYS", "sk-secret")
    environment = engine_environment(settings(env={"A": "b"}))
    assert environment["A"] == "b" and "sk-secret" not in str(environment)


@pytest.mark.parametrize("wrapped", [False, True])
async def test_a_stream_that_breaks_off_says_why(monkeypatch, wrapped):
    sent = await answers_of(monkeypatch, b"text/event-stream; charset=utf-8", wrapped)
    error = json.loads(sent[-1]["body"].removeprefix(b"data: "))["error"]
    assert (error["message"], error["code"]) == ("ValueError: no such token", 500)
    assert sent[1]["body"] == b"..."


async def test_what_is_no_stream_is_cut(monkeypatch):
    with pytest.raises(ValueError, match="no such token"):
        await answers_of(monkeypatch, b"application/json", False)


async def answers_of(monkeypatch, content_type, wrapped):
    """What the guard of an engine sends that fails with its answer half told."""

    async def app(scope, receive, send):
        headers = [(b"content-type", content_type)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"...", "more_body": True})
        error = ValueError("no such token")
        if wrapped:  # as Starlette does with errors for which there is an answer
            raise RuntimeError("response already started") from error
        raise error

    monkeypatch.setattr(server, "_spec", EngineSpec.of(settings(), secret="s"))
    sent = []

    async def send(message):
        sent.append(message)

    headers = [(b"x-engine-secret", b"s")]
    scope = {"type": "http", "path": "/v1/responses", "headers": headers}
    await server.Guard(app)(scope, None, send)
    return sent


def test_an_engines_secret_is_not_shown():
    assert "hush" not in repr(spec(secret="hush"))


def spec(**changes) -> EngineSpec:
    defaults = {
        "name": "m", "model": "/m", "task": "generate", "host": "127.0.0.1", "secret": "s",
        "max_queue": 5, "tensor_parallel_size": 1, "builtin": False, "vllm_args": {},
    }  # fmt: skip
    return EngineSpec(**{**defaults, **changes})


@pytest.mark.parametrize(
    ("model", "loaded"), [("~/models/x", "/home/ann/models/x"), ("org/x", "org/x"), ("/m", "/m")]
)
def test_a_folder_of_ones_home_is_told_in_full(monkeypatch, model, loaded):
    monkeypatch.setenv("HOME", "/home/ann")
    told = EngineSpec.of(settings(model=model))
    assert told.model == loaded and told.weights == model


def test_vllm_args_of_the_endpoint_win_over_defaults_but_not_over_what_must_be():
    args = effective_args(spec(vllm_args={"enforce_eager": False, "max_num_seqs": 3}), on_cpu=True)
    assert args["enforce_eager"] is False and args["max_num_seqs"] == 3
    assert args["served_model_name"] == "m" and args["max_num_queued_reqs"] == 5
    assert "kv_cache_memory_bytes" not in effective_args(spec(), on_cpu=False)
    assert effective_args(spec(task="embed"), on_cpu=False)["runner"] == "pooling"


def test_adapters_are_off_unless_asked_for_and_leave_a_slot_empty_on_cpus():
    assert "enable_lora" not in effective_args(spec(), on_cpu=True)
    taking = spec(max_adapters=4, max_adapter_rank=32)
    on_cpu, on_gpu = effective_args(taking, on_cpu=True), effective_args(taking, on_cpu=False)
    assert on_cpu["enable_lora"] is True and on_cpu["max_lora_rank"] == 32
    assert (on_cpu["max_loras"], on_cpu["max_cpu_loras"]) == (5, 5)
    assert (on_gpu["max_loras"], on_gpu["max_cpu_loras"]) == (4, 16)
    assert "lora_target_modules" not in on_cpu
    builtin = effective_args(spec(max_adapters=4, builtin=True), on_cpu=True)
    assert "qkv_proj" in builtin["lora_target_modules"]


def test_the_demo_chat_model_takes_adapters_by_default_and_others_when_told():
    assert settings(model="builtin:chat").adapter_slots == 4
    assert settings(model="builtin:chat", max_adapters=0).adapter_slots == 0
    assert settings(model="org/model").adapter_slots == 0
    with pytest.raises(ValueError, match="max_adapters is for endpoints that generate"):
        settings(task="embed", max_adapters=1)
    for name, instead in (("max-loras", "max_adapters"), ("max_lora_rank", "max_adapter_rank")):
        with pytest.raises(ValueError, match=f"set `{instead}` of the endpoint"):
            settings(vllm_args={name: 8})
    with pytest.raises(ValueError, match="8, 16, 32"):
        settings(max_adapter_rank=7)


def test_args_become_a_command_line():
    args = {"max_model_len": 8, "enforce_eager": True, "enable_x": False, "no": None,
            "some_config": {"a": 1}, "allowed": ["x", "y"]}  # fmt: skip
    assert to_command_line(args) == [
        "--max-model-len=8", "--enforce-eager", "--no-enable-x", '--some-config={"a": 1}',
        "--allowed", "x", "y",
    ]  # fmt: skip
