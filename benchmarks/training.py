"""What the trainer costs: its tokens/s beside a bare PEFT loop's, on the same rows, in turns.

    python -m benchmarks.training [--rounds 5] [--model builtin:chat] [--batch-size 8] [--gpu]

Both are processes of their own and train the same number of steps of the same batch size on the
same tokens, in float32 on processors and bfloat16 on a GPU (A B, B A, ...). The first steps are
left out. cpu: tokens a second of processor time, which neighbours disturb less.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.report import RESULTS, environment, ranged
from benchmarks.summary import alternate, ratios, spread
from llm_engine.config import BUILTIN
from llm_engine.demo import lessons
from llm_engine.fine_tunes import data
from llm_engine.fine_tunes.plan import RANK

GOAL = 0.95
OURS, BARE = "llm-engine", "bare PEFT loop"
EXAMPLES, WARM_UP = 800, 20  # lines; steps that are left out
RATE = 1e-3


def write_examples(path: Path) -> None:
    """Of different lengths, and half of the tokens to be learned or less."""
    lines = (json.dumps(line).encode() + b"\n" for line in lessons.support_file())
    with path.open("w") as file:
        for example in data.read(islice(lines, EXAMPLES), path.name, "supervised", EXAMPLES):
            file.write(json.dumps(example) + "\n")


def measure(command: list[str], spec: dict[str, Any]) -> dict[str, float]:
    """Tokens a second, of the clock and of processors, from the first warm step to the last."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | {"HF_HUB_DISABLE_TELEMETRY": "1"},
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(spec) + "\n")
    process.stdin.flush()
    clock = psutil.Process(process.pid)
    seen: list[tuple[float, float, int]] = []
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "failed":
            raise SystemExit(event["message"])
        if event["event"] == "step" and event["step"] >= WARM_UP:
            used = clock.cpu_times()
            seen.append((time.perf_counter(), used.user + used.system, event["tokens"]))
    process.stdin.close()
    if process.wait() != 0 or len(seen) < 2:
        raise SystemExit(f"{command[0]} ended with {process.returncode}")
    (began, began_cpu, before), (ended, ended_cpu, after) = seen[0], seen[-1]
    tokens = after - before
    return {"tokens_per_s": tokens / (ended - began), "cpu": tokens / (ended_cpu - began_cpu)}


def specs(options: argparse.Namespace, folder: Path) -> dict[str, tuple[list[str], dict]]:
    train = folder / "train.jsonl"
    write_examples(train)
    kind, _, name = options.model.partition(":")
    source = str(BUILTIN[name]) if kind == "builtin" else options.model
    shared = {"train": str(train), "seed": 1}
    ours = shared | {
        "weights": options.model, "method": "supervised", "out": str(folder / "out"),
        "limits": {"max_length": 2048}, "checkpoint_every_s": 1e6, "gpus": int(options.gpu),
        "asked": {"n_epochs": 1, "batch_size": options.batch_size, "learning_rate": RATE,
                  "packing": False},
    }  # fmt: skip
    bare = shared | {
        "model": source, "steps": -(-EXAMPLES // options.batch_size), "rank": RANK, "rate": RATE,
        "batch_size": options.batch_size, "max_length": 2048, "gpu": options.gpu,
    }  # fmt: skip
    return {
        OURS: (["llm_engine.fine_tunes.trainer"], ours),
        BARE: (["benchmarks.bare_training"], bare),
    }


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="le-bench-"))
    figures: dict[str, list[dict[str, float]]] = {OURS: [], BARE: []}
    try:
        both = specs(options, folder)
        for number in range(options.rounds):
            for name in alternate(list(figures), number):
                figures[name].append(measure(*both[name]))
                shutil.rmtree(folder / "out", ignore_errors=True)
                speed = figures[name][-1]["tokens_per_s"]
                console.print(f"{number + 1}/{options.rounds}  {name}: {speed:.0f} tokens/s")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "environment": environment(), "model": options.model, "batch_size": options.batch_size,
        "gpu": options.gpu, "examples": EXAMPLES, "figures": figures,
    }  # fmt: skip


def show(results: dict[str, Any], console: Console) -> None:
    figures = results["figures"]
    table = Table(title=f"Training {results['model']}, medians of {len(figures[OURS])} rounds")
    for column in ("", "tokens/s", "against bare", "tokens/s of processor", "against bare"):
        table.add_column(column)
    for name, rounds in figures.items():
        cells = [name]
        for figure in ("tokens_per_s", "cpu"):
            values = [one[figure] for one in rounds]
            other = [one[figure] for one in figures[BARE]]
            cells.append(f"{statistics.median(values):.0f}")
            cells.append("" if name == BARE else ranged(ratios(values, other), "x"))
        table.add_row(*cells)
    console.print(table)
    speeds = [[one["tokens_per_s"] for one in figures[name]] for name in (OURS, BARE)]
    ratio = spread([a / b for a, b in zip(*speeds, strict=True)]).median
    verdict = "[green]reached[/]" if ratio >= GOAL else "[red]missed[/]"
    console.print(f"{verdict}  tokens/s >= {GOAL}x bare: {ratio:.2f}x", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="builtin:chat", help="or a folder, or a hub's id")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--gpu", action="store_true")
    options = parser.parse_args()
    console = Console(width=120)
    results = run(options, console)
    show(results, console)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / time.strftime("training-%Y%m%dT%H%M%SZ.json", time.gmtime())
    path.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"All figures: benchmarks/results/{path.name}")


if __name__ == "__main__":
    main()
