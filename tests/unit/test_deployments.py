"""Decisions of the deployments that need no cluster to be looked at."""

import asyncio
import contextlib
import socket
from dataclasses import replace

import pytest

from deployments.app import settings_from
from deployments.engine import MOST_MISSED, EngineReplica, build_endpoint
from deployments.local import check_port, gateway_client
from deployments.router import ModelRouter
from deployments.tended import Retry, application_name, lacks
from llm_engine.addresses import cannot_listen, local_url
from llm_engine.config import EndpointSettings, parse
from llm_engine.errors import ConfigError, EngineError, StartupError
from llm_engine.records import Directory, Load, ReplicaReport
from llm_engine.statuses import ReplicaState


def endpoint(**changes) -> EndpointSettings:
    return EndpointSettings(**{"name": "m", "model": "org/m", **changes})


def test_tensor_parallel_replicas_reserve_one_bundle_on_one_node():
    settings = endpoint(vllm_args={"tensor_parallel_size": 4})
    [made] = deployments(build_endpoint(settings, "1", "g", cluster_has_gpus=True, replicas=1))
    assert made["placement_group_bundles"] == [{"CPU": 0.5, "GPU": 4}]
    assert made["placement_group_strategy"] == "STRICT_PACK"
    assert made["ray_actor_options"]["num_gpus"] == 4
    [made] = deployments(build_endpoint(settings, "1", "g", cluster_has_gpus=False, replicas=1))
    assert made["placement_group_bundles"] == [{"CPU": 2.0}]


def deployments(application) -> list[dict]:
    options = application._bound_deployment
    config = options._replica_config
    return [
        {
            "placement_group_bundles": config.placement_group_bundles,
            "placement_group_strategy": config.placement_group_strategy,
            "ray_actor_options": config.ray_actor_options,
        }
    ]


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([{"CPU": 8}], "needs 4 GPUs, the cluster has 0"),
        ([{"CPU": 8, "GPU": 2}], "needs 4 GPUs, the cluster has 2"),
        ([{"CPU": 8, "GPU": 2}] * 2, "needs 4 GPUs on one node, the largest has 2"),
        ([{"CPU": 8, "GPU": 4}], None),
    ],
)
def test_what_a_replica_cannot_get_is_said(nodes, said):
    assert lacks(endpoint(num_gpus=4), nodes) == said


def test_application_names_tell_whose_they_are_and_never_clash():
    names = {application_name("g", name) for name in ("a/b", "a:b", "a-b", "a.b")}
    assert len(names) == 4 and all(name.startswith("g.") for name in names)
    assert application_name("g", "a") != application_name("h", "a")


def test_failed_starts_are_tried_again_after_longer_and_longer(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("deployments.tended.time.monotonic", lambda: now[0])
    retry = Retry()
    tried = []
    for second in range(0, 4000, 10):
        now[0] = float(second)
        if retry.due():
            tried.append(second)
    assert tried[:4] == [30, 90, 210, 450]
    assert tried[-1] - tried[-2] == 600


def test_config_and_sections_are_not_mixed(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("gateway: {port: 9000}")
    assert settings_from({"config": str(file)}).gateway.port == 9000
    assert settings_from({"gateway": {"port": 9001}}).gateway.port == 9001
    with pytest.raises(ConfigError, match="'gateway'"):
        settings_from({"config": str(file), "gateway": {}})


class Bare(EngineReplica.func_or_class):
    """A replica without an engine, which ends no engine."""

    def __init__(self) -> None: ...
    def __del__(self) -> None: ...


async def test_a_replica_that_drains_is_not_called_ready_by_a_look_that_began_before():
    """Its engine is asked how busy it is every half second; nobody must choose it afterwards."""
    replica = Bare()
    asked, answer = asyncio.Event(), asyncio.Event()

    class Slow:
        async def load(self) -> Load:
            asked.set()
            await answer.wait()
            return Load(running=3)

    replica._engine = Slow()
    replica._report = ReplicaReport("m", "r", "1", ReplicaState.READY, "127.0.0.1", 1, "s")
    look = asyncio.create_task(replica._observe())
    await asked.wait()
    replica._report = replace(replica._report, state=ReplicaState.DRAINING)
    answer.set()
    await look
    assert replica._report.state is ReplicaState.DRAINING and replica._report.load.running == 3


@pytest.mark.parametrize(
    ("alive", "probes", "asked"),
    [
        (True, [EngineError("busy"), 2, EngineError("busy"), 1, 0, 0, 0], 7),
        (True, [0, 0, EngineError("busy"), 0, 0, 0], 6),
        (True, [1] + [EngineError("hung")] * 20, 1 + MOST_MISSED),
        (False, [EngineError("killed")], 1),
    ],
)
async def test_a_drain_waits_for_an_engine_that_lives_and_is_too_busy_to_tell_its_load(
    monkeypatch, alive, probes, asked
):
    left = list(probes)

    class Engine:
        async def load(self) -> Load:
            told = left.pop(0)
            if isinstance(told, EngineError):
                raise told
            return Load(running=told)

    async def at_once(seconds: float) -> None: ...

    async def told(*args: object) -> None: ...

    monkeypatch.setattr("deployments.engine.asyncio.sleep", at_once)
    replica = Bare()
    replica._settings = endpoint()
    replica._engine = Engine()
    replica._engine.alive = alive
    replica._report = ReplicaReport("m", "r", "1", ReplicaState.READY)
    replica._call_router = told
    await replica._drain()
    assert len(probes) - len(left) == asked


async def test_a_router_that_has_restarted_says_that_it_knows_no_keys_and_models():
    router = ModelRouter.func_or_class()
    try:
        assert await router.set_endpoints([]) == ([], False, False)
        await router.set_directory(Directory(1))
        assert await router.set_endpoints([]) == ([], False, True)
    finally:
        router._housekeeping.cancel()


def test_a_gateway_on_ipv6_is_found_and_its_port_is_looked_at():
    with socket.socket(socket.AF_INET6) as taken:
        with contextlib.suppress(OSError):  # where there is no IPv6 the port cannot be had either
            taken.bind(("::1", 0))
            taken.listen()
        port = taken.getsockname()[1] or 8000
        assert cannot_listen("::1", port)
        with pytest.raises(StartupError, match=r"gateway\.port"):
            check_port("::1", port, "gateway.port")
        with gateway_client(parse({"gateway": {"host": "::1", "port": port}}, {})) as client:
            assert str(client.base_url) == f"http://[::1]:{port}"
    assert local_url("0.0.0.0", 8000) == local_url("::", 8000) == "http://127.0.0.1:8000"
