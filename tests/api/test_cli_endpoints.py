"""`llm-engine endpoints` and `keys` against a real gateway over HTTP, with a store and no
controller: the test tells the store what has become of an endpoint, as the controller would."""

import json
import threading
from dataclasses import asdict, replace

import pytest
import yaml

from llm_engine.cli import watch
from llm_engine.config import EndpointSettings
from llm_engine.endpoints import generation
from llm_engine.records import EndpointStatus, Phases
from llm_engine.statuses import EndpointState
from tests.support.cli import run, write_configuration
from tests.support.cluster import eventually
from tests.support.gateway import GatewayThread

KEY = "bootstrap"
START = Phases(queued=0.2, scheduling=2.0)
STARTED = Phases(queued=0.2, scheduling=2.0, loading=9.0, warming=0.8)


@pytest.fixture(scope="module")
def shared():
    with GatewayThread([], api_keys=[KEY]) as running:
        yield running


@pytest.fixture
def gateway(shared, tmp_path, monkeypatch):
    """A gateway without endpoints, that the command line finds by itself."""
    monkeypatch.chdir(tmp_path)
    write_configuration(tmp_path)
    monkeypatch.setenv("LLM_ENGINE_URL", shared.url)
    monkeypatch.setenv("LLM_ENGINE_API_KEY", KEY)
    monkeypatch.setattr(watch, "PERIOD_S", 0.02)
    yield shared
    for record in shared.services.store.endpoints.all():
        gone(shared, record.name)


def push(gateway, endpoints: dict[str, EndpointStatus]) -> None:
    """What the controller tells the ingress replicas."""
    done = threading.Event()
    table = gateway.services.balancer.table
    told = replace(table, version=table.version + 1, endpoints=endpoints)

    def update() -> None:
        gateway.services.update(told, None)
        done.set()

    gateway.loop.call_soon_threadsafe(update)
    assert done.wait(5)


def tell(gateway, name, state, reason=None, phases=STARTED, **live) -> None:
    """What a look of the controller writes, and then tells."""
    state = EndpointState(state)
    store = gateway.services.store.endpoints
    settled = state in (EndpointState.READY, EndpointState.UPDATE_FAILED)
    record = store.observe(store.get(name), state, reason, settled, asdict(phases))
    assert record is not None
    status = EndpointStatus(
        name, record.spec["model"], record.spec["task"], state, reason, phases=phases,
        generation=generation(EndpointSettings.model_validate(record.spec)),
        **{"replicas_wanted": 1, "replicas_ready": int(state == "READY"), **live},
    )  # fmt: skip
    push(gateway, gateway.services.balancer.table.endpoints | {name: status})


def gone(gateway, name) -> None:
    store = gateway.services.store.endpoints
    store.remove(store.get(name))
    others = dict(gateway.services.balancer.table.endpoints)
    others.pop(name, None)
    push(gateway, others)


def created(gateway, name="qwen", *words) -> None:
    assert run("endpoints", "create", name, "-m", "Qwen/Qwen3-0.6B", *words).exit_code == 0
    tell(gateway, name, "READY")


def spec(gateway, name="qwen") -> dict:
    return gateway.services.store.endpoints.get(name).spec


def waiting(gateway, name, script) -> threading.Thread:
    """Runs `script` once the endpoint waits for the controller."""

    def act() -> None:
        def settled() -> bool:
            records = gateway.services.store.endpoints.all()
            return all(r.settled for r in records if r.name == name) or not records

        eventually(lambda: not settled(), 10, 0.01)
        script()

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


# Create.


def test_create_returns_at_once_and_says_how_to_follow(gateway):
    result = run(
        "endpoints", "create", "qwen", "--model", "Qwen/Qwen3-0.6B", "--max-replicas", "3",
        "--min-replicas", "0", "--target-queue-depth", "4", "--max-queue", "9", "--num-gpus",
        "0.5", "--num-cpus", "2", "--fallback", "other", "--private", "--vllm-arg",
        "max_model_len=4096", "--vllm-arg", "--enforce-eager=true", "--env", "A=b=c",
        "--url", gateway.url,
    )  # fmt: skip
    assert result.exit_code == 0
    assert f"llm-engine endpoints watch qwen --url {gateway.url}" in result.stdout
    told = spec(gateway)
    assert told["vllm_args"] == {"max_model_len": 4096, "enforce_eager": True}
    assert told["env"] == {"A": "b=c"} and told["public"] is False
    assert (told["autoscaling"]["min_replicas"], told["autoscaling"]["max_replicas"]) == (0, 3)
    assert (told["max_queue"], told["num_gpus"], told["num_cpus"]) == (9, 0.5, 2)
    assert told["autoscaling"]["target_queue_depth"] == 4 and told["fallback"] == "other"


def test_create_from_a_file_or_a_pipe(gateway, tmp_path):
    entry = {"name": "vectors", "model": "builtin:embed", "task": "embed"}
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(entry))
    told = run("endpoints", "create", "--file", "e.yaml", "--json")
    assert json.loads(told.stdout)["task"] == "embed"
    piped = yaml.safe_dump(entry)
    assert run("endpoints", "create", "other", "-f", "-", given=piped).exit_code == 0
    assert spec(gateway, "other")["task"] == "embed"


def test_create_that_is_watched_ends_when_it_is_ready(gateway):
    def start() -> None:
        tell(gateway, "qwen", "UPDATE_IN_PROGRESS", "a replica is loading the model", START)
        asked = gateway.services.store.endpoints
        eventually(lambda: asked.get("qwen").revision, 15)
        threading.Event().wait(0.3)  # the watch has seen it by then
        tell(gateway, "qwen", "READY")

    thread = waiting(gateway, "qwen", start)
    result = run("endpoints", "create", "qwen", "-m", "m", "--watch")
    thread.join(5)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "qwen is waiting (0/0 replicas)",
        "qwen is starting: a replica is loading the model "
        "(0/1 replicas; queued 0.2 s, scheduling 2.0 s)",
        "qwen is ready after 12 s: 1/1 replicas",
    ]


def test_create_that_is_watched_and_fails_gives_the_reason(gateway):
    def fail() -> None:
        tell(gateway, "qwen", "UPDATE_FAILED", "needs 4 GPUs, the cluster has 2", START)

    waiting(gateway, "qwen", fail)
    result = run("endpoints", "create", "qwen", "-m", "m", "--watch")
    assert result.exit_code == 1
    assert "'qwen' failed: needs 4 GPUs, the cluster has 2" in result.stderr


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["qwen", "-m", "builtin:nope"], "no built-in model 'nope'"),
        (["qwen", "-m", "m", "--task", "sing"], "Invalid 'task'"),
        (["qwen", "-m", "m", "--min-replicas", "2"], "max_replicas (1) is below min_replicas (2)"),
        (["a b", "-m", "m"], "Invalid 'name'"),
        (["qwen", "-m", "m", "--vllm-arg", "port=1"], "'port' is set by llm-engine"),
    ],
)
def test_what_the_gateway_refuses_is_a_sentence(gateway, words, sentence):
    result = run("endpoints", "create", *words)
    assert result.exit_code == 1 and sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_name_that_is_taken_is_a_sentence(gateway):
    created(gateway)
    result = run("endpoints", "create", "qwen", "-m", "m")
    assert result.exit_code == 1 and "exists already" in result.stderr


# List and get.


def test_list_shows_state_replicas_owner_and_reason(gateway):
    assert "has no endpoint" in run("endpoints", "list").stdout
    created(gateway)
    assert run("endpoints", "create", "team/slow:1", "-m", "m").exit_code == 0
    reason = "waiting for resources: needs 4 GPUs, the cluster has 2"
    tell(gateway, "team/slow:1", "UPDATE_IN_PROGRESS", reason, START)
    lines = {line.split()[0]: line.split() for line in run("endpoints", "list").stdout.splitlines()
             if line.strip()}  # fmt: skip
    assert lines["qwen"] == ["qwen", "Qwen/Qwen3-0.6B", "READY", "1/1", "llm-engine"]
    assert lines["team/slow:1"] == [
        "team/slow:1", "m", "UPDATE_IN_PROGRESS", "0/1", "llm-engine", *reason.split()
    ]  # fmt: skip
    told = json.loads(run("endpoints", "list", "--json").stdout)
    assert {row["id"] for row in told} == {"qwen", "team/slow:1"}


def test_get_shows_all_of_one(gateway, monkeypatch):
    load = {"running": 3, "waiting": 1, "kv_cache_usage": 0.25}
    replica = {"endpoint": "qwen", "replica": "r1", "state": "READY", "host": "10.0.0.7",
               "load": load, "reason": None}  # fmt: skip

    async def describe():
        return [replica, replica | {"endpoint": "another", "replica": "r2"}]

    monkeypatch.setattr(gateway.services, "describe_replicas", describe)
    created(gateway, "qwen", "--vllm-arg", "max_model_len=77", "--env", "TOKEN=sekret")
    tell(gateway, "qwen", "UPDATE_FAILED", "no memory", last_error="it ran out of memory",
         max_model_len=77)  # fmt: skip
    text = run("endpoints", "get", "qwen").stdout
    for part in (
        "UPDATE_FAILED", "no memory", "it ran out of memory", "0 ready of 1 wanted",
        "queued 0.2 s, scheduling 2.0 s, loading weights 9.0 s, warming 0.8 s",
        "3 running, 1 waiting", "77 tokens", "llm-engine (from the API)", "max_model_len: 77",
        "10.0.0.7", "25%", "created", "UPDATE_PENDING",
    ):  # fmt: skip
        assert part in text, part
    assert "sekret" not in text and "r2" not in text
    told = json.loads(run("endpoints", "get", "qwen", "--json").stdout)
    assert told["spec"]["vllm_args"] == {"max_model_len": 77}
    assert told["events"][-1]["message"] == "no memory"


def test_get_says_when_a_start_is_expected_to_end(gateway):
    assert run("endpoints", "create", "a/b@1", "-m", "m").exit_code == 0
    tell(gateway, "a/b@1", "UPDATE_IN_PROGRESS", "a replica is being placed", START, eta_s=21)
    assert "ready in about 21 s" in run("endpoints", "get", "a/b@1").stdout


def test_get_shows_the_last_events_of_many(gateway):
    created(gateway)
    for n in range(130):
        tell(gateway, "qwen", "READY", f"reason {n}")
    told = json.loads(run("endpoints", "get", "qwen", "--json").stdout)
    assert [event["message"] for event in told["events"]] == [
        f"reason {n}" for n in range(120, 130)
    ]


def test_what_is_not_there_is_a_sentence(gateway):
    for words in (["get", "no"], ["update", "no", "-m", "m"], ["scale", "no", "1"],
                  ["delete", "no", "--yes"], ["watch", "no"]):  # fmt: skip
        result = run("endpoints", *words)
        assert result.exit_code == 1 and "There is no endpoint 'no'." in result.stderr


# Update and scale.


def test_update_sends_only_what_is_given(gateway):
    created(gateway, "qwen", "--max-queue", "9", "--vllm-arg", "seed=1", "--vllm-arg", "a=2",
            "--fallback", "f")  # fmt: skip
    before = spec(gateway)
    result = run("endpoints", "update", "qwen", "--vllm-arg", "seed=null", "--vllm-arg", "b=3",
                 "--fallback", "")  # fmt: skip
    assert result.exit_code == 0 and "llm-engine endpoints watch qwen" in result.stdout
    assert spec(gateway) == before | {"vllm_args": {"a": 2, "b": 3}, "fallback": None}


def test_update_that_needs_no_start_says_so(gateway):
    created(gateway)
    result = run("endpoints", "update", "qwen", "--private")
    assert result.exit_code == 0 and "nothing had to start anew" in result.stdout
    assert spec(gateway)["public"] is False


def test_update_that_is_watched_does_not_take_the_old_version_for_the_new_one(gateway):
    created(gateway)

    def start() -> None:  # until here the gateway still shows READY
        threading.Event().wait(0.2)
        tell(gateway, "qwen", "UPDATE_IN_PROGRESS", "a replica is being placed", START)
        threading.Event().wait(0.2)
        tell(gateway, "qwen", "READY")

    thread = waiting(gateway, "qwen", start)
    result = run("endpoints", "update", "qwen", "--vllm-arg", "seed=1", "--watch")
    thread.join(5)
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and len(lines) == 3
    assert lines[0] == "qwen is waiting (1/1 replicas)"  # not the phases of the start before
    assert lines[1].startswith("qwen is starting: a replica is being placed (0/1 replicas; queued")
    assert lines[2].startswith("qwen is ready after 12 s")


def test_update_from_a_file_takes_away_what_is_null_there(gateway, tmp_path):
    created(gateway, "qwen", "--env", "A=1", "--env", "B=2")
    (tmp_path / "e.yaml").write_text("env: {A: null}\nmax_queue: null\n")
    assert run("endpoints", "update", "qwen", "--file", "e.yaml").exit_code == 0
    assert spec(gateway)["env"] == {"B": "2"} and spec(gateway)["max_queue"] == 256
    (tmp_path / "e.yaml").write_text("name: another\n")
    tell(gateway, "qwen", "READY")
    refused = run("endpoints", "update", "qwen", "--file", "e.yaml")
    assert refused.exit_code == 1 and "cannot be renamed" in refused.stderr


def test_update_while_another_is_under_way_is_refused(gateway):
    assert run("endpoints", "create", "qwen", "-m", "m").exit_code == 0
    result = run("endpoints", "update", "qwen", "--max-queue", "3")
    assert result.exit_code == 1 and "Wait until that has ended" in result.stderr


def test_scale_changes_the_number_of_replicas_only(gateway):
    created(gateway)
    before = spec(gateway)
    result = run("endpoints", "scale", "qwen", "2")
    assert "qwen is to have 2 replicas; ready now: 1/1." in result.stdout
    scaling = before["autoscaling"]
    both = {"min_replicas": 2, "max_replicas": 2}
    assert spec(gateway) == before | {"autoscaling": scaling | both}
    result = run("endpoints", "scale", "qwen", "--min", "0", "--max", "4")
    assert "0 to 4 replicas" in result.stdout
    assert run("endpoints", "scale", "qwen", "--max", "3").exit_code == 0
    bounds = {"min_replicas": 0, "max_replicas": 3}
    assert spec(gateway)["autoscaling"] == scaling | bounds
    assert gateway.services.store.endpoints.get("qwen").settled


# Delete.


def test_delete_asks_for_nothing_more_with_yes(gateway):
    created(gateway)
    assert run("endpoints", "delete", "qwen").exit_code == 1
    assert gateway.services.store.endpoints.get("qwen").state == "READY"
    result = run("endpoints", "delete", "qwen", "--yes")
    assert result.exit_code == 0 and "qwen is being deleted" in result.stdout
    assert gateway.services.store.endpoints.get("qwen").state == "DELETE_IN_PROGRESS"
    again = run("endpoints", "delete", "qwen", "--yes")
    assert again.exit_code == 1 and "is being deleted" in again.stderr


def test_delete_that_is_watched_ends_when_it_is_gone(gateway):
    created(gateway)

    def stop() -> None:
        threading.Event().wait(0.1)
        tell(gateway, "qwen", "DELETE_IN_PROGRESS", "replicas finish what they have")
        threading.Event().wait(0.2)
        gone(gateway, "qwen")

    thread = waiting(gateway, "qwen", stop)
    result = run("endpoints", "delete", "qwen", "--yes", "--watch")
    thread.join(5)
    assert result.exit_code == 0 and result.stdout.splitlines()[-1] == "qwen is gone."
    assert "replicas finish what they have" in result.stdout


# Keys.


def test_a_new_key_is_stdouts_last_line_and_works(gateway):
    result = run("keys", "create", "--owner", "alice", "--name", "laptop", "--scope", "endpoints",
                 "--scope", "inference", "--expires", "30d")  # fmt: skip
    key = result.stdout.splitlines()[-1]
    assert result.exit_code == 0 and key.startswith("sk-le-")
    assert result.stdout.count(key) == 1 and key not in result.stderr
    assert "shown only now" in result.stderr
    told = run("endpoints", "create", "hers", "-m", "m", "--json", "--api-key", key)
    assert json.loads(told.stdout)["owned_by"] == "alice"
    refused = run("keys", "list", "--api-key", key)
    assert refused.exit_code == 1 and "lacks the scope 'admin'" in refused.stderr
    assert f"from --api-key and begins with {key[:10]}.)" in refused.stderr
    assert key not in refused.stderr


def test_quiet_prints_nothing_but_the_key(gateway):
    result = run("keys", "create", "--owner", "alice", "--quiet")
    assert result.stdout.startswith("sk-le-") and len(result.stdout.split()) == 1
    assert result.stderr == ""


def test_keys_are_listed_with_their_state_and_never_themselves(gateway):
    made = json.loads(run("keys", "create", "--owner", "bob", "--json").stdout)
    dated = json.loads(run("keys", "create", "--owner", "bob", "--expires", "12h", "--json").stdout)
    shown = run("keys", "revoke", made["id"])
    assert shown.exit_code == 0 and f"{made['id']} ({made['prefix']}…, of bob) is revoked." in (
        shown.stdout
    )
    text = run("keys", "list").stdout
    [line] = [line for line in text.splitlines() if made["id"] in line]
    assert line.split()[-1] == "revoked" and "never" in line and made["prefix"] in line
    [line] = [line for line in text.splitlines() if dated["id"] in line]
    assert line.split()[-1] == "active" and "never" not in line
    assert made["key"] not in text and dated["key"] not in text
    states = {row["id"]: row["state"] for row in json.loads(run("keys", "list", "--json").stdout)}
    assert (states[made["id"]], states[dated["id"]]) == ("revoked", "active")


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["create", "--owner", "a b"], "Invalid 'owner'"),
        (["create", "--owner", "a", "--scope", "everything"], "Invalid 'scopes[0]'"),
        (["create", "--owner", "a", "--expires", "2020-01-01"], "it lies in the past"),
        (["revoke", "key_none"], "There is no key 'key_none'."),
        (["revoke", "../endpoints/qwen"], "Invalid URL"),
    ],
)
def test_what_is_wrong_with_a_key_is_a_sentence(gateway, words, sentence):
    result = run("keys", *words)
    assert result.exit_code == 1 and sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_revoked_key_is_refused_at_once_though_the_controller_is_away(gateway, monkeypatch):
    made = json.loads(run("keys", "create", "--owner", "bob", "--json").stdout)

    async def nobody_listens() -> None: ...

    monkeypatch.setattr(gateway.services, "nudge", nobody_listens)
    assert run("endpoints", "list", "--api-key", made["key"]).exit_code == 0
    assert run("keys", "revoke", made["id"]).exit_code == 0
    assert "has been revoked" in run("endpoints", "list", "--api-key", made["key"]).stderr


def test_a_revoked_key_is_traced_to_where_it_came_from(gateway, monkeypatch):
    made = json.loads(run("keys", "create", "--owner", "bob", "--json").stdout)
    run("keys", "revoke", made["id"])
    monkeypatch.setenv("LLM_ENGINE_API_KEY", made["key"])
    told = run("endpoints", "list").stderr
    assert "This API key has been revoked." in told and "from LLM_ENGINE_API_KEY and" in told
    monkeypatch.delenv("LLM_ENGINE_API_KEY")
    assert "No key was sent" in run("endpoints", "list").stderr
