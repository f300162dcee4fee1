"""One file, one object; every mistake is named with its path."""

import pytest

from llm_engine import config
from llm_engine.config import Settings
from llm_engine.errors import ConfigError


def endpoint(**changes):
    return {"name": "a", "model": "org/a"} | changes


def test_nothing_gives_the_demo_models_on_loopback():
    settings = config.parse({}, {})
    assert [e.model for e in settings.endpoints] == ["builtin:chat", "builtin:embed"]
    assert settings.gateway.is_loopback and not settings.gateway.api_keys


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"gatway": {}}, "unknown key 'gatway'; did you mean 'gateway'?"),
        ({"gateway": {"prt": 1}}, "unknown key 'gateway.prt'; did you mean 'port'?"),
        (
            {"endpoints": [endpoint(autoscaling={"min_replica": 2})]},
            "unknown key 'endpoints[0].autoscaling.min_replica'; did you mean 'min_replicas'?",
        ),
        ({"gateway": {"port": 99999}}, "gateway.port: Input should be less than or equal to 65535"),
        ({"gateway": {"port": "x"}}, "gateway.port: Input should be a valid integer"),
        ({"endpoints": [endpoint(model="builtin:x")]}, "no built-in model 'x'"),
        ({"endpoints": [endpoint(), endpoint()]}, "two endpoints are named 'a'"),
        ({"endpoints": [endpoint(name="a b")]}, "endpoints[0].name: String should match"),
        (
            {"endpoints": [endpoint(model="ft:demo-chat:me::1")]},
            "llm-engine endpoints create a --model ft:demo-chat:me::1",
        ),
        ({"endpoints": [{"model": "m"}]}, "endpoints[0].name: Field required"),
        ({"endpoints": [endpoint(vllm_args={"port": 1})]}, "'port' is set by llm-engine"),
        (
            {"endpoints": [endpoint(vllm_args={"served-model-name": "b"})]},
            "set `name` of the endpoint",
        ),
        (
            {"endpoints": [endpoint(autoscaling={"min_replicas": 3, "max_replicas": 2})]},
            "max_replicas (2) is below min_replicas (3)",
        ),
        ({"endpoints": [endpoint(num_cpus=float("inf"))]}, "should be a finite number"),
        ([], "expected a mapping at the top, got list"),
    ],
)
def test_mistakes_are_named(raw, said):
    with pytest.raises(ConfigError) as error:
        config.parse(raw, {})
    assert said in str(error.value)


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        config.parse({"gateway": {"port": 0, "hots": "x"}, "x": 1}, {})
    assert len(str(error.value).splitlines()) == 3


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        config.load(tmp_path / "none.yaml", {})
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        config.load(bad, {})


def test_what_is_printed_reads_back_as_the_same_object():
    settings = config.parse({"gateway": {"api_keys": ["sk-secret"]}}, {})
    assert config.parse(config.dump(settings, reveal=True), {}) == settings


def test_keys_are_never_shown():
    settings = config.parse({"gateway": {"api_keys": ["sk-secret"]}}, {config.ENV_KEYS: "sk-env"})
    assert len(settings.gateway.api_keys) == 2
    for text in (repr(settings), str(config.dump(settings)), settings.model_dump_json()):
        assert "sk-" not in text


def test_beyond_loopback_a_key_is_needed():
    open_to_all = config.parse({"gateway": {"host": "0.0.0.0"}}, {})
    with pytest.raises(ConfigError, match="there is no API key"):
        open_to_all.check_exposure()
    config.parse({"gateway": {"host": "0.0.0.0"}}, {config.ENV_KEYS: "sk"}).check_exposure()


def test_settings_do_not_change_after_the_start():
    with pytest.raises(ValueError, match="frozen"):
        config.parse({}, {}).gateway.port = 1


def test_every_setting_is_in_the_readme():
    from pathlib import Path

    text = (Path(__file__).parents[2] / "README.md").read_text()
    missing = []
    for section in (Settings, *_sections(Settings)):
        missing += [name for name in section.model_fields if f"`{name}`" not in text]
    assert not missing


def _sections(section):
    for field in section.model_fields.values():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, config.Section):
                yield kind
                yield from _sections(kind)
