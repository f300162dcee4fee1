"""Which configuration, address and key a command uses.

Precedence, first that is there wins:
    configuration   --config, LLM_ENGINE_CONFIG, ./llm-engine.yaml, the built-in defaults
    address         --url, LLM_ENGINE_URL, what `up` wrote to up.json, gateway.host and .port
    key             --api-key, LLM_ENGINE_API_KEY, LLM_ENGINE_API_KEYS (its first), gateway.api_keys
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llm_engine.addresses import local_url
from llm_engine.cli.running import find_running

if TYPE_CHECKING:
    from llm_engine.config import Settings

ENV_CONFIG = "LLM_ENGINE_CONFIG"
ENV_KEY = "LLM_ENGINE_API_KEY"
ENV_KEYS = "LLM_ENGINE_API_KEYS"
ENV_URL = "LLM_ENGINE_URL"
DEFAULT_FILE = "llm-engine.yaml"


@dataclass(frozen=True, slots=True)
class Target:
    """Whom a client command talks to."""

    url: str
    key: str | None
    starting: bool = False  # an `up` is on its way there
    source: str = field(default="", compare=False)  # where the key came from, in words


def config_path(given: Path | None) -> Path | None:
    """Where the configuration comes from; None means the built-in defaults."""
    if given is not None:
        return given
    if named := os.environ.get(ENV_CONFIG):
        return Path(named)
    return Path(DEFAULT_FILE) if Path(DEFAULT_FILE).is_file() else None


def load_settings(given: Path | None) -> "Settings":
    from llm_engine import config

    return config.load(config_path(given))


def find_target(url: str | None, key: str | None, given: Path | None) -> Target:
    """Raises ConfigError only where the configuration is really needed."""
    environ = os.environ
    key, source = _given_key(key)
    url = url or environ.get(ENV_URL)
    if url is not None:  # a configured key is not sent to just any address
        url = url if "://" in url else f"http://{url}"
        return Target(url.rstrip("/").removesuffix("/v1"), key, source=source)
    settings = load_settings(given)
    gateway = settings.gateway
    if key is None and gateway.api_keys:
        key = gateway.api_keys[0].get_secret_value()
        source = f"gateway.api_keys of {config_path(given)}"
    running = find_running(settings.cluster.state_dir)
    if running is not None and running.address:
        return Target(running.address.rstrip("/"), key, source=source)
    starting = running is not None
    return Target(local_url(gateway.host, gateway.port), key, starting=starting, source=source)


def _given_key(option: str | None) -> tuple[str | None, str]:
    """The key that needs no configuration, and where it is from."""
    listed = [part.strip() for part in os.environ.get(ENV_KEYS, "").split(",")]
    places = (
        (option, "--api-key"),
        (os.environ.get(ENV_KEY), ENV_KEY),
        (next(filter(None, listed), None), ENV_KEYS),
    )
    return next(((key, source) for key, source in places if key), (None, ""))
