"""Which of HAProxy's ports are narrowed to loopback."""

from deployments.haproxy import lean, narrow

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


def test_nobody_is_told_of_each_request_and_the_gateway_alone_watches_for_clients():
    written = "global\n    log 127.0.0.1:514 local0 info\ndefaults\n    log global\n    mode http\n"
    made = lean(written + WRITTEN.format(frontend="127.0.0.1:8000"))
    assert "log" not in made.replace("http_frontend", "")
    assert "set-header x-request-disconnect-disabled ?1" in made
    assert lean(made) == made
