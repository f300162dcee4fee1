"""The command line, run in process, in a folder with a configuration of its own."""

from pathlib import Path

import yaml
from click.testing import Result
from typer.testing import CliRunner

from llm_engine.cli.commands import app


def run(*words: str, given: str | None = None) -> Result:
    return CliRunner().invoke(app, list(words), input=given)


def write_configuration(folder: Path) -> None:
    """Far from this machine's own: a port that nothing answers on, a state folder inside."""
    told = {
        "gateway": {"port": 1},
        "endpoints": [{"name": "fake", "model": "x", "engine": "fake"}],
        "cluster": {"state_dir": str(folder / "state")},
    }
    (folder / "llm-engine.yaml").write_text(yaml.safe_dump(told))
