"""`doctor` on the screen."""

import json
from collections.abc import Callable
from dataclasses import asdict

from llm_engine.cli import console, doctor
from llm_engine.config import Settings


def show(load: Callable[[], Settings], *, as_json: bool) -> int:
    """The exit code: 1 if anything will not work."""
    with console.console(stderr=True).status("Looking at this installation and this machine"):
        findings = doctor.examine(load)
    code = int(any(finding.failed for finding in findings))
    if as_json:
        print(json.dumps({"ok": not code, "checks": [asdict(each) for each in findings]}, indent=2))
        return code
    table = console.table(["", "check", "found"])
    for finding in findings:
        found = finding.detail + (f"\n→ {finding.remedy}" if finding.remedy else "")
        table.add_row(console.coloured(finding.verdict), finding.check, found)
    console.console().print(table)
    failed = sum(finding.failed for finding in findings)
    warned = sum(finding.warned for finding in findings)
    if failed:
        console.say(f"{failed} to repair, {warned} to know.", "red")
    elif warned:
        console.say(f"Nothing to repair, {warned} to know.", "yellow")
    else:
        console.say("All is well.", "green")
    return code
