"""What endpoints cost: starting one beside a bare vLLM, listing many, choosing a replica, updating.

    python -m benchmarks.endpoints [--rounds 3] [--only start,update,list,route]

Starts alternate in one run (A B, B A, ...), each from the request to its first token; the result is
the ratio. The other figures are this machine's.
"""

import argparse
import asyncio
import json
import random
import shutil
import statistics
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from rich.console import Console
from rich.table import Table

from benchmarks.report import RESULTS
from benchmarks.summary import alternate
from benchmarks.targets import HOST, BareVLLM, LLMEngine
from deployments.local import free_port
from llm_engine.api.app import build_app
from llm_engine.catalog import Catalog
from llm_engine.config import EndpointSettings, parse
from llm_engine.endpoints import OPERATOR
from llm_engine.records import (
    Directory,
    EndpointStatus,
    Load,
    ModelRecord,
    Principal,
    ReplicaReport,
    RoutingTable,
)
from llm_engine.records import Scope as KeyScope
from llm_engine.routing import Balancer
from llm_engine.services import Services
from llm_engine.statuses import EndpointState, ReplicaState
from llm_engine.store.sql import Store

PARTS = ("start", "update", "list", "route")
GOALS = {"start": 1.15, "list_ms": 20, "route_us": 50}
POLL_S = 0.2  # as often as the bare server is asked; more would take the core from the engine
ASKING = 4  # clients that ask without a pause while an endpoint is updated
UPDATED_AT_LEAST = 500  # requests
CHAT = {"model": "builtin:chat"}


# -- from create to the first token


async def measure_starts(rounds: int, folder: Path, console: Console) -> dict[str, Any]:
    """Seconds until a token: an endpoint made over HTTP, and vLLM's own server by itself."""
    system = await run_system(folder)
    seconds: dict[str, list[float]] = {"llm-engine": [], "bare vLLM": []}
    phases = []
    try:
        async with httpx.AsyncClient(base_url=url(system), timeout=60, trust_env=False) as client:
            for number in range(rounds):
                for name in alternate(list(seconds), number):
                    if name == "bare vLLM":
                        took = await start_bare(folder, number)
                    else:
                        took, spent = await start_endpoint(client, f"bench-{number}")
                        phases.append(spent)
                    seconds[name].append(took)
                    console.print(f"start {number + 1}/{rounds}  {name}: {took:.1f} s")
    finally:
        await system.stop()
    pairs = zip(seconds["llm-engine"], seconds["bare vLLM"], strict=True)
    return {"seconds": seconds, "ratios": [ours / bare for ours, bare in pairs], "phases": phases}


async def run_system(folder: Path) -> LLMEngine:
    fake = EndpointSettings(name="idle", model="none", engine="fake", num_cpus=0.1)
    system = LLMEngine(
        "llm-engine", fake, free_port(), folder,
        dashboard_port=free_port(), state_dir=folder / "up",
    )  # fmt: skip
    await system.start()
    return system


def url(system: LLMEngine) -> str:
    return f"http://{HOST}:{system.port}"


async def start_endpoint(client: httpx.AsyncClient, name: str) -> tuple[float, Any]:
    """Create it, wait until it says READY, ask it, delete it."""
    began = time.perf_counter()
    (await client.post("/v1/endpoints", json={"name": name, **CHAT})).raise_for_status()
    row = await until(client, name, "READY")
    await ask(client, name)
    took = time.perf_counter() - began
    (await client.delete(f"/v1/endpoints/{name}")).raise_for_status()
    while (await client.get(f"/v1/endpoints/{name}")).status_code == 200:
        await asyncio.sleep(POLL_S)
    return took, row["phases"]


async def until(client: httpx.AsyncClient, name: str, state: str) -> dict[str, Any]:
    while True:
        row = (await client.get(f"/v1/endpoints/{name}")).raise_for_status().json()
        if row["status"] == state and row["settled"]:
            return row
        if row["status"] == "UPDATE_FAILED":
            raise SystemExit(f"{name}: {row['status_reason']}")
        await asyncio.sleep(POLL_S)


async def ask(client: httpx.AsyncClient, model: str) -> None:
    body = {"model": model, "prompt": "One", "max_tokens": 1}
    (await client.post("/v1/completions", json=body)).raise_for_status()


async def start_bare(folder: Path, number: int) -> float:
    endpoint = EndpointSettings(name="bare", **CHAT)
    target = BareVLLM(f"bare {number}", endpoint, free_port(), folder)
    began = time.perf_counter()
    try:
        await target.start()
        base = f"http://{HOST}:{target.port}"
        async with httpx.AsyncClient(base_url=base, timeout=60, trust_env=False) as client:
            await ask(client, "bare")
        return time.perf_counter() - began
    finally:
        await target.stop()


# -- a rolling update on real vLLM


async def measure_update(folder: Path, console: Console) -> dict[str, Any]:
    """Requests that failed while an endpoint on vLLM was updated under load."""
    system = await run_system(folder)
    statuses: list[int] = []
    try:
        async with httpx.AsyncClient(base_url=url(system), timeout=60, trust_env=False) as client:
            (await client.post("/v1/endpoints", json={"name": "m", **CHAT})).raise_for_status()
            await until(client, "m", "READY")
            updating = True

            async def keep_asking() -> None:
                body = {"model": "m", "prompt": "One", "max_tokens": 16}
                while updating or len(statuses) < UPDATED_AT_LEAST:
                    answer = await client.post("/v1/completions", json=body)
                    statuses.append(answer.status_code)

            asking = [asyncio.create_task(keep_asking()) for _ in range(ASKING)]
            change = {"vllm_args": {"max_model_len": 1024}}
            (await client.patch("/v1/endpoints/m", json=change)).raise_for_status()
            await until(client, "m", "READY")
            console.print(f"update: READY after {len(statuses)} requests")
            await asyncio.sleep(5)  # the old replica drains
            updating = False
            await asyncio.gather(*asking)
    finally:
        await system.stop()
    failed = sum(status != 200 for status in statuses)
    return {"requests": len(statuses), "failed": failed}


# -- many records


async def measure_list(folder: Path, count: int = 200, times: int = 100) -> dict[str, Any]:
    """GET /v1/endpoints over HTTP, with the store on SQLite."""
    store = Store.open(f"sqlite:///{folder}/list.db")
    for i in range(count):
        settings = EndpointSettings(name=f"model-{i}", model="org/model")
        store.endpoints.create(settings, OPERATOR, {}, count)
    services = Services(parse({}, {}), Balancer(), store)
    services.update(table(count, 1), store.directory())
    config = uvicorn.Config(build_app(services), port=0, lifespan="off", log_level="warning")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    spent = []
    base = f"http://{HOST}:{port}"
    async with httpx.AsyncClient(base_url=base, trust_env=False) as client:
        for _ in range(times):
            began = time.perf_counter()
            answer = await client.get("/v1/endpoints")
            spent.append((time.perf_counter() - began) * 1000)
            assert len(answer.json()["data"]) == count
    server.should_exit = True
    await serving
    store.close()
    return quantiles(spent) | {"records": count}


def table(models: int, replicas: int) -> RoutingTable:
    names = [f"model-{i}" for i in range(models)]
    status = EndpointState.READY
    return RoutingTable(
        version=random.getrandbits(30),
        endpoints={
            n: EndpointStatus(n, "org/model", "generate", status, max_queue=256) for n in names
        },
        replicas={
            name: tuple(
                ReplicaReport(
                    name, f"{name}-{i}", "1", ReplicaState.READY, HOST, 1, "secret",
                    load=Load(running=random.randrange(32)),
                )
                for i in range(replicas)
            )
            for name in names
        },
    )  # fmt: skip


# -- one choice


def measure_route(models: int = 500, replicas: int = 4, times: int = 50_000) -> dict[str, Any]:
    """Name to replica, an alias every other time; and what stays in memory of a thousand
    pictures."""
    balancer = Balancer()
    catalog = Catalog(balancer)
    who = Principal("ann", frozenset({KeyScope.INFERENCE}))
    aliases = {
        f"alias-{i}": ModelRecord(f"mdl_{i}", "ann", f"alias-{i}", model=f"model-{i}")
        for i in range(models)
    }
    catalog.update(Directory(1, {}, {"ann": aliases}))
    balancer.update(table(models, replicas))
    names = [f"{kind}-{i}" for i in range(models) for kind in ("model", "alias")]
    spent = []
    for _ in range(times):
        name = random.choice(names)
        began = time.perf_counter()
        route = catalog.resolve(who, name, "generate")
        assert route.endpoint is not None
        replica = balancer.choose(route.endpoint)
        spent.append((time.perf_counter() - began) * 1e6)
        balancer.acquire(replica)
        if random.random() < 0.99:
            balancer.release(replica)
    tracemalloc.start()
    sizes = []
    for _ in range(5):
        for _ in range(20):
            balancer.update(table(models, replicas))
        sizes.append(tracemalloc.get_traced_memory()[0] / 2**20)
    tracemalloc.stop()
    return quantiles(spent) | {"models": models, "replicas": models * replicas, "mib": sizes}


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"p50": statistics.median(ordered), "p99": ordered[int(0.99 * len(ordered))]}


# -- the run


def show(results: dict[str, Any], console: Console) -> None:
    shown = Table(title="Endpoints")
    for column in ("what", "measured", "goal"):
        shown.add_column(column)
    if start := results.get("start"):
        ratios = sorted(start["ratios"])
        ours, bare = (statistics.median(start["seconds"][n]) for n in ("llm-engine", "bare vLLM"))
        shown.add_row(
            "create to first token, against bare vLLM",
            f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f}): "
            f"{ours:.1f} s, {bare:.1f} s",
            f"<= {GOALS['start']}x",
        )
    if update := results.get("update"):
        shown.add_row(
            "rolling update on vLLM under load",
            f"{update['failed']} of {update['requests']} requests failed",
            "0 of 500",
        )
    if listed := results.get("list"):
        shown.add_row(
            f"list of {listed['records']} endpoints",
            f"p50 {listed['p50']:.1f} ms, p99 {listed['p99']:.1f} ms",
            f"p50 < {GOALS['list_ms']} ms",
        )
    if route := results.get("route"):
        shown.add_row(
            f"choice among {route['models']} models, {route['replicas']} replicas",
            f"p50 {route['p50']:.1f} µs, p99 {route['p99']:.1f} µs",
            f"p50 < {GOALS['route_us']} µs",
        )
        growth = ", ".join(f"{size:.1f}" for size in route["mib"])
        shown.add_row("memory after 20, 40, ... 100 new pictures", f"{growth} MiB", "bounded")
    console.print(shown)


async def run(parts: list[str], rounds: int, console: Console) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for part in parts:
        folder = Path(tempfile.mkdtemp(prefix="le-bench-"))
        try:
            if part == "start":
                results[part] = await measure_starts(rounds, folder, console)
            elif part == "update":
                results[part] = await measure_update(folder, console)
            elif part == "list":
                results[part] = await measure_list(folder)
            else:
                results[part] = measure_route()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.endpoints", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated")
    options = parser.parse_args()
    parts = options.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    console = Console(width=120)
    results = asyncio.run(run(parts, options.rounds, console))
    show(results, console)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / time.strftime("endpoints-%Y%m%dT%H%M%SZ.json", time.gmtime())
    path.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
