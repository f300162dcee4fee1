"""What the way to an engine costs: this system against bare vLLM's own server, side by side.

    python -m benchmarks.serving [--quick] [--engine fake] [--ray-serve-llm] [--model PATH]

All targets are up, one is loaded at a time, in turns (A B, B A, ...) round by round, so that what
slows the machine slows both. The result is the ratio; absolute figures are this machine's.
"""

import argparse
import asyncio
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Coroutine
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import report
from benchmarks.load import Job, LoadError, LoadProcess, Result
from benchmarks.processes import used_between
from benchmarks.summary import alternate
from benchmarks.targets import (
    FOLDER_ARGS,
    HOST,
    BareFake,
    BareVLLM,
    LLMEngine,
    RayServeLLM,
    Target,
    TargetError,
    engine_args,
)
from llm_engine.config import EndpointSettings
from llm_engine.errors import LLMEngineError

MODEL_NAME = "bench"
QUESTIONS = (
    "What is the capital of France?",
    "Write a short story about a lighthouse.",
    "Which planet is the largest?",
    "How do I boil an egg?",
)
WIDTH = 150  # of the tables where there is no terminal
IDLE_S = 10
QUICK_IDLE_S = 4


def parse_arguments(line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="builtin:chat", help="builtin:chat, or a folder of weights")
    add("--engine", choices=("vllm", "fake"), default="vllm",
        help="fake: no model at all, pure overhead")  # fmt: skip
    add("--vllm-args", type=json.loads, default={}, help="JSON, for every target alike")
    add("--ray-serve-llm", action="store_true", help="also measure ray.serve.llm's default app")
    add("--ray-serve-llm-direct", action="store_true", help="and with its direct streaming")
    add("--other-checkout", type=Path, action="append", default=[], metavar="FOLDER",
        help="also measure llm-engine as it is there: before and after a change")  # fmt: skip
    add("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    add("--modes", nargs="+", choices=("stream", "whole"), default=["stream", "whole"])
    add("--tokens", type=int, default=64, help="per answer")
    add("--rounds", type=int, help="default 7, with --quick 2")
    add("--seconds", type=float, help="of each measurement; default 4, with --quick 2.5")
    add("--quick", action="store_true", help="about two minutes; coarse")
    add("--port", type=int, default=8300, help="this one and the nineteen after it")
    options = parser.parse_args(line)
    if (options.ray_serve_llm or options.ray_serve_llm_direct) and not find_spec("pyarrow"):
        parser.error("ray.serve.llm needs pyarrow, which llm-engine does not: pip install pyarrow")
    options.rounds = options.rounds or (2 if options.quick else 7)
    options.seconds = options.seconds or (2.5 if options.quick else 4)
    return options


class Benchmark:
    """One run: start all, calibrate, measure in turns."""

    def __init__(self, options: argparse.Namespace, folder: Path, console: Console) -> None:
        self._options = options
        self._folder = folder
        self._console = console
        self.endpoint = endpoint_of(options)
        self.targets = self._targets()
        self.baseline = self.targets[0].name
        self.results: report.Rounds = {}
        self.idle: dict[str, Any] = {}
        self.alone: dict[str, float] = {}  # the baseline before the others were started
        self._load = LoadProcess()
        self._requests: dict[tuple[str, report.Cell], int] = {}

    @property
    def cells(self) -> list[report.Cell]:
        return [(mode, c) for mode in self._options.modes for c in self._options.concurrency]

    async def run(self) -> None:
        started = []
        await self._load.start()
        try:
            for target in self.targets:
                started.append(target)
                with self._console.status(f"Starting {target.name}"):
                    await target.start()
                    await self._warm(target)
                await self._calibrate(target)
            await self._measure_idle()
            await self._measure_rounds()
        finally:
            await self._load.stop()
            with self._console.status("Stopping"):
                await asyncio.gather(*(target.stop() for target in started))

    def _targets(self) -> list[Target]:
        options, port = self._options, self._options.port
        fake = options.engine == "fake"
        common = (self.endpoint, self._folder)

        def make(kind: type[Target], name: str, offset: int, **more: Any) -> Target:
            return kind(name, common[0], port + offset, common[1], **more)

        targets = [make(BareFake, "bare fake engine", 1) if fake else make(BareVLLM, "vLLM", 1)]
        ray = {"dashboard_port": port + 10, "state_dir": self._folder / "a"}
        targets.append(make(LLMEngine, "llm-engine", 0, **ray))
        for number, checkout in enumerate(options.other_checkout):
            ray = {"dashboard_port": port + 13 + number, "state_dir": self._folder / f"o{number}",
                   "checkout": checkout.resolve()}  # fmt: skip
            targets.append(make(LLMEngine, f"llm-engine {checkout.name}", 4 + number, **ray))
        for number, direct in enumerate((False, True)):
            wanted = options.ray_serve_llm_direct if direct else options.ray_serve_llm
            if wanted and not fake:
                state = self._folder / ("c" if direct else "b")
                state.mkdir()
                ray = {"dashboard_port": port + 11 + number, "state_dir": state, "direct": direct}
                name = "ray.serve.llm direct" if direct else "ray.serve.llm"
                targets.append(make(RayServeLLM, name, 2 + number, **ray))
        return targets

    async def _warm(self, target: Target) -> None:
        """First requests compile kernels, fill caches and open connections."""
        for cell in (("stream", max(self._options.concurrency)), ("whole", 1)):
            await self._load.warm_up(self._job(target, cell, requests=2 * cell[1]))
            await self._load.measure()

    async def _calibrate(self, target: Target) -> None:
        """Fix how many requests of each cell take the time wanted: the same in every round."""
        for cell in self.cells:
            with self._console.status(f"Calibrating {target.name} {report.cell_name(cell)}"):
                result = await self._once(target, cell, requests=4 * cell[1])
                wanted = result.requests_per_s * self._options.seconds / cell[1]
                # Whole waves: otherwise the last one is thin and dilutes the rate.
                self._requests[target.name, cell] = max(2, round(wanted)) * cell[1]
                if target is self.targets[0]:
                    again = await self._once(target, cell, self._requests[target.name, cell])
                    self.alone[report.cell_name(cell)] = again.tokens_per_s

    async def _once(self, target: Target, cell: report.Cell, requests: int) -> Result:
        await self._load.warm_up(self._job(target, cell, requests))
        return await self._load.measure()

    async def _measure_idle(self) -> None:
        seconds = QUICK_IDLE_S if self._options.quick else IDLE_S
        with self._console.status("Measuring what idle targets use"):
            before = [target.clock.read() for target in self.targets]
            await asyncio.sleep(seconds)
            for target, then in zip(self.targets, before, strict=True):
                used = used_between(then, target.clock.read())
                self.idle[target.name] = {
                    "cpu_percent": sum(used.values()) / seconds * 100,
                    "cpu_percent_by_role": {r: v / seconds * 100 for r, v in used.items() if v},
                    "memory_mib": target.clock.memory() / 2**20,
                }

    async def _measure_rounds(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
                   TimeRemainingColumn())  # fmt: skip
        total = len(self.cells) * len(self.targets) * self._options.rounds
        self.results = {cell: {t.name: [] for t in self.targets} for cell in self.cells}
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task("", total=total)
            for number in range(self._options.rounds):
                for place, cell in enumerate(self.cells):
                    for target in alternate(self.targets, number + place):
                        words = f"round {number + 1}: {report.cell_name(cell)} on {target.name}"
                        progress.update(task, description=words)
                        figures = await self._measure(target, cell)
                        self.results[cell][target.name].append(figures)
                        progress.advance(task)

    async def _measure(self, target: Target, cell: report.Cell) -> dict[str, float]:
        await self._load.warm_up(self._job(target, cell, self._requests[target.name, cell]))
        before = target.clock.read()
        result = await self._load.measure()
        used = used_between(before, target.clock.read())
        per_request = 1000 / result.requests
        total = sum(used.values())
        return asdict(result) | {
            "tokens_per_s": result.tokens_per_s,
            "requests_per_s": result.requests_per_s,
            "cpu_ms": total * per_request,
            "engine_cpu_ms": used.get("engine", 0.0) * per_request,
            "rest_cpu_ms": (total - used.get("engine", 0.0)) * per_request,
            "client_cpu_ms": result.client_cpu_s * per_request,
        } | {f"cpu_ms_{role}": seconds * per_request for role, seconds in used.items()}  # fmt: skip

    def _job(self, target: Target, cell: report.Cell, requests: int) -> Job:
        mode, concurrency = cell
        stream = mode == "stream"
        return Job(
            host=HOST,
            port=target.port,
            path="/v1/chat/completions",
            headers=target.headers,
            bodies=bodies(self._options.tokens, stream),
            stream=stream,
            concurrency=concurrency,
            requests=requests,
            tokens=self._options.tokens,
        )


def endpoint_of(options: argparse.Namespace) -> EndpointSettings:
    fake, builtin = options.engine == "fake", options.model.startswith("builtin:")
    args = {} if fake or builtin else FOLDER_ARGS
    return EndpointSettings(
        name=MODEL_NAME,
        model=options.model if builtin or fake else str(Path(options.model).resolve()),
        engine=options.engine,
        vllm_args=args | options.vllm_args,
    )


def bodies(tokens: int, stream: bool) -> tuple[str, ...]:
    """Requests whose answers have exactly so many tokens, the same text every time."""
    body: dict[str, Any] = {
        "model": MODEL_NAME, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
    }  # fmt: skip
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return tuple(
        json.dumps(body | {"messages": [{"role": "user", "content": question}]})
        for question in QUESTIONS
    )


def facts_of(benchmark: Benchmark, options: argparse.Namespace) -> dict[str, Any]:
    args = {} if options.engine == "fake" else engine_args(benchmark.endpoint)
    paths = ("model", "other_checkout")
    given = {name: value for name, value in vars(options).items() if name not in paths}
    return {
        "environment": report.environment(),
        "options": given | {"model": Path(options.model).name},
        "vllm_args": {name: value for name, value in args.items() if name != "model"},
        "baseline": benchmark.baseline,
        "idle": benchmark.idle,
        "baseline_alone_tokens_per_s": benchmark.alone,
    }


async def until_terminated(work: Coroutine[Any, Any, None]) -> None:
    """SIGTERM ends it in order, as Ctrl-C does: no server is left behind."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await task


def main() -> None:
    options = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        benchmark = Benchmark(options, folder, console)
        asyncio.run(until_terminated(benchmark.run()))
        report.show(console, benchmark.results, benchmark.idle, benchmark.baseline, benchmark.alone)
        path = report.write(facts_of(benchmark, options), benchmark.results)
        console.print(f"All figures: benchmarks/results/{path.name}")
    except (LLMEngineError, TargetError, LoadError) as error:
        console.print(f"[red]{error}[/]\nLogs: {folder}", highlight=False)
        sys.exit(1)
    except (KeyboardInterrupt, asyncio.CancelledError):
        shutil.rmtree(folder, ignore_errors=True)
        sys.exit(130)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
