"""What many commands have in common: whom they talk to, and how they answer programs."""

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from llm_engine.cli.client import Gateway

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        help="Configuration. Else LLM_ENGINE_CONFIG, else ./llm-engine.yaml, else defaults.",
    ),
]
Url = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="The gateway. Else LLM_ENGINE_URL, else the `up` that runs, else the configuration's.",
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        help="Better given as LLM_ENGINE_API_KEY: command lines can be seen by others.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]


def connect(url: str | None, key: str | None, config: Path | None) -> "Gateway":
    from llm_engine.cli import target
    from llm_engine.cli.client import Gateway

    return Gateway(target.find_target(url, key, config))


def hint(url: str | None, config: Path | None) -> str:
    """What a further command needs in order to talk to the same gateway; never the key."""
    given = (("--url", url), ("--config", config))
    return "".join(f" {name} {shlex.quote(str(value))}" for name, value in given if value)


def seconds_of(span: str) -> int | None:
    """45m, 12h, 30d, 8w; None for anything else."""
    found = re.fullmatch(r"(\d{1,6})([smhdw])", span.strip())
    return int(found[1]) * UNITS[found[2]] if found else None
