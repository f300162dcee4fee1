"""`llm-engine doctor`: is this installation sound, and can this machine run this configuration?

Every check looks for one trap that has cost somebody hours, and says how to get out of it. Imports
neither Ray, vLLM nor torch: what is installed is read from metadata (doctor_install), and torch is
asked in a process of its own. The machine's side is in doctor_host.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum

from llm_engine.config import Settings
from llm_engine.errors import ConfigError


class Verdict(StrEnum):
    OK = "ok"
    #: It works, but slower or other than one may think.
    WARN = "warn"
    #: It will not work.
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    verdict: Verdict
    detail: str
    remedy: str = ""

    @property
    def failed(self) -> bool:
        return self.verdict is Verdict.FAIL

    @property
    def warned(self) -> bool:
        return self.verdict is Verdict.WARN

    def sentence(self) -> str:
        return f"{self.check}: {self.detail}." + (f" Remedy: {self.remedy}." if self.remedy else "")


#: Looks at one thing; may find several.
Check = Callable[[], Finding | Iterable[Finding]]


def ok(check: str, detail: str) -> Finding:
    return Finding(check, Verdict.OK, detail)


def warn(check: str, detail: str, remedy: str) -> Finding:
    return Finding(check, Verdict.WARN, detail, remedy)


def fail(check: str, detail: str, remedy: str) -> Finding:
    return Finding(check, Verdict.FAIL, detail, remedy)


def quick(settings: Settings) -> list[Finding]:
    """What `up` looks at first: a fraction of a second, and no other process is started."""
    from llm_engine.cli import doctor_host as host
    from llm_engine.cli import doctor_install as install

    checks: list[Check] = [
        install.check_python,
        install.check_packages,
        lambda: install.check_builtin_models(settings),
    ]
    if any(each.engine == "vllm" for each in settings.endpoints):
        checks += [install.check_vllm, install.check_torch, install.check_torch_companions]
    checks += [lambda: host.check_memory(settings), lambda: host.check_ports(settings)]
    return _collect(checks)


def examine(load: Callable[[], Settings]) -> list[Finding]:
    """Every check, in the order in which one would repair. `load` reads the configuration."""
    from llm_engine.cli import doctor_host as host
    from llm_engine.cli import doctor_install as install

    with ThreadPoolExecutor(1) as background:
        asked = background.submit(install.torch_facts)
        findings = _collect([install.check_python])
        try:
            settings = load()
            settings.check_exposure()
            names = ", ".join(each.name for each in settings.endpoints) or "none"
            findings.append(ok("configuration", f"endpoints: {names}"))
        except ConfigError as error:
            findings.append(fail("configuration", str(error), "correct it"))
            settings = Settings()
        findings += _collect([*install.checks(settings), *host.checks(settings)])
        facts = asked.result()
    last = [lambda: install.check_gpu(facts), lambda: install.check_amx(settings, facts)]
    return findings + _collect(last)


def _collect(checks: Iterable[Check]) -> list[Finding]:
    found: list[Finding] = []
    for check in checks:
        result = check()
        found += [result] if isinstance(result, Finding) else result
    return found
