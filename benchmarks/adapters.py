"""What adapters cost: the base, beside them and where more are asked for than there are slots.

    python -m benchmarks.adapters [--rounds 5] [--only base,mixed,thrash,first]

base    tokens/s and start of an engine that takes adapters, none of them asked for, against one
        that takes none; both are loaded, one works at a time, in turns (A B, B A, ...)
mixed   tokens/s of 32 streams over the base and 8 adapters, against the base alone, through the
        whole system
thrash  the base's time to first token and tokens/s of 4 streams beside 16 streams: of the base, of
        4 adapters in 4 slots, of 16 adapters in 4 slots; and what the 16 streams reach
first   seconds from an adapter's record to the first token through its name
"""

import argparse
import asyncio
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import lora
from benchmarks.load import Job, LoadProcess, Result
from benchmarks.report import RESULTS, environment
from benchmarks.summary import alternate, percentile
from benchmarks.targets import HOST, LLMEngine
from deployments.local import free_port
from llm_engine.config import EndpointSettings, parse
from llm_engine.endpoints import OPERATOR
from llm_engine.engine.base import HEADER_SECRET
from llm_engine.engine.process import EngineProcess
from llm_engine.fine_tunes.adapters import measure, new_adapter_id, publish
from llm_engine.records import AdapterRecord
from llm_engine.storage.opening import open_storage
from llm_engine.store import adapters
from llm_engine.store.sql import Store

PARTS = ("base", "mixed", "thrash", "first")
GOALS = {"base": "", "mixed": "", "thrash": "the base goes on", "first": "< 3 s"}
MODEL = "m"
SUBJECTS = ("France", "Japan", "an owl", "a whale", "the colour of snow", "the month after May")
TOKENS = 32
STREAMS, REQUESTS = 32, 640
BESIDE, FEW, FEW_REQUESTS = 16, 4, 120


def endpoint(**changes: Any) -> EndpointSettings:
    return EndpointSettings(**{"name": MODEL, "model": lora.WEIGHTS, "num_cpus": 1} | changes)


def job(port: int, models: list[str], streams: int, requests: int, **headers: str) -> Job:
    body = {
        "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    bodies = tuple(
        json.dumps(body | {"model": model, "prompt": f"Tell me about {subject}."})
        for subject in SUBJECTS
        for model in models
    )
    return Job(HOST, port, "/v1/completions", headers, bodies, True, streams, requests, TOKENS)


class System:
    """This system with one endpoint, and adapters that nobody has trained."""

    def __init__(self, settings: EndpointSettings, folder: Path) -> None:
        self._target = LLMEngine(
            "llm-engine", settings, free_port(), folder,
            dashboard_port=free_port(), state_dir=folder / "up",
        )  # fmt: skip
        self.port = self._target.port
        self._folder = folder
        self._made = 0

    async def __aenter__(self) -> "System":
        await self._target.start()
        known = parse({"cluster": {"state_dir": str(self._folder / "up")}}, {})
        self._store, self._storage = Store(known.store_url), open_storage(known)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._store.close()
        await self._target.stop()

    def make(self) -> AdapterRecord:
        """Published, and not yet recorded."""
        self._made += 1
        folder = lora.make(self._folder / f"adapter-{self._made}", seed=self._made)
        size, rank = measure(folder)
        record = AdapterRecord(
            new_adapter_id(), f"ft:{MODEL}:bench::{self._made}", OPERATOR, MODEL, lora.WEIGHTS,
            rank, size, time.time(),
        )  # fmt: skip
        publish(self._storage, folder, record)
        return record

    def record(self, made: AdapterRecord) -> str:
        with self._store.database.writing() as connection:
            adapters.add(connection, made)
        return made.name


async def measure_base(rounds: int, folder: Path, console: Console) -> dict[str, Any]:
    engines = {
        "without": EngineProcess(endpoint(max_adapters=0)),
        "with": EngineProcess(endpoint()),
    }
    figures: dict[str, list[float]] = {name: [] for name in engines}
    costs: dict[str, list[float]] = {name: [] for name in engines}
    starts: dict[str, list[float]] = {name: [] for name in engines}
    load, addresses = LoadProcess(), {}
    await load.start()
    try:
        for number in range(2):  # the second time the files are in the system's memory
            for name in alternate(list(engines), number):
                began = time.perf_counter()
                addresses[name] = await engines[name].start()
                starts[name].append(time.perf_counter() - began)
                console.print(f"base, start {name}: {starts[name][-1]:.1f} s")
                if number == 0:
                    await engines[name].stop()
        for number in range(rounds):
            for name in alternate(list(engines), number):
                secret = {HEADER_SECRET: addresses[name].secret}
                await load.warm_up(job(addresses[name].port, [MODEL], STREAMS, REQUESTS, **secret))
                before = cpu_s(engines[name])
                result = await load.measure()
                figures[name].append(result.tokens_per_s)
                costs[name].append((cpu_s(engines[name]) - before) / result.tokens)
                shown = f"{result.tokens_per_s:.0f} tok/s, {1e6 * costs[name][-1]:.0f} us CPU each"
                console.print(f"base {number + 1}/{rounds}  {name}: {shown}")
    finally:
        await load.stop()
        for engine in engines.values():
            await engine.stop()
    return {"tokens_per_s": figures, "starts_s": starts, "cpu_s_per_token": costs,
            "ratios": paired(figures["with"], figures["without"]),
            "cpu_ratios": paired(costs["with"], costs["without"])}  # fmt: skip


def cpu_s(engine: EngineProcess) -> float:
    """Of all of its processes, so far."""
    own = psutil.Process(engine.pid)
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(each.user + each.system for each in times)


async def measure_mixed(rounds: int, folder: Path, console: Console) -> dict[str, Any]:
    figures: dict[str, list[float]] = {"base": [], "base and 8 adapters": []}
    load = LoadProcess()
    await load.start()
    try:
        async with System(endpoint(max_adapters=8), folder) as system:
            names = [system.record(system.make()) for _ in range(8)]
            models = {"base": [MODEL], "base and 8 adapters": [MODEL, *names]}
            for number in range(rounds):
                for name in alternate(list(models), number):
                    await load.warm_up(job(system.port, models[name], STREAMS, REQUESTS))
                    figures[name].append((await load.measure()).tokens_per_s)
                    shown = f"{figures[name][-1]:.0f} tok/s"
                    console.print(f"mixed {number + 1}/{rounds}  {name}: {shown}")
    finally:
        await load.stop()
    base, mixed = figures.values()
    return {"tokens_per_s": figures, "ratios": paired(mixed, base)}


async def measure_thrash(rounds: int, folder: Path, console: Console) -> dict[str, Any]:
    asked, beside = LoadProcess(), LoadProcess()
    await asked.start()
    await beside.start()
    figures: dict[str, list[dict[str, float]]] = {}
    try:
        async with System(endpoint(max_adapters=4), folder) as system:
            names = [system.record(system.make()) for _ in range(16)]
            models = {"base": [MODEL], "4 adapters": names[:4], "16 adapters": names}
            figures = {name: [] for name in models}
            for number in range(rounds):
                for name in alternate(list(models), number):
                    # More than the others take: they are cut off when these have ended.
                    await beside.warm_up(job(system.port, models[name], BESIDE, 100_000))
                    await asked.warm_up(job(system.port, [MODEL], FEW, FEW_REQUESTS))
                    endless = asyncio.create_task(beside.measure())
                    await asyncio.sleep(2)
                    before = await generated(system.port)
                    result = await asked.measure()
                    made = await generated(system.port) - before - result.tokens
                    endless.cancel()
                    await beside.stop()
                    await beside.start()
                    figures[name].append(
                        seen(result) | {"beside_tokens_per_s": made / result.elapsed_s}
                    )
                    console.print(f"thrash {number + 1}/{rounds}  {name}: {figures[name][-1]}")
    finally:
        await asked.stop()
        await beside.stop()
    return {"figures": figures}


def seen(result: Result) -> dict[str, float]:
    return {
        "ttft_p50": result.ttft_p50, "ttft_p99": result.ttft_p99, "gap_p50": result.gap_p50,
        "gap_p99": result.gap_p99, "tokens_per_s": result.tokens_per_s,
    }  # fmt: skip


async def generated(port: int) -> float:
    """Tokens of the engines, by their own count, which is told twice a second."""
    async with httpx.AsyncClient(base_url=f"http://{HOST}:{port}", trust_env=False) as client:
        row = (await client.get(f"/v1/endpoints/{MODEL}")).raise_for_status().json()
    return sum(replica["load"]["generated_tokens"] for replica in row["replicas"])


async def measure_first(folder: Path, console: Console, times: int = 20) -> dict[str, Any]:
    seconds: list[float] = []
    async with System(endpoint(), folder) as system:
        url = f"http://{HOST}:{system.port}/v1/completions"
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            for _ in range(times):
                made = system.make()
                body = {"model": made.name, "prompt": "Tell me", "max_tokens": 8, "stream": True}
                began = time.perf_counter()
                system.record(made)
                async with client.stream("POST", url, json=body) as answer:
                    answer.raise_for_status()
                    async for _ in answer.aiter_bytes():
                        seconds.append(time.perf_counter() - began)
                        break
    console.print("first: " + ", ".join(f"{each:.3f}" for each in seconds) + " s")
    return {"seconds": seconds}


def paired(ours: list[float], theirs: list[float]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def ranged(values: list[float], unit: str = "x") -> str:
    low, high = min(values), max(values)
    return f"{statistics.median(values):.2f}{unit} ({low:.2f} to {high:.2f})"


def show(results: dict[str, Any], console: Console) -> None:
    table = Table(title="Adapters")
    for column in ("what", "measured", "goal"):
        table.add_column(column)
    if base := results.get("base"):
        table.add_row("the base where adapters are taken, against none: tokens/s",
                      ranged(base["ratios"]), GOALS["base"])  # fmt: skip
        table.add_row("its CPU a token, likewise", ranged(base["cpu_ratios"]), "")
        starts = {name: f"{min(seconds):.1f}" for name, seconds in base["starts_s"].items()}
        told = f"{starts['with']} and {starts['without']} s"
        table.add_row("its start, the faster of two, with and without", told, "")
    if mixed := results.get("mixed"):
        table.add_row(f"{STREAMS} streams of the base and 8 adapters, against the base: tokens/s",
                      ranged(mixed["ratios"]), GOALS["mixed"])  # fmt: skip
    for name, rounds in results.get("thrash", {}).get("figures", {}).items():
        told = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        table.add_row(
            f"{FEW} streams of the base beside {BESIDE} of {name}",
            f"TTFT p50 {told['ttft_p50']:.0f}, p99 {told['ttft_p99']:.0f} ms, gap p50 "
            f"{told['gap_p50']:.0f}, p99 {told['gap_p99']:.0f} ms, "
            f"{told['tokens_per_s']:.0f} tok/s; the others {told['beside_tokens_per_s']:.0f} tok/s",
            GOALS["thrash"],
        )
    if first := results.get("first"):
        told = first["seconds"]
        table.add_row(
            "from an adapter's record to its first token",
            f"p50 {percentile(told, 0.5):.2f} s, max {max(told):.2f} s",
            GOALS["first"],
        )
    console.print(table)


async def run(parts: list[str], rounds: int, console: Console) -> dict[str, Any]:
    results: dict[str, Any] = {"environment": environment()}
    for part in parts:
        folder = Path(tempfile.mkdtemp(prefix="le-bench-"))
        try:
            if part == "first":
                results[part] = await measure_first(folder, console)
            else:
                work = {"base": measure_base, "mixed": measure_mixed, "thrash": measure_thrash}
                results[part] = await work[part](rounds, folder, console)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adapters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated")
    options = parser.parse_args()
    parts = options.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    console = Console(width=140)
    results = asyncio.run(run(parts, options.rounds, console))
    show(results, console)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / time.strftime("adapters-%Y%m%dT%H%M%SZ.json", time.gmtime())
    path.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"All figures: benchmarks/results/{path.name}")


if __name__ == "__main__":
    main()
