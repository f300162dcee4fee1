"""`up` and `down`: a `python -m deployments.local` as a child, and its orderly end.

Knows nothing of Ray. platform.py has the process, screen.py what is shown of it.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

from llm_engine.cli import console
from llm_engine.cli.platform import LOG, Interrupts, Platform, Watch
from llm_engine.cli.running import find_running, is_local, marked, only_one, read_state, sweep
from llm_engine.cli.screen import Screen
from llm_engine.config import EndpointSettings, Settings
from llm_engine.errors import ConfigError, LLMEngineError, StartupError

TICK_S = 0.1
STOP_TIMEOUT_S = 60


def up(settings: Settings, *, detach: bool, hint: str = "") -> int:
    """Run until told to stop, or until ready with `detach`. Returns the exit code."""
    from llm_engine.cli import doctor

    settings.check_exposure()
    folder = settings.cluster.state_dir
    refuse_if_up(folder)
    with only_one(folder) as lock:
        if left := marked(folder):
            raise StartupError(
                f"an earlier llm-engine has left {_processes(len(left))} behind "
                f"(pids {', '.join(map(str, left[:5]))}); `llm-engine down` ends them."
            )
        findings = doctor.quick(settings)
        screen = Screen(settings, findings, hint)
        for finding in findings:
            if finding.failed:
                raise StartupError(finding.sentence())
        with Interrupts() as interrupts:
            platform = Platform(settings, stay=detach, lock=lock)
            try:
                with screen:
                    code = Watch(platform, screen, interrupts, detach).run()
            except BaseException:
                platform.ask_to_stop()
                raise
            finally:
                platform.close()
        if detach and screen.shown:
            return code
        left = sweep(folder, grace_s=2)
        if screen.failure is not None:
            raise StartupError(screen.failure)
        if code < 0:
            raise StartupError(_unexpected_end(platform, folder, left))
        killed = f" {_processes(left)} had to be killed." if left else ""
        console.say(f"Stopped; nothing is left running.{killed}")
        return code


def _unexpected_end(platform: Platform, folder: Path, left: int) -> str:
    code = platform.exit_code or 0
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    why = f": {platform.last_words}" if platform.last_words else ""
    swept = f" What it left, {_processes(left)}, was killed." if left else ""
    return f"the platform {how}{why}.{swept} Its log is {folder / LOG}."


def refuse_if_up(folder: Path) -> None:
    running = find_running(folder)
    if running is None:
        return
    where = f"is up at {running.address}" if running.address else "is starting"
    raise StartupError(
        f"an llm-engine {where} (process {running.pid}, state in {folder}). "
        "`llm-engine down` stops it; for a second one set another cluster.state_dir and other "
        "ports."
    )


def with_options(
    settings: Settings, model: str | None, name: str | None, host: str | None, port: int | None
) -> Settings:
    """Options of the command line in place of what the configuration says."""
    from pydantic import ValidationError

    from llm_engine.config import GatewaySettings

    if name is not None and model is None:
        raise ConfigError("--name names the endpoint of --model; give that too.")
    changes: dict[str, Any] = {"host": host, "port": port}
    changes = {key: value for key, value in changes.items() if value is not None}
    update: dict[str, Any] = {}
    try:
        if changes:
            told = dict(settings.gateway) | changes
            update["gateway"] = GatewaySettings(**told)
        if model is not None:
            last = model.rstrip("/").replace(":", "/").rsplit("/", 1)[-1]
            task = "embed" if model == "builtin:embed" else "generate"
            update["endpoints"] = (EndpointSettings(name=name or last, model=model, task=task),)
    except ValidationError as error:
        first = error.errors()[0]
        where = first["loc"][0] if first["loc"] else "model"
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"--{where}: {message} (given: {first['input']!r})") from None
    return settings.model_copy(update=update)


def down(folder: Path) -> int:
    """Stop what runs in a state folder; harmless if nothing does."""
    running = find_running(folder)
    if running is None:
        stale = read_state(folder) is not None
        left = sweep(folder)
        (folder / "up.json").unlink(missing_ok=True)
        if left:
            console.say(f"llm-engine had been killed; ended {_processes(left)} it left behind.")
        elif stale:
            console.say(f"Nothing runs in {folder}; removed what a killed llm-engine had left.")
        else:
            console.say(f"Nothing to stop: no llm-engine is up in {folder}.")
        return 0
    began = time.monotonic()
    try:
        os.kill(running.pid, signal.SIGTERM)
    except ProcessLookupError:
        pass
    except PermissionError:
        raise LLMEngineError(
            f"process {running.pid} belongs to somebody else; stop it as the user who started it."
        ) from None
    where = running.address or "llm-engine, which was still starting"
    with console.console(stderr=True).status(f"Stopping {where} (process {running.pid})"):
        while is_local(running.pid):
            if time.monotonic() - began > STOP_TIMEOUT_S:
                raise LLMEngineError(
                    f"process {running.pid} has not ended within {STOP_TIMEOUT_S} s; end it with "
                    f"`kill -9 {running.pid}`, then run `llm-engine down` again."
                )
            time.sleep(TICK_S)
    left = sweep(folder, grace_s=2)
    took = console.duration(time.monotonic() - began)
    swept = f" {_processes(left)} had to be killed." if left else ""
    console.say(f"Stopped {where} in {took}; nothing is left running.{swept}")
    return 0


def _processes(count: int) -> str:
    return f"{count} process" if count == 1 else f"{count} processes"
