"""What batches cost: their speed beside vLLM's offline engine, their start, their neighbours.

    python -m benchmarks.batch [--rounds 3] [--only alone,start,beside,memory] [--model FOLDER]

alone   tokens/s of a batch with nobody else there, against `LLM.generate` on the same rows; both
        are loaded, one works at a time, in turns (A B, B A, ...)
start   seconds from the request for a batch of one row to its end
beside  time to first token of streams with and without a batch beside them, in turns; and how fast
        the batch is meanwhile
memory  the largest size of the job's process over 1,000 and 50,000 rows of 4 KB
"""

import argparse
import asyncio
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.load import Job, LoadProcess
from benchmarks.report import RESULTS, environment
from benchmarks.summary import alternate, percentile
from benchmarks.targets import FOLDER_ARGS, HOST, LLMEngine, engine_args, vllm_environment
from deployments.local import free_port
from llm_engine.config import EndpointSettings

PARTS = ("alone", "start", "beside", "memory")
GOALS = {"alone": ">= 0.95x", "start": "p50 < 5 s", "beside": "<= 1.10x", "memory": "< 1 GiB"}
MODEL = "m"
#: Without weights and at once: what is left is the job's own work.
FAKE = EndpointSettings(name=MODEL, model="none", engine="fake", num_cpus=0.1)
ROWS, TOKENS = 1_000, 64
SUBJECTS = ("France", "Japan", "an owl", "a whale", "the colour of snow", "the month after May")
STREAMS, STREAM_TOKENS, STREAM_REQUESTS = 4, 32, 400
ENDED = ("completed", "failed", "expired", "cancelled")
POLL_S = 0.2  # each look costs the gateway a millisecond or two


def rows(count: int, tokens: int, padding: int = 0) -> Iterator[bytes]:
    for number in range(count):
        subject = SUBJECTS[number % len(SUBJECTS)]
        body = {
            "model": MODEL,
            "prompt": f"{number}. Tell me about {subject}. " + "x " * (padding // 2),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        line = {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}
        yield json.dumps(line).encode() + b"\n"


class System:
    """This system with one endpoint, and a client of it."""

    def __init__(self, endpoint: EndpointSettings, folder: Path) -> None:
        self._target = LLMEngine(
            "llm-engine", endpoint, free_port(), folder,
            dashboard_port=free_port(), state_dir=folder / "up",
        )  # fmt: skip
        self.port = self._target.port
        self._folder = folder

    async def __aenter__(self) -> "System":
        await self._target.start()
        self.client = httpx.AsyncClient(
            base_url=f"http://{HOST}:{self.port}", timeout=120, trust_env=False
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.aclose()
        await self._target.stop()

    def write(self, lines: Iterator[bytes]) -> Path:
        path = self._folder / "rows.jsonl"
        with path.open("wb") as file:
            file.writelines(lines)
        return path

    async def submit(self, path: Path) -> str:
        with path.open("rb") as file:
            made = await self.client.post(
                "/v1/files", data={"purpose": "batch"}, files={"file": (path.name, file)}
            )
        asked = {
            "input_file_id": made.raise_for_status().json()["id"],
            "endpoint": "/v1/completions",
            "completion_window": "24h",
        }
        answer = await self.client.post("/v1/batches", json=asked)
        return answer.raise_for_status().json()["id"]

    async def batch(self, name: str) -> dict[str, Any]:
        return (await self.client.get(f"/v1/batches/{name}")).raise_for_status().json()

    async def finish(self, name: str) -> dict[str, Any]:
        """The batch once it has ended, all of its rows well; `ran_s`: since they were checked."""
        began = None
        while (row := await self.batch(name))["status"] not in ENDED:
            if began is None and row["status"] != "validating":
                began = time.perf_counter()
            await asyncio.sleep(POLL_S)
        row["ran_s"] = time.perf_counter() - (began or time.perf_counter())
        counts = row["request_counts"]
        if row["status"] != "completed" or counts["completed"] != counts["total"]:
            raise SystemExit(f"the batch is {row['status']}: {counts} {row['errors']}")
        return row

    def jobs(self) -> list[psutil.Process]:
        found = []
        for process in self._target.clock.processes():
            try:
                if "jobs.batch" in process.cmdline():
                    found.append(process)
            except psutil.Error:
                continue
        return found


class Offline:
    """`benchmarks.offline` as a child, with the arguments that our engine has."""

    def __init__(self, endpoint: EndpointSettings, folder: Path) -> None:
        self._endpoint = endpoint
        self._log = folder / "offline.log"

    async def __aenter__(self) -> "Offline":
        server_only = (
            "disable_uvicorn_access_log", "enable_auto_tool_choice", "tool_call_parser",
            "served_model_name", "max_num_queued_reqs", "enable_prompt_tokens_details",
            "enable_scale_out",
        )  # fmt: skip
        args = {k: v for k, v in engine_args(self._endpoint).items() if k not in server_only}
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "benchmarks.offline",
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log,
                env=vllm_environment(self._endpoint),
            )  # fmt: skip
        await self._say(json.dumps(args))
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), 30)
        except TimeoutError:
            self._process.kill()

    async def generate(self, path: Path) -> float:
        """Tokens a second."""
        answer = await self._say(str(path))
        return answer["tokens"] / answer["seconds"]

    async def _say(self, line: str) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line.encode() + b"\n")
        answer = await self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"offline vLLM ended: {self._log.read_text()[-2000:]}")
        return json.loads(answer)


def endpoint_of(model: str) -> EndpointSettings:
    if model.startswith("builtin:"):
        return EndpointSettings(name=MODEL, model=model, num_cpus=0.5)
    weights = str(Path(model).resolve())
    return EndpointSettings(name=MODEL, model=weights, num_cpus=0.5, vllm_args=FOLDER_ARGS)


async def measure_alone(
    chat: EndpointSettings, count: int, rounds: int, folder: Path, console: Console
) -> dict[str, Any]:
    """Tokens/s from a batch's first row to its last, and of `generate` on the same rows."""
    figures: dict[str, list[float]] = {"batch": [], "LLM.generate": []}
    whole: list[float] = []
    async with System(chat, folder) as system, Offline(chat, folder) as offline:
        path = system.write(rows(count, TOKENS))
        await system.finish(await system.submit(path))  # both warm up
        await offline.generate(path)
        for number in range(rounds):
            for name in alternate(list(figures), number):
                if name == "batch":
                    began = time.perf_counter()
                    row = await system.finish(await system.submit(path))
                    whole.append(time.perf_counter() - began)
                    speed = row["usage"]["output_tokens"] / row["ran_s"]
                else:
                    speed = await offline.generate(path)
                figures[name].append(speed)
                console.print(f"alone {number + 1}/{rounds}  {name}: {speed:.0f} tokens/s")
    pairs = zip(figures["batch"], figures["LLM.generate"], strict=True)
    return {
        "rows": count, "tokens_per_s": figures, "ratios": [a / b for a, b in pairs],
        "whole_s": whole,
    }  # fmt: skip


async def measure_start(
    chat: EndpointSettings, folder: Path, console: Console, times: int = 9
) -> dict[str, Any]:
    seconds = []
    async with System(chat, folder) as system:
        path = system.write(rows(1, 16))
        for number in range(times):
            began = time.perf_counter()
            await system.finish(await system.submit(path))
            seconds.append(time.perf_counter() - began)
            console.print(f"start {number + 1}/{times}: {seconds[-1]:.2f} s")
    return {"seconds": seconds}


async def measure_beside(
    chat: EndpointSettings, rounds: int, folder: Path, console: Console
) -> dict[str, Any]:
    """The same streams with a batch of endless work beside them, and without."""
    load = LoadProcess()
    await load.start()
    figures: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    speeds = []
    try:
        async with System(chat, folder) as system:
            path = system.write(rows(50_000, TOKENS))
            for number in range(rounds):
                for name in alternate(list(figures), number):
                    batch = None
                    if name == "with":
                        batch = await system.submit(path)
                        await until_running(system, batch)
                    before = await done(system, batch)
                    await load.warm_up(streams(system.port))
                    began = time.perf_counter()
                    result = await load.measure()
                    took = time.perf_counter() - began
                    figures[name].append(
                        {"ttft_p50": result.ttft_p50, "ttft_p99": result.ttft_p99,
                         "tokens_per_s": result.tokens / result.elapsed_s}
                    )  # fmt: skip
                    if batch is not None:
                        speeds.append((await done(system, batch) - before) * TOKENS / took)
                        await system.client.post(f"/v1/batches/{batch}/cancel")
                        while (await system.batch(batch))["status"] != "cancelled":
                            await asyncio.sleep(POLL_S)
                    console.print(f"beside {number + 1}/{rounds}  {name}: {figures[name][-1]}")
    finally:
        await load.stop()
    pairs = list(zip(figures["with"], figures["without"], strict=True))
    return {
        "figures": figures,
        "batch_tokens_per_s": speeds,
        "ttft_p99_ratios": [a["ttft_p99"] / b["ttft_p99"] for a, b in pairs],
        "ttft_p50_ratios": [a["ttft_p50"] / b["ttft_p50"] for a, b in pairs],
    }


async def until_running(system: System, batch: str) -> None:
    while await done(system, batch) < 50:
        await asyncio.sleep(POLL_S)


async def done(system: System, batch: str | None) -> int:
    if batch is None:
        return 0
    return (await system.batch(batch))["request_counts"]["completed"]


def streams(port: int) -> Job:
    body = {
        "model": MODEL, "max_tokens": STREAM_TOKENS, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    bodies = tuple(json.dumps(body | {"prompt": f"Tell me about {s}."}) for s in SUBJECTS)
    return Job(HOST, port, "/v1/completions", {}, bodies, True, STREAMS, STREAM_REQUESTS,
               STREAM_TOKENS)  # fmt: skip


async def measure_memory(folder: Path, console: Console) -> dict[str, Any]:
    """Of the job's process: its largest resident size."""
    largest: dict[str, float] = {}
    async with System(FAKE, folder) as system:
        for count in (1_000, 50_000):
            path = system.write(rows(count, 16, padding=3900))
            batch = await system.submit(path)
            sizes = [0.0]
            while (row := await system.batch(batch))["status"] not in ENDED:
                for job in system.jobs():
                    try:
                        sizes.append(job.memory_info().rss / 2**20)
                    except psutil.Error:
                        continue
                await asyncio.sleep(0.5)
            if row["status"] != "completed":
                raise SystemExit(f"the batch is {row['status']}: {row['errors']}")
            largest[str(count)] = max(sizes)
            console.print(f"memory, {count} rows: {max(sizes):.0f} MiB")
    return {"mib": largest}


def show(results: dict[str, Any], console: Console) -> None:
    table = Table(title="Batches")
    for column in ("what", "measured", "goal"):
        table.add_column(column)
    if alone := results.get("alone"):
        speeds = {name: statistics.median(v) for name, v in alone["tokens_per_s"].items()}
        table.add_row(
            f"a batch of {alone['rows']} rows alone, against LLM.generate",
            f"{ranged(alone['ratios'])}: {speeds['batch']:.0f} and "
            f"{speeds['LLM.generate']:.0f} tokens/s",
            GOALS["alone"],
        )
    if start := results.get("start"):
        low, high = min(start["seconds"]), max(start["seconds"])
        table.add_row(
            "a batch of one row, from its request to its end",
            f"p50 {percentile(start['seconds'], 0.5):.1f} s ({low:.1f} to {high:.1f})",
            GOALS["start"],
        )
    if beside := results.get("beside"):
        speed = statistics.median(beside["batch_tokens_per_s"])
        table.add_row(
            f"TTFT p99 of {STREAMS} streams with a batch beside them, against without",
            f"{ranged(beside['ttft_p99_ratios'])}; the batch meanwhile {speed:.0f} tokens/s",
            GOALS["beside"],
        )
        table.add_row("TTFT p50, likewise", ranged(beside["ttft_p50_ratios"]), "")
    if memory := results.get("memory"):
        sizes = ", ".join(f"{size:.0f} MiB at {rows} rows" for rows, size in memory["mib"].items())
        table.add_row("the job's memory", sizes, GOALS["memory"])
    console.print(table)


def ranged(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"


async def run(options: argparse.Namespace, parts: list[str], console: Console) -> dict[str, Any]:
    results: dict[str, Any] = {"environment": environment(), "model": Path(options.model).name}
    chat = endpoint_of(options.model)
    for part in parts:
        folder = Path(tempfile.mkdtemp(prefix="le-bench-"))
        try:
            if part == "alone":
                results[part] = await measure_alone(
                    chat, options.rows, options.rounds, folder, console
                )
            elif part == "start":
                results[part] = await measure_start(chat, folder, console)
            elif part == "beside":
                results[part] = await measure_beside(chat, options.rounds, folder, console)
            else:
                results[part] = await measure_memory(folder, console)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.batch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=ROWS, help="of the batch that runs alone")
    parser.add_argument(
        "--model", default="builtin:chat", help="builtin:chat, or a folder of weights"
    )
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated")
    options = parser.parse_args()
    parts = options.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    console = Console(width=120)
    results = asyncio.run(run(options, parts, console))
    show(results, console)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / time.strftime("batch-%Y%m%dT%H%M%SZ.json", time.gmtime())
    path.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"All figures: benchmarks/results/{path.name}")


if __name__ == "__main__":
    main()
