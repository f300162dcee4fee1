"""What `up` shows: a live list of steps in a terminal, a line a change elsewhere.

Only draws; it is told events and never asks anybody anything.
"""

import json
import shlex
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llm_engine.cli import console
from llm_engine.config import Settings

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llm_engine.cli.doctor import Finding


@dataclass
class Step:
    label: str
    state: str = "waiting"  # waiting | running | done | failed
    note: str = ""
    began: float = field(default=0.0)
    took: float = field(default=0.0)

    def begin(self) -> None:
        if self.state == "waiting":
            self.state, self.began = "running", time.monotonic()

    def end(self, state: str) -> None:
        if self.state == "running":
            self.took = time.monotonic() - self.began
        self.state = state

    @property
    def elapsed(self) -> str:
        if self.state == "waiting":
            return ""
        seconds = time.monotonic() - self.began if self.state == "running" else self.took
        return console.duration(seconds) if seconds else ""


class Screen:
    def __init__(self, settings: Settings, findings: "list[Finding]", hint: str) -> None:
        self._settings = settings
        self._hint = hint  # what a client command needs in order to find the same configuration
        self._console = console.console()
        self._live: Any = None
        self._spinner: Any = None
        self._checks = Step("install checks")
        self._steps = {"Ray": Step("Ray"), "gateway": Step("gateway")}
        self._models = {each.name: Step(each.name) for each in settings.endpoints}
        self._address = self._dashboard = ""
        self.failure: str | None = None  # why the platform could not start
        self.settled = False  # every endpoint is ready or has failed
        self.shown = False  # the panel that says so
        self._stopping = False
        self._show_findings(findings)

    @property
    def usable(self) -> bool:
        """Whether anything is served, or there is nothing to serve."""
        return not self._models or any(s.state == "done" for s in self._models.values())

    def __enter__(self) -> "Screen":
        if self._console.is_terminal:
            from rich.live import Live
            from rich.spinner import Spinner

            self._spinner = Spinner("dots", style="cyan")
            self._live = Live(
                get_renderable=self._draw, console=self._console, refresh_per_second=8
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end_live()

    def hear(self, event: dict[str, Any]) -> None:
        if self._stopping:
            return  # what was still under way no longer matters
        match event["event"]:
            case "step":
                self._step(event)
            case "endpoint":
                self._endpoint(event["name"], event["status"], event["reason"] or "")
            case "again":
                self.note(f"{event['reason']} Starting Ray once more.", "yellow")
            case "settled":
                self.settled = True
            case "failed":
                self._failed(event["error"])

    def note(self, text: str, style: str = "") -> None:
        """A line of its own, above the live list if there is one."""
        self._console.print(text, style=style, soft_wrap=True)

    def stopping(self, because: str = "") -> None:
        self._stopping = True
        self._end_live()
        why = f"{because[0].upper()}{because[1:]}. " if because else ""
        self.note(f"{why}Stopping: engines, gateway, Ray. This takes a few seconds.")

    def show_ready(self, pid: int | None) -> None:
        """The address and what to do with it; `pid` if it goes on in the background."""
        self._end_live()
        self.shown = True
        self._console.print(self._panel(pid))
        self.note(self._curl())
        end = "llm-engine down stops it." if pid else "Ctrl-C stops it."
        self.note(f"\n{end}", "dim")

    def _step(self, event: dict[str, Any]) -> None:
        name = event["name"]
        self._address = event.get("address", self._address)
        self._dashboard = event.get("dashboard", self._dashboard)
        order = [*self._steps, "models"]
        for before in order[: order.index(name)] if name in order else []:
            step = self._steps[before]
            if step.state == "running":
                step.note = self._address if before == "gateway" else self._dashboard
                step.end("done")
                self._line(f"{before} is up ({step.elapsed}): {step.note}")
        if name in self._steps:
            self._steps[name].begin()
            self._line(f"starting {name}")
        elif name == "models":
            self.settled = not self._models
            for step in self._models.values():
                step.begin()

    def _endpoint(self, name: str, status: str, reason: str) -> None:
        step = self._models.setdefault(name, Step(name))
        step.note = reason
        word = console.WORDS.get(status, status)
        if status in ("READY", "UPDATE_FAILED"):
            step.end("done" if status == "READY" else "failed")
        elif step.state in ("done", "failed"):  # it was up and starts anew
            step.state = "waiting"
            step.begin()
        took = f" ({step.elapsed})" if status == "READY" and not self.shown else ""
        self._line(f"{name} {word}{took}{': ' if reason else ''}{reason}", always=self.shown)

    def _failed(self, error: str) -> None:
        self.failure = error
        for step in self._steps.values():
            if step.state == "running":
                step.end("failed")

    def _show_findings(self, findings: "list[Finding]") -> None:
        for finding in findings:
            if finding.warned:
                self.note(f"warning: {finding.sentence()}", "yellow")
        failed = any(finding.failed for finding in findings)
        self._checks.state = "failed" if failed else "done"
        known = [f.detail for f in findings if f.check in ("vLLM", "memory")]
        self._checks.note = "; ".join(known)
        if not failed:
            self._line(f"install checks passed: {self._checks.note}")

    def _line(self, text: str, *, always: bool = False) -> None:
        """Where nothing can be redrawn, a line a change."""
        if always or not self._console.is_terminal:
            self.note(text)

    def _end_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _draw(self) -> "RenderableType":
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=1)
        grid.add_column(no_wrap=True, min_width=16)
        grid.add_column(justify="right", min_width=6, style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for step in [self._checks, *self._steps.values(), *self._models.values()]:
            if step.state == "running":
                mark = self._spinner.render(time.monotonic())
            else:
                mark = Text(*console.MARKS[step.state])
            note_style = "red" if step.state == "failed" else "dim"
            grid.add_row(mark, step.label, step.elapsed, Text(step.note, note_style))
        return grid

    def _panel(self, pid: int | None) -> "RenderableType":
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row("Address", f"{self._address}/v1")
        ready = [s.label for s in self._models.values() if s.state == "done"]
        grid.add_row("Models", ", ".join(ready) or "none configured")
        for step in self._models.values():
            if step.state == "failed":
                grid.add_row("Failed", Text(f"{step.label}: {step.note}", style="red"))
        if self._settings.gateway.api_keys:
            grid.add_row("Key", "needed: LLM_ENGINE_API_KEY, one of gateway.api_keys")
        token = self._settings.cluster.state_dir / "ray-token"
        grid.add_row("Dashboard", f"{self._dashboard} (its token is in {token})")
        if pid:
            log = self._settings.cluster.state_dir / "up.log"
            grid.add_row("Process", f"{pid} in the background, log in {log}")
        grid.add_row("Try", f"llm-engine chat{self._hint}")
        return Panel(grid, title="llm-engine is ready", border_style="green", expand=False)

    def _curl(self) -> str:
        """A first request, to be copied; keys are never shown."""
        ready = {s.label for s in self._models.values() if s.state == "done"}
        served = [each for each in self._settings.endpoints if each.name in ready]
        if not served:
            return ""
        first = min(served, key=lambda each: each.task != "generate")
        body: dict[str, Any] = {"model": first.name}
        if first.task == "generate":
            path, body["messages"] = "chat/completions", [{"role": "user", "content": "Hello!"}]
        else:
            path, body["input"] = "embeddings", "Hello!"
        key = ' -H "Authorization: Bearer $LLM_ENGINE_API_KEY"'
        return (
            f"curl {self._address}/v1/{path}"
            f"{key if self._settings.gateway.api_keys else ''} -H 'Content-Type: application/json'"
            f" -d {shlex.quote(json.dumps(body))}"
        )
