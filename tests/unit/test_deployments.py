"""Decisions of the deployments that need no cluster to be looked at."""

import pytest

from deployments.app import settings_from
from deployments.engine import build_endpoint
from deployments.tended import Retry, application_name, lacks
from llm_engine.config import EndpointSettings
from llm_engine.errors import ConfigError


def endpoint(**changes) -> EndpointSettings:
    return EndpointSettings(**{"name": "m", "model": "org/m", **changes})


def test_tensor_parallel_replicas_reserve_one_bundle_on_one_node():
    settings = endpoint(vllm_args={"tensor_parallel_size": 4})
    [made] = deployments(build_endpoint(settings, "1", "g", cluster_has_gpus=True, replicas=1))
    assert made["placement_group_bundles"] == [{"CPU": 0.5, "GPU": 4}]
    assert made["placement_group_strategy"] == "STRICT_PACK"
    assert made["ray_actor_options"]["num_gpus"] == 4
    [made] = deployments(build_endpoint(settings, "1", "g", cluster_has_gpus=False, replicas=1))
    assert made["placement_group_bundles"] == [{"CPU": 2.0}]


def deployments(application) -> list[dict]:
    options = application._bound_deployment
    config = options._replica_config
    return [
        {
            "placement_group_bundles": config.placement_group_bundles,
            "placement_group_strategy": config.placement_group_strategy,
            "ray_actor_options": config.ray_actor_options,
        }
    ]


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([{"CPU": 8}], "needs 4 GPUs, the cluster has 0"),
        ([{"CPU": 8, "GPU": 2}], "needs 4 GPUs, the cluster has 2"),
        ([{"CPU": 8, "GPU": 2}] * 2, "needs 4 GPUs on one node, the largest has 2"),
        ([{"CPU": 8, "GPU": 4}], None),
    ],
)
def test_what_a_replica_cannot_get_is_said(nodes, said):
    assert lacks(endpoint(num_gpus=4), nodes) == said


def test_application_names_tell_whose_they_are_and_never_clash():
    names = {application_name("g", name) for name in ("a/b", "a:b", "a-b", "a.b")}
    assert len(names) == 4 and all(name.startswith("g.") for name in names)
    assert application_name("g", "a") != application_name("h", "a")


def test_failed_starts_are_tried_again_after_longer_and_longer(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("deployments.tended.time.monotonic", lambda: now[0])
    retry = Retry()
    tried = []
    for second in range(0, 4000, 10):
        now[0] = float(second)
        if retry.due():
            tried.append(second)
    assert tried[:4] == [30, 90, 210, 450]
    assert tried[-1] - tried[-2] == 600


def test_config_and_sections_are_not_mixed(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("gateway: {port: 9000}")
    assert settings_from({"config": str(file)}).gateway.port == 9000
    assert settings_from({"gateway": {"port": 9001}}).gateway.port == 9001
    with pytest.raises(ConfigError, match="'gateway'"):
        settings_from({"config": str(file), "gateway": {}})
