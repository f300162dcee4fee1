"""What tests share: a scrubbed environment, a gateway over fake engines, a real cluster."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, free_port
from tests.support.gateway import GatewayThread, fake_endpoint

SCRUBBED = ("LLM_ENGINE_", "RAY_", "VLLM_", "OPENAI_", "OMP_NUM_THREADS", "COLUMNS")
for name in [name for name in os.environ if name.startswith(SCRUBBED)]:
    del os.environ[name]


@pytest.fixture(scope="session")
def gateway() -> Iterator[GatewayThread]:
    """A gateway on a real socket in front of fake engine processes: starts in a second."""
    with GatewayThread([fake_endpoint("fake"), fake_endpoint("vectors", task="embed")]) as running:
        yield running


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The whole system as `llm-engine up` starts it: Ray, Serve, HAProxy, three vLLM engines."""
    # Ray's sockets do not fit under pytest's own long folder names.
    folder = Path(tmp_path_factory.getbasetemp())
    settings = {
        "gateway": {"port": free_port(), "api_keys": [Cluster.KEY], "min_replicas": 2,
                    "allowed_upstreams": ["127.0.0.1"]},
        "endpoints": [
            {"name": "demo-chat", "model": "builtin:chat",
             "autoscaling": {"min_replicas": 2, "max_replicas": 2}},
            {"name": "demo-embed", "model": "builtin:embed", "task": "embed"},
        ],
        "cluster": {"state_dir": str(folder / "up"), "ray_port": 0, "num_cpus": 4,
                    "dashboard_port": free_port()},
    }  # fmt: skip
    with Cluster(settings) as running:
        yield running
