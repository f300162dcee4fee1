"""`config`: shows the configuration that is in effect, and has vLLM judge its arguments."""

import json
import os
import subprocess
import sys
from typing import Any

import yaml

from llm_engine.cli import console
from llm_engine.config import EndpointSettings, Settings, dump
from llm_engine.engine.server import EngineSpec
from llm_engine.errors import ConfigError, LLMEngineError
from llm_engine.serve_config import HEADER, serve_config

CHECK_TIMEOUT_S = 120
MARK = "@checked "
#: Runs in a process of its own: importing vLLM takes seconds and half a gigabyte.
_ASK_VLLM = f"""
import json, sys
from llm_engine.engine import vllm
from llm_engine.engine.server import EngineSpec
import torch
for line in sys.stdin:
    spec = EngineSpec(**json.loads(line))
    try:
        vllm.parse_args(spec, on_cpu=not torch.cuda.is_available())
        problem = None
    except Exception as error:
        problem = str(error) or type(error).__name__
    print({MARK!r} + json.dumps([spec.name, problem]), flush=True)
"""


def to_yaml(data: dict[str, Any]) -> str:
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)


def show(settings: Settings, source: str) -> None:
    print(f"# What is in effect, from {source}.")
    if settings.gateway.api_keys:
        print("# Keys are masked: put them back before you use this as a file.")
    print(to_yaml(dump(settings)), end="")


def show_serve(settings: Settings) -> None:
    settings.check_exposure()
    print(HEADER + to_yaml(serve_config(settings)), end="")


def check(settings: Settings) -> None:
    """Raises ConfigError with vLLM's own words for each endpoint whose arguments it refuses."""
    from llm_engine.engine.process import check_model

    settings.check_exposure()
    problems: list[str] = []
    wanted = [each for each in settings.endpoints if each.engine == "vllm"]
    for each in wanted:
        try:
            check_model(each)
        except LLMEngineError as error:
            problems.append(str(error))
    if wanted:
        with console.console(stderr=True).status(
            f"vLLM looks at the arguments of {len(wanted)} endpoint(s); this takes some seconds"
        ):
            answers = ask_vllm(wanted)
        problems += [f"{name}: {problem}" for name, problem in answers.items() if problem]
    if problems:
        raise ConfigError("\n".join(problems))
    count = len(settings.endpoints)
    console.say(f"The configuration is good: {count} endpoint(s).", "green", stderr=True)


def ask_vllm(endpoints: list[EndpointSettings]) -> dict[str, str | None]:
    """What vLLM's parser says of each endpoint's arguments: None where it takes them."""
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK_VLLM],
            input="".join(EngineSpec.of(each).to_json() + "\n" for each in endpoints),
            capture_output=True,
            text=True,
            timeout=CHECK_TIMEOUT_S,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise LLMEngineError(f"vLLM did not answer within {CHECK_TIMEOUT_S} s.") from None
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or len(lines) < len(endpoints):
        words = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        raise LLMEngineError(f"vLLM could not be asked: {words[-1]}. See `llm-engine doctor`.")
    return dict(json.loads(line.removeprefix(MARK)) for line in lines)
