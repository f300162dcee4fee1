"""What responses cost that are kept: beside a plain chat, in lists of many, and while readers wait.

    python -m benchmarks.responses [--rounds 5] [--requests 300] [--stored 10000] [--readers 500]

The whole system runs, as `llm-engine up` starts it, on an engine without weights that answers at
once: what is left is what the platform does. One chat and one response in the background alternate,
each from the request to its answer; a page is of 100 responses out of all that are stored; readers
wait for events that do not come, and their cost is the gateway's and its proxy's.
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
from rich.console import Console
from rich.table import Table

from benchmarks.processes import used_between
from benchmarks.report import RESULTS, environment
from benchmarks.targets import HOST, LLMEngine
from deployments.local import free_port
from llm_engine.config import EndpointSettings
from llm_engine.ids import new_id
from llm_engine.responses import ResponseRecord
from llm_engine.statuses import ResponseState
from llm_engine.store.sql import Store

GOALS = {"background_ms": 5.0, "page_ms": 20.0, "waiting_percent": 5.0}
QUIET_S, WATCHED_S = 3.0, 15.0
ROLES = ("ingress", "proxy")
FAKE = EndpointSettings(name="fake", model="none", engine="fake", num_cpus=0.1)
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
RESPONSE = {"model": "fake", "input": "hello", "max_output_tokens": 1, "background": True}


async def one(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> float:
    """Milliseconds."""
    began = time.perf_counter()
    answer = await client.post(path, json=body)
    took = (time.perf_counter() - began) * 1000
    answer.raise_for_status()
    return took


async def beside_a_chat(client: httpx.AsyncClient, requests: int) -> dict[str, float]:
    chats, responses = [], []
    for _ in range(requests):
        chats.append(await one(client, "/v1/chat/completions", CHAT))
        responses.append(await one(client, "/v1/responses", RESPONSE))
    return {"chat_ms": statistics.median(chats), "background_ms": statistics.median(responses)}


def fill(store: Store, count: int) -> None:
    now = time.time()
    item = {"id": "msg_1", "type": "message", "role": "user", "status": "completed",
            "content": [{"type": "input_text", "text": "word " * 50}]}  # fmt: skip
    for _ in range(count):
        store.responses.add(
            ResponseRecord(
                new_id("resp"),
                "llm-engine",
                "openai",
                "fake",
                ResponseState.COMPLETED,
                now,
                now + 86400,
                input=[item],
                output=[item],
                ended_at=now,
            )
        )


async def pages(client: httpx.AsyncClient, count: int) -> float:
    took = []
    for _ in range(count):
        began = time.perf_counter()
        answer = await client.get("/sference/v1/responses", params={"limit": 100})
        took.append((time.perf_counter() - began) * 1000)
        assert len(answer.raise_for_status().json()["data"]) == 100
    return statistics.median(took)


async def waiting(client: httpx.AsyncClient, target: LLMEngine, readers: int) -> dict[str, float]:
    """Percent of a core: while nobody waits, and what readers add to that."""
    newest = await client.get("/sference/v1/responses/events", params={"limit": 1})
    cursor = newest.raise_for_status().json()["data"][0]["completion_id"]

    async def used(seconds: float) -> float:
        before, began = target.clock.read(), time.perf_counter()
        await asyncio.sleep(seconds)
        spent = used_between(before, target.clock.read())
        return 100 * sum(spent[role] for role in ROLES) / (time.perf_counter() - began)

    async def read() -> None:
        while True:
            wanted = {"starting_after": cursor, "wait_ms": 25_000}
            await client.get("/sference/v1/responses/events", params=wanted)

    await asyncio.sleep(QUIET_S)
    idle = await used(WATCHED_S)
    tasks = [asyncio.create_task(read()) for _ in range(readers)]
    await asyncio.sleep(QUIET_S)
    busy = await used(WATCHED_S)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return {"idle_percent": idle, "waiting_percent": busy - idle}


async def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="le-bench-"))
    target = LLMEngine(
        "llm-engine", FAKE, free_port(), folder, dashboard_port=free_port(),
        state_dir=folder / "up",
    )  # fmt: skip
    limits = httpx.Limits(max_connections=None)
    rounds, results = [], {"environment": environment(), "requests": options.requests}
    try:
        await target.start()
        async with httpx.AsyncClient(
            base_url=f"http://{HOST}:{target.port}", timeout=60, limits=limits, trust_env=False
        ) as client:
            await beside_a_chat(client, 30)
            for number in range(options.rounds):
                rounds.append(await beside_a_chat(client, options.requests))
                console.print(f"{number + 1}/{options.rounds}  {rounds[-1]}")
            store = Store(f"sqlite:///{folder / 'up' / 'llm-engine.db'}")
            await asyncio.to_thread(fill, store, options.stored)
            store.close()
            results["page_ms"] = await pages(client, 100)
            results |= await waiting(client, target, options.readers)
    finally:
        await target.stop()
        shutil.rmtree(folder, ignore_errors=True)
    return results | {"rounds": rounds, "stored": options.stored, "readers": options.readers}


def show(results: dict[str, Any], console: Console) -> None:
    differences = [each["background_ms"] - each["chat_ms"] for each in results["rounds"]]
    measured = {
        "background_ms": statistics.median(differences),
        "page_ms": results["page_ms"],
        "waiting_percent": results["waiting_percent"],
    }
    chat = statistics.median(each["chat_ms"] for each in results["rounds"])
    words = {
        "background_ms": f"a response in the background, above a plain chat ({chat:.1f} ms), ms",
        "page_ms": f"a page of 100 out of {results['stored']} responses, ms",
        "waiting_percent": f"{results['readers']} readers that wait, percent of a core",
    }
    table = Table(title=f"Medians of {len(results['rounds'])} rounds")
    for column in ("", "measured", "goal", ""):
        table.add_column(column)
    for name, value in measured.items():
        good = value <= GOALS[name]
        verdict = "[green]reached[/]" if good else "[red]missed[/]"
        table.add_row(words[name], f"{value:.1f}", f"<= {GOALS[name]:g}", verdict)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.responses",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--stored", type=int, default=10_000)
    parser.add_argument("--readers", type=int, default=500)
    console = Console(width=120)
    results = asyncio.run(run(parser.parse_args(), console))
    show(results, console)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / time.strftime("responses-%Y%m%dT%H%M%SZ.json", time.gmtime())
    path.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"All figures: benchmarks/results/{path.name}")


if __name__ == "__main__":
    main()
