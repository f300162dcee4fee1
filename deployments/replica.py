"""What every deployment does first in its replica's process."""

import asyncio
import contextlib
import ipaddress
import logging
from collections.abc import Callable, Container, Iterable

import ray
import ray.serve._private.replica as serve_replica
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.context import _get_global_client

from llm_engine.config import Settings


def prepare() -> None:
    """Call it at the start of a deployment's constructor."""
    share_log_handlers()
    if ipaddress.ip_address(ray.util.get_node_ip_address()).is_loopback:
        keep_grpc_on_loopback()


def share_log_handlers() -> None:
    """What llm_engine logs goes where Serve writes the replica's own log."""
    source, target = logging.getLogger("ray.serve"), logging.getLogger("llm_engine")
    target.handlers = source.handlers
    target.setLevel(logging.INFO)
    target.propagate = False


def keep_grpc_on_loopback() -> None:
    """Serve opens a gRPC port per replica on every interface, with no setting for it.

    Private, so: it is here only, and tests/serve/test_cluster.py looks at the sockets. The port
    opens after the constructor has run.
    """
    original = serve_replica.add_port_to_grpc_server

    def on_loopback(server: object, address: str) -> int:
        return original(server, address.replace("[::]", "127.0.0.1"))

    serve_replica.add_port_to_grpc_server = on_loopback


def when_stopping(callback: Callable[[], None]) -> None:
    """Once, on this event loop, as soon as Serve begins to drain this replica.

    Serve calls nobody before the drain is over, and by then whoever holds a lease may have been
    killed. Private, so: it is here only, and a test of tests/serve replaces the gateways while
    they work on something.
    """
    original = serve_replica.Replica._perform_graceful_shutdown
    loop = asyncio.get_running_loop()

    async def told(self: serve_replica.Replica) -> None:
        loop.call_soon_threadsafe(callback)
        await original(self)

    serve_replica.Replica._perform_graceful_shutdown = told


async def scale(application: str, deployment: str, replicas: int) -> None:
    """Change the number of replicas without restarting any. Raises what Serve raises.

    Serve's public way is a route of the dashboard, whose address and token a replica isn't told;
    this is the call behind it. Private, so: it is here only, and the scaling tests of tests/serve
    fail without it.
    """
    client = _get_global_client()
    wanted = DeploymentID(name=deployment, app_name=application)
    await client._controller.update_deployment_replicas.remote(wanted, replicas)


def unplaced(application: str, placed: Container[str] | None) -> list[dict[str, str]]:
    """The application's replicas that no node runs yet; `placed` have said a word. None where it
    is not known who has: whoever serves or drains must not be killed.

    Serve asks those, too, to shut down gracefully, and waits for the answer as long as a running
    replica may take to drain: end them with `kill`. Private, so: it is here only, and a test
    deletes such an endpoint.
    """
    found: list[dict[str, str]] = []
    if placed is None:
        return found
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if ReplicaID.is_full_id_str(actor["name"]):
            replica = ReplicaID.from_full_id_str(actor["name"])
            if replica.deployment_id.app_name == application and replica.unique_id not in placed:
                found.append(actor)
    return found


def kill(actors: Iterable[dict[str, str]]) -> None:
    for actor in actors:
        with contextlib.suppress(ValueError):  # gone in the meantime
            ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))


def check_exposure(settings: Settings) -> None:
    """Refuse to serve without keys where others can connect. Raises ConfigError.

    `serve deploy` names the HTTP host in a place of its own; what counts is where Serve listens.
    Private, so: it is here only. Serve's public status does not tell the HTTP options.
    """
    client = _get_global_client()
    host = client.http_config.host if client is not None else None
    actual = settings.gateway.model_copy(update={"host": host or "0.0.0.0"})
    settings.model_copy(update={"gateway": actual}).check_exposure()
    if client is not None and (host, client.http_config.port) != (
        settings.gateway.host,
        settings.gateway.port,
    ):
        logging.getLogger("ray.serve").warning(
            "Ray Serve listens on %s:%s, not where gateway.host and gateway.port say: another "
            "command started it",
            host,
            client.http_config.port,
        )
