"""The gateway's ASGI app under uvicorn, in a thread, in front of real fake-engine processes."""

import asyncio
import contextlib
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any, Self

import httpx
import uvicorn
from openai import OpenAI

from llm_engine.api.app import Gateway, build_app
from llm_engine.config import EndpointSettings, parse
from llm_engine.endpoints import generation
from llm_engine.engine.adapters import AdapterSource
from llm_engine.engine.process import EngineProcess
from llm_engine.records import EndpointStatus, Load, ReplicaReport, RoutingTable
from llm_engine.routing import Balancer
from llm_engine.services import Services
from llm_engine.statuses import EndpointState, ReplicaState
from llm_engine.store.sql import Store


def fake_endpoint(name: str, **changes: Any) -> EndpointSettings:
    return EndpointSettings(**{"name": name, "model": "none", "engine": "fake", **changes})


class GatewayThread:
    """`with GatewayThread(endpoints) as gateway:` then `gateway.url`, `gateway.client()`."""

    def __init__(
        self,
        endpoints: list[EndpointSettings],
        *,
        replicas: int = 1,
        sections: dict[str, Any] | None = None,
        **gateway: Any,
    ) -> None:
        """`sections`: of the settings besides `gateway`, which the keywords are."""
        self._endpoints = endpoints
        self._replicas = replicas
        self._folder = Path(tempfile.mkdtemp(prefix="le-gateway-"))
        self.settings = parse(
            {"gateway": gateway, "cluster": {"state_dir": str(self._folder)}} | (sections or {}), {}
        )
        self.engines: dict[str, list[EngineProcess]] = {}
        self.services: Services | None = None
        self.app: Gateway | None = None
        self.url = ""
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._stop: asyncio.Event | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self._telling = asyncio.Lock()
        self._clients = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(60), "the gateway did not start"
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(self, *_: object) -> None:
        assert self.loop is not None and self._stop is not None
        self._clients.close()
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(**{"base_url": self.url, "timeout": 20, "trust_env": False, **options})

    def openai(self, key: str, **options: Any) -> OpenAI:
        """Closed with the gateway at the latest: what garbage collection finds open is told of
        whichever test is then running."""
        defaults = {"base_url": f"{self.url}/v1", "api_key": key, "max_retries": 0}
        return self._clients.enter_context(OpenAI(**{**defaults, **options}))

    def load(self, endpoint: str, replica: int = 0) -> Load:
        """What an engine says of itself, asked on its private port."""
        assert self.loop is not None
        engine = self.engines[endpoint][replica]
        return asyncio.run_coroutine_threadsafe(engine.load(), self.loop).result(10)

    async def refresh(self) -> None:
        """What the controller does after a change of the store."""
        assert self.services is not None
        async with self._telling:  # an older one must not be told after a newer one
            directory = await asyncio.to_thread(self.services.store.directory)
            self.services.update(None, directory)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        server = uvicorn.Server(uvicorn.Config("", lifespan="off", log_level="warning"))
        try:
            store = Store.open(self.settings.store_url)
            self.services = Services(self.settings, Balancer(), store, nudge=self.refresh)
            self.services.update(await self._start_engines(), store.directory())
            self.app = build_app(self.services)
            server = uvicorn.Server(
                uvicorn.Config(self.app, port=0, lifespan="on", log_level="warning")
            )
            server.install_signal_handlers = lambda: None
            serving = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            self.url = f"http://127.0.0.1:{port}"
            self._ready.set()
            await self._stop.wait()
            server.should_exit = True
            await serving
        except BaseException as error:
            self._failure = error
        finally:
            if self.services is not None:
                self.services.pool.close()
                self.services.store.close()
                shutil.rmtree(self._folder)
            for engines in self.engines.values():
                await asyncio.gather(*(engine.stop() for engine in engines))
            self._ready.set()

    async def _start_engines(self) -> RoutingTable:
        table = RoutingTable(version=1)
        for endpoint in self._endpoints:
            source = AdapterSource.of(self.settings)
            engines = [EngineProcess(endpoint, adapters=source) for _ in range(self._replicas)]
            self.engines[endpoint.name] = engines
            addresses = await asyncio.gather(*(engine.start() for engine in engines))
            table.replicas[endpoint.name] = tuple(
                ReplicaReport(
                    endpoint.name, f"{endpoint.name}-{i}", "1", ReplicaState.READY,
                    address.host, address.port, address.secret,
                    weights=endpoint.model, max_adapters=endpoint.adapter_slots,
                )
                for i, address in enumerate(addresses)
            )  # fmt: skip
            table.endpoints[endpoint.name] = EndpointStatus(
                endpoint.name, endpoint.model, endpoint.task, EndpointState.READY,
                max_queue=endpoint.max_queue, max_model_len=8192, created=1,
                generation=generation(endpoint), max_adapters=endpoint.adapter_slots,
                max_adapter_rank=endpoint.max_adapter_rank, fallback=endpoint.fallback,
            )  # fmt: skip
        return table
