"""The command line `llm-engine`: commands.py has one function a command. Never imports Ray."""

from llm_engine.cli.commands import main

__all__ = ["main"]
