"""Which of HAProxy's ports are narrowed to loopback."""

from deployments.haproxy import narrow

WRITTEN = """\
frontend prometheus
    bind :9101
    mode http
frontend http_frontend
    bind {frontend}
    mode http
listen stats
  bind *:8404
  stats enable
"""


def test_only_the_operators_ports_are_narrowed():
    assert narrow(WRITTEN.format(frontend="*:8000")).count("127.0.0.1:") == 2
    assert "bind *:8000" in narrow(WRITTEN.format(frontend="*:8000"))


def test_nothing_changes_the_second_time():
    once = narrow(WRITTEN.format(frontend="127.0.0.1:8000"))
    assert narrow(once) == once
