"""How a job learns its settings: from one environment variable that its launcher sets.

`LLM_ENGINE_JOB` is JSON: {"settings": {...}, "gateways": ["http://127.0.0.1:8000", ...]}.
Secrets are not in it, for Ray shows it to operators: they come from the node's own environment.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import orjson

from llm_engine.config import Settings, parse
from llm_engine.errors import ConfigError

#: What a job reads its settings and the gateways' addresses from.
ENV_JOB = "LLM_ENGINE_JOB"


@dataclass(frozen=True, slots=True)
class Told:
    settings: Settings
    gateways: list[str]


def read(environ: Mapping[str, str] = os.environ) -> Told:
    """Raises ConfigError."""
    text = environ.get(ENV_JOB)
    if text is None:
        raise ConfigError(f"{ENV_JOB} is not set: jobs are started by llm-engine, not by hand")
    try:
        told = orjson.loads(text)
        raw, gateways = told["settings"], list(told["gateways"])
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{ENV_JOB} is not what a job is told: {error!r}") from None
    return Told(parse(raw, dict(environ), where=ENV_JOB), gateways)
