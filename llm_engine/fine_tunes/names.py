"""What the model that comes of a fine-tune is called, in each dialect. Pure."""

import re
import time

#: Scale's names are Kubernetes labels, and those end here.
LONGEST_SCALE_NAME = 62
_STRANGE = re.compile(r"[^-A-Za-z0-9_.]")
#: Of the job's id, so many digits make the name the only one of its kind.
_ID_DIGITS = 8


def openai_name(base: str, owner: str, suffix: str | None, job_id: str) -> str:
    """`ft:BASE:OWNER:SUFFIX:ID`; without a suffix its colon stays.

    BASE is the endpoint's name as it is, and may hold `/` and `:` itself: never split a name.
    """
    parts = ("ft", base, _plain(owner), _plain(suffix or ""), job_id[-_ID_DIGITS:])
    return ":".join(parts)


def checkpoint_name(name: str, step: int) -> str:
    return f"{name}:ckpt-step-{step}"


def scale_name(base: str, suffix: str | None, now: float) -> str:
    """`BASE.SUFFIX.YYMMDD-HHMMSS` in UTC, in the letters of a Kubernetes label.

    Where it would be too long, BASE is cut: what makes the name the only one of its kind stays.
    """
    stamp = time.strftime("%y%m%d-%H%M%S", time.gmtime(now))
    rest = "".join(f".{_plain(part)}" for part in (suffix, stamp) if part)
    front = _plain(base).lstrip("-_.")[: LONGEST_SCALE_NAME - len(rest)].rstrip("-_.")
    return f"{front}{rest}".lstrip("-_.")


def _plain(text: str) -> str:
    return _STRANGE.sub("-", text)
