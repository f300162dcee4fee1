"""serve.yaml and cluster.yaml are what Ray takes."""

from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import fillout_defaults, prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from deployments.app import APP_NAME
from jobs.launcher import job_settings
from llm_engine import config
from llm_engine.config import EndpointSettings
from llm_engine.errors import ConfigError
from llm_engine.serve_config import serve_config

ROOT = Path(__file__).parents[2]


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text())


def test_every_section_of_a_configuration_goes_along():
    told = {
        "store": {"max_models": 7}, "storage": {"link_expires_s": 77}, "files": {"max_files": 7},
        "batches": {"max_rows": 7}, "fine_tunes": {"max_rows": 7},
        "responses": {"max_chain": 7},
    }  # fmt: skip
    apart = {"gateway", "endpoints", "cluster"}  # the last one is `up`'s alone
    assert told.keys() == config.Settings.model_fields.keys() - apart, "a new section"
    arguments = serve_config(config.parse(told, {}))["applications"][0]["args"]
    assert {name: arguments.get(name) for name in told} == told


def test_who_goes_from_up_to_a_cluster_finds_everything_where_it_was(tmp_path):
    settings = config.parse({"cluster": {"state_dir": str(tmp_path)}}, {})
    arguments = serve_config(settings)["applications"][0]["args"]
    there = config.parse({name: arguments[name] for name in ("store", "storage")}, {})
    assert there.store_url == settings.store_url and there.storage_url == settings.storage_url


SECRET = "hunter2"


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://ann:{SECRET}@db/x",
        f"postgresql://ann:pa/{SECRET}@db/x",
        f"postgresql://ann:p@{SECRET}@db/x",
        f"postgresql://db/x?user=ann&password={SECRET}",
        f"postgresql://db/x?password={SECRET}&user=ann",
    ],
)
def test_a_password_is_in_nothing_that_people_see(url):
    settings = config.parse({"store": {"url": url}}, {})
    for told in (serve_config(settings), job_settings(settings), config.dump(settings)):
        assert SECRET not in str(told)
    assert "url" not in job_settings(settings)["store"]  # it is in the environment
    with pytest.raises(ConfigError, match="masked"):
        config.parse({"store": config.dump(settings)["store"]}, {})


def test_serve_yaml_is_what_the_command_line_prints_for_an_open_default():
    printed = serve_config(config.parse({"gateway": {"host": "0.0.0.0"}}, {}))
    written = read("serve.yaml")
    ServeDeploySchema.model_validate(written)
    assert written["applications"][0]["name"] == APP_NAME
    assert endpoints(written) == endpoints(printed)
    for each in (written, printed):
        del each["applications"][0]["deployments"]
    assert written == printed


def endpoints(written: dict) -> list[EndpointSettings]:
    [controller] = written["applications"][0]["deployments"]
    return [EndpointSettings.model_validate(e) for e in controller["user_config"]["endpoints"]]


def test_cluster_yaml_is_a_valid_launcher_file():
    written = read("cluster.yaml")
    validate_config(fillout_defaults(written))
    prepared = prepare_config(written)
    assert prepared["available_node_types"]["gpu_worker"]["resources"]["GPU"] > 0
    assert prepared["head_node_type"] == "head"


def test_cluster_yaml_starts_what_it_promises():
    written = read("cluster.yaml")
    start = " ".join(written["head_start_ray_commands"])
    assert "serve deploy serve.yaml" in start
    assert "deployments.ray_settings" in start and "--dashboard-host=127.0.0.1" in start
