"""Hosts and ports: what can be listened on, and where whoever listens there is found."""

import socket

_EVERYWHERE = ("0.0.0.0", "::")


def cannot_listen(host: str, port: int) -> str | None:
    """Why not; None: it can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        return error.strerror or str(error)
    return None


def local_url(host: str, port: int) -> str:
    """For this machine's own clients of a server that listens there."""
    host = "127.0.0.1" if host in _EVERYWHERE else host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
