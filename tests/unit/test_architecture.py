"""The shape of the code: who imports whom, how long files are, what the README says of the tree."""

import ast
import importlib.metadata
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("llm_engine", "deployments", "jobs")
SOURCES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
LONGEST_FILE = 450


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def importers(module: str, inside: str = "") -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if str(path.relative_to(ROOT)).startswith(inside)
        and any(name == module or name.startswith(module + ".") for name in imports(path))
    }


def test_only_the_gateway_knows_of_routes_and_dialects():
    around = {
        path for path in importers("llm_engine.api") if not path.startswith("llm_engine/api/")
    }
    # Scale's batches may lie under a path, and only its dialect can read them there.
    assert around == {"deployments/ingress.py", "llm_engine/batches/by_path.py"}


@pytest.mark.parametrize("outer", ["ray", "deployments", "jobs"])
def test_the_platform_imports_nothing_further_out(outer):
    assert importers(outer, "llm_engine") == set()


def test_jobs_and_deployments_point_inwards():
    assert importers("deployments", "jobs") == set()


def test_heavy_packages_are_imported_in_one_place():
    engine = {f"llm_engine/engine/{name}.py" for name in ("vllm", "vllm_plugin", "vllm_cpu")}
    assert importers("vllm") <= engine
    engine.add("llm_engine/engine/merged.py")
    for package in ("torch", "transformers"):
        outside = {p for p in importers(package) if not p.startswith("llm_engine/demo/")}
        outside = {p for p in outside if not p.startswith("llm_engine/fine_tunes/trainer")}
        assert outside <= engine


def test_the_core_knows_no_http_and_no_engine():
    inner = {
        f"llm_engine/{n}.py" for n in ("errors", "statuses", "records", "routing", "endpoints")
    }
    for outer in ("llm_engine.api", "llm_engine.engine", "fastapi", "httpx"):
        assert not importers(outer) & inner


def test_dialects_do_not_know_each_other():
    for folder in (p for p in (ROOT / "llm_engine/api").iterdir() if p.is_dir()):
        for other in (p for p in folder.parent.iterdir() if p.is_dir() and p != folder):
            if other.name in ("openai", "responses"):
                continue  # the engines' own language, which every dialect translates; no dialect
            module = f"llm_engine.api.{other.name}"
            assert importers(module, f"llm_engine/api/{folder.name}/") == set()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_and_say_what_they_are(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST_FILE
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), "no docstring at the top"


def test_the_readmes_tree_is_what_is_on_disk():
    readme = (ROOT / "README.md").read_text()
    tree = re.search(r"```\n(README\.md .*?)```", readme, re.S).group(1)
    folders: list[str] = []
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        assert (ROOT / "/".join([*folders, name])).exists(), f"the README names {name}"
        folders.append(name.rstrip("/"))
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    top = {path.split("/")[0] for path in tracked} - {".gitignore", ".ci"}
    assert not [name for name in top if name not in tree]
    modules = {Path(p).name for p in tracked if re.match(r"(llm_engine|deployments)/\w+\.py$", p)}
    assert not [name for name in modules - {"__init__.py", "__main__.py"} if name not in tree]


def test_the_three_packages_are_ours_alone():
    owners = importlib.metadata.packages_distributions()
    for package in PACKAGES:
        assert set(owners[package]) == {"llm-engine"}, f"another wheel also ships {package}/"


def test_nothing_of_one_machine_is_in_the_tree():
    machine = ["/work", "/root", "/opt"]
    pattern = "|".join(f"{folder}/" for folder in machine)
    found = subprocess.run(
        ["git", "grep", "-nE", f'(^|[ "=(])({pattern})', "--", ".", ":!*.json"],
        cwd=ROOT, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert found == ""
