"""What the controller does with a cluster and a store that are not as they were: no Ray runs."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    DeploymentStatusTrigger,
)

from deployments import controller as module
from deployments import router as router_module
from deployments.controller import Controller
from deployments.engine import NAME
from deployments.router import ModelRouter
from llm_engine.config import EndpointSettings, parse
from llm_engine.endpoints import OPERATOR, generation
from llm_engine.errors import StoreUnavailable
from llm_engine.records import ReplicaReport
from llm_engine.statuses import EndpointState, ReplicaState
from llm_engine.store.sql import Store


class Handle:
    """Of a deployment, as Serve gives it to others."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=getattr(self._target, method))


class World:
    """A store, and what Serve and Ray would have: applications, replicas, and who was killed."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.settings = parse({"cluster": {"state_dir": str(folder)}}, {})
        self.store = Store.open(self.settings.store_url)
        self.router = ModelRouter.func_or_class()
        self.applications: dict[str, ApplicationStatusOverview] = {}
        self.deployed: list[str] = []
        self.scaled: list[tuple[str, int]] = []
        self.actors: list[dict[str, str]] = []
        self.killed: list[str] = []
        self._controllers: list[Any] = []
        context = SimpleNamespace(app_name="g")
        patch.setattr(module.serve, "get_replica_context", lambda: context)
        patch.setattr(module.serve, "status", lambda: SimpleNamespace(**vars(self)))
        patch.setattr(module.serve, "run_many", self._run)
        patch.setattr(module.replica, "prepare", lambda: None)
        patch.setattr(module.replica, "scale", self._scale)
        patch.setattr(
            module.replica, "kill", lambda some: self.killed.extend(a["name"] for a in some)
        )
        patch.setattr(module.replica.ray.util, "list_named_actors", lambda **_: self.actors)
        patch.setattr(module, "alive_nodes", lambda: [{"CPU": 8.0}])

    def start(self, *declared: EndpointSettings) -> Any:
        """A controller that knows nothing yet; it looks when it is told to."""
        made = Controller.func_or_class(self.settings, Handle(self.router))
        made._declared = list(declared)
        made._undeclared = True
        self._controllers.append(made)
        return made

    def has(self, name: str, replicas: int = 1, status: str = "RUNNING") -> None:
        """An application with so many replicas, whoever deployed it."""
        deployment = DeploymentStatusOverview(
            status=DeploymentStatus.HEALTHY,
            status_trigger=DeploymentStatusTrigger.UNSPECIFIED,
            replica_states={"RUNNING": replicas},
            message="",
        )
        self.applications[f"g.{name}"] = ApplicationStatusOverview(
            status=ApplicationStatus(status),
            message="",
            last_deployed_time_s=0,
            deployments={NAME: deployment},
        )

    def runs(self, name: str, *replicas: str) -> None:
        self.actors += [
            {"name": f"SERVE_REPLICA::g.{name}#{NAME}#{each}", "namespace": "serve"}
            for each in replicas
        ]

    def _run(self, targets: list[Any], **_: Any) -> None:
        for target in targets:
            self.deployed.append(target.name)
            self.has(target.name.removeprefix("g."))

    async def _scale(self, application: str, deployment: str, replicas: int) -> None:
        assert deployment == NAME
        self.scaled.append((application, replicas))

    async def end(self) -> None:
        tasks = [each._loop for each in self._controllers] + [self.router._housekeeping]
        for task in filter(None, tasks):
            task.cancel()
        await asyncio.gather(*filter(None, tasks), return_exceptions=True)
        for each in self._controllers:
            each._store.close()
        self.store.close()


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    made = World(tmp_path, monkeypatch)
    yield made
    await made.end()


def fake(name: str = "m", **changes: Any) -> EndpointSettings:
    return EndpointSettings(**{"name": name, "model": "none", "engine": "fake", **changes})


def report(replica: str, settings: EndpointSettings, state: str = "READY") -> ReplicaReport:
    return ReplicaReport(settings.name, replica, generation(settings), ReplicaState(state))


async def test_a_controller_that_has_just_started_kills_nobody_who_serves(world: World):
    """It dies between what a client asked for and what it does about it."""
    before, wanted = fake(), fake(max_queue=9)
    record = world.store.endpoints.create(wanted, OPERATOR, {}, 10)
    world.store.endpoints.note_deployed(record.id, generation(before))
    world.has("m")
    world.runs("m", "serves", "waits")
    world.router._began_at -= 60
    await world.router.report(report("serves", before))
    await world.start()._look()
    assert world.deployed == ["g.m"] and world.killed == []


async def test_of_what_is_deleted_only_those_are_killed_that_no_node_runs(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    settings = fake()
    record = world.store.endpoints.create(settings, OPERATOR, {}, 10)
    world.store.endpoints.note_deployed(record.id, generation(settings))
    world.store.endpoints.ask_delete("m")
    world.has("m", status="DELETING")
    world.runs("m", "drains", "waits")
    controller = world.start()
    await controller._look()
    assert world.killed == [], "nobody has said a word to this controller"
    await controller._look()
    assert world.killed == [], "nor to this router"
    await world.router.report(report("drains", settings, "DRAINING"))
    await controller._look()
    await controller._look()
    assert world.killed == [], "another one may say one yet"
    monkeypatch.setattr(router_module, "ROLL_CALL_S", -1.0)
    await controller._look()
    await controller._look()
    assert world.killed == ["SERVE_REPLICA::g.m#EngineReplica#waits"]


class Away:
    """`with Away(controller)`: its store does not answer."""

    def __init__(self, controller: Any) -> None:
        self._controller = controller
        self._store = controller._store

    def __enter__(self) -> None:
        def silent(*_: object) -> None:
            raise StoreUnavailable("away")

        database = SimpleNamespace(migrate=silent)
        self._controller._store = SimpleNamespace(
            database=database, mark=silent, directory_mark=silent
        )

    def __exit__(self, *_: object) -> None:
        self._controller._store = self._store


async def test_what_the_store_wants_is_deployed_over_what_was_declared_while_it_was_away(
    world: World,
):
    """A declared endpoint was changed at run time, and the whole cluster lost."""
    declared, changed = fake(), fake(max_queue=9)
    world.store.endpoints.declare([declared])
    record = world.store.endpoints.get("m")
    world.store.endpoints.observe(record, EndpointState.READY, None, True, None)
    world.store.endpoints.ask_change("m", lambda _: (changed, {}))
    world.store.endpoints.note_deployed(record.id, generation(changed))
    controller = world.start(declared)
    with Away(controller):
        for _ in range(3):
            await controller._look()
    assert world.deployed == ["g.m"]
    await controller._look()
    assert world.deployed == ["g.m", "g.m"]
    assert world.store.endpoints.get("m").deployed == generation(changed)
    await controller._look()
    assert len(world.deployed) == 2


async def test_what_was_declared_while_the_store_was_away_is_not_deployed_again(world: World):
    controller = world.start(fake())
    with Away(controller):
        for _ in range(3):
            await controller._look()
            assert controller._tended["m"].observe(world.applications["g.m"], [], None).deployed
    for _ in range(3):
        await controller._look()
    assert world.deployed == ["g.m"]
    assert world.store.endpoints.get("m").deployed == generation(fake())


async def test_a_controller_that_starts_without_the_store_leaves_alone_what_runs(world: World):
    """One endpoint was made by a client, and a declared one was changed at run time."""
    declared = fake()
    changed = fake(public=False, fallback="made", autoscaling={"max_replicas": 5})
    world.store.endpoints.declare([declared])
    world.store.endpoints.create(fake("made", autoscaling={"max_replicas": 5}), "ann", {}, 10)
    for name in ("m", "made"):
        record = world.store.endpoints.get(name)
        world.store.endpoints.observe(record, EndpointState.READY, None, True, None)
        world.store.endpoints.note_deployed(record.id, generation(fake(name)))
        world.has(name, replicas=3)
    world.store.endpoints.ask_change("m", lambda _: (changed, {}))
    await world.start(declared)._look()
    told = dict(world.router._endpoints)
    assert told.keys() == {"m", "made"}
    second = world.start(declared, fake("new"))
    with Away(second):
        for _ in range(3):
            await second._look()
    assert world.router._endpoints.keys() == {"m", "made", "new"}, "clients are told 404"
    assert {name: world.router._endpoints[name] for name in told} == told
    assert world.deployed == ["g.new"] and world.scaled == []
    await second._look()
    assert world.scaled == [], "it is no longer known how many there were"
    assert world.deployed == ["g.new"]
    assert world.router._endpoints["m"].fallback == "made"


async def test_a_store_that_goes_away_while_it_is_first_read_is_one_that_has_not_answered(
    world: World,
):
    world.has("m", replicas=3)
    controller = world.start(fake())
    store = controller._store
    with Away(controller):
        controller._store.database.migrate = store.database.migrate
        controller._undeclared = False
        await controller._look()
        assert controller._identity is not None and list(controller._tended) == ["m"]
    assert world.deployed == [] and world.scaled == []


async def test_one_that_sleeps_wakes_though_the_store_is_away(world: World):
    scaling = {"min_replicas": 0, "max_replicas": 3}
    world.has("m", replicas=0)
    controller = world.start(fake(autoscaling=scaling))
    with Away(controller):
        await controller._look()
        assert world.scaled == []
        await controller.wake("m", "ingress", 1)
        await controller._look()
        await controller._look()
    assert world.scaled == [("g.m", 1)]


async def test_what_has_never_answered_does_not_fall_asleep(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    """Its weights are missing. And then they are there."""
    now = [1000.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], time=time.time)
    monkeypatch.setattr("deployments.tended.time", clock)
    monkeypatch.setattr("llm_engine.scaling.Scaler.__init__.__defaults__", (lambda: now[0],))
    settings = fake(autoscaling={"min_replicas": 0, "idle_delay_s": 5})
    record = world.store.endpoints.create(settings, OPERATOR, {}, 10)
    controller = world.start()

    async def look(seconds: int) -> tuple[EndpointState, str | None]:
        for _ in range(seconds):
            now[0] += 1
            await controller._look()
        found = world.store.endpoints.get("m")
        return found.state, found.reason

    await look(2)
    world.has("m", status="DEPLOY_FAILED")
    await world.router.report(replace(report("r", settings, "FAILED"), reason="there is no folder"))
    assert await look(3) == (EndpointState.UPDATE_FAILED, "there is no folder")
    assert await look(20) == (EndpointState.UPDATE_FAILED, "there is no folder")
    assert world.scaled == [], "an earlier version's last replica would go"
    world.has("m")
    await world.router.report(report("r", settings))
    assert (await look(3))[0] is EndpointState.READY
    await look(20)
    assert world.scaled == [("g.m", 0)]
    assert record.id == world.store.endpoints.get("m").id
