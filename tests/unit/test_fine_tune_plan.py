"""Hyperparameters: what is refused, and what "auto" becomes."""

import math

import pytest

from llm_engine.errors import InvalidRequest
from llm_engine.fine_tunes.plan import (
    METHODS,
    auto_batch_size,
    auto_epochs,
    auto_learning_rate,
    check_hyperparameters,
    resolve,
)


def planned(method="supervised", asked=None, **facts):
    given = {
        "examples": 500, "validation_examples": 0, "tokens_per_epoch": 30_000,
        "hidden_size": 192, "longest": 2048, "seed": 7,
    }  # fmt: skip
    return resolve(method, check_hyperparameters(method, asked), **(given | facts))


# -- what is asked


@pytest.mark.parametrize("asked", [None, {}, {"n_epochs": None}])
def test_nothing_asked_is_nothing(asked):
    assert check_hyperparameters("supervised", asked) == {}


def test_numbers_come_as_numbers_strings_or_auto():
    asked = {"n_epochs": "3", "batch_size": 4.0, "learning_rate": "2e-4", "packing": "true",
             "learning_rate_multiplier": "auto", "lr_scheduler": "linear",
             "target_modules": ["q_proj", "v_proj"]}  # fmt: skip
    checked = check_hyperparameters("supervised", asked)
    assert checked == {"n_epochs": 3, "batch_size": 4, "learning_rate": 2e-4, "packing": True,
                       "learning_rate_multiplier": "auto", "lr_scheduler": "linear",
                       "target_modules": ["q_proj", "v_proj"]}  # fmt: skip
    assert isinstance(checked["n_epochs"], int) and isinstance(checked["batch_size"], int)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_epochs", 0), ("n_epochs", 51), ("n_epochs", 2.5), ("n_epochs", "many"),
        ("n_epochs", True), ("n_epochs", [3]), ("n_epochs", ""), ("n_epochs", "1_0"),
        ("batch_size", 0), ("batch_size", 257), ("batch_size", -1),
        ("learning_rate_multiplier", 0), ("learning_rate_multiplier", -1),
        ("learning_rate_multiplier", math.inf), ("learning_rate_multiplier", math.nan),
        ("learning_rate_multiplier", "nan"), ("learning_rate", 1.5), ("learning_rate", 0),
        ("warmup_ratio", 1), ("weight_decay", -0.1), ("lr_scheduler", "sawtooth"),
        ("lr_scheduler", 3), ("lora_rank", 0), ("lora_rank", 1024), ("lora_alpha", 0),
        ("lora_dropout", 1), ("target_modules", []), ("target_modules", ["../x"]),
        ("target_modules", 5), ("max_length", 4), ("packing", 1), ("validation_split", 0.9),
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["hyperparameters", "method.supervised.hyperparameters"])
def test_what_is_out_of_range_is_refused_by_its_name(name, value, where):
    with pytest.raises(InvalidRequest) as raised:
        check_hyperparameters("supervised", {name: value}, where)
    assert raised.value.param == f"{where}.{name}"
    assert name in raised.value.message


def test_unknown_names_are_refused_and_beta_is_dpos():
    with pytest.raises(InvalidRequest, match="epoch"):
        check_hyperparameters("supervised", {"epoch": 3})
    with pytest.raises(InvalidRequest, match="beta"):
        check_hyperparameters("supervised", {"beta": 0.1})
    assert check_hyperparameters("dpo", {"beta": "0.2"}) == {"beta": 0.2}
    for beta in (0, 2.1):
        with pytest.raises(InvalidRequest):
            check_hyperparameters("dpo", {"beta": beta})


def test_unknown_methods_are_refused():
    with pytest.raises(InvalidRequest) as raised:
        check_hyperparameters("reinforcement", {})
    assert raised.value.param == "method"


# -- what "auto" becomes


@pytest.mark.parametrize("method", METHODS)
def test_the_rate_suits_small_and_large_models(method):
    small, large = (auto_learning_rate(method, size) for size in (192, 4096))
    scale = 0.1 if method == "dpo" else 1
    assert small == pytest.approx(3.12e-3 * scale, rel=0.01)
    assert large == pytest.approx(2.86e-4 * scale, rel=0.01)


def test_the_batch_grows_with_the_data_within_bounds():
    assert [auto_batch_size(n) for n in (1, 10, 127, 128, 500, 1000, 3000, 100_000)] == [
        1, 1, 1, 1, 2, 4, 16, 32,
    ]  # fmt: skip


def test_little_data_is_seen_more_often_and_much_data_less():
    assert auto_epochs(10, 1) == 10  # 100 steps
    assert auto_epochs(1, 1) == 25
    assert auto_epochs(500, 2) == 3
    assert auto_epochs(10_000, 32) == 2
    assert auto_epochs(100_000, 32) == 1


def test_a_plan_has_every_number():
    plan = planned()
    assert (plan.n_epochs, plan.batch_size, plan.total_steps) == (3, 2, 750)
    assert plan.learning_rate == pytest.approx(auto_learning_rate("supervised", 192))
    assert (plan.learning_rate_multiplier, plan.lora_rank, plan.max_length) == (1.0, 16, 2048)
    assert not plan.packing and plan.beta is None and plan.seed == 7
    assert planned("dpo").beta == 0.1
    assert not any(value == "auto" for value in plan.plain().values())


def test_what_is_asked_is_taken():
    asked = {"n_epochs": 2, "batch_size": 7, "learning_rate_multiplier": 0.5, "max_length": 64}
    plan = planned(asked=asked)
    assert (plan.n_epochs, plan.batch_size, plan.max_length) == (2, 7, 64)
    assert plan.learning_rate == pytest.approx(auto_learning_rate("supervised", 192) / 2)
    assert plan.total_steps == 2 * math.ceil(500 / 7)
    assert planned(asked={"learning_rate": 1e-4}).learning_rate == 1e-4


def test_a_step_is_shared_evenly_by_the_workers():
    assert planned(asked={"batch_size": 7}, workers=4).batch_size == 8
    assert planned(workers=3).batch_size == 3


def test_packing_is_for_many_short_examples_on_gpus():
    many = {"examples": 10_000, "tokens_per_epoch": 600_000}
    assert planned(bf16=True, **many).packing
    assert not planned(bf16=False, **many).packing
    assert not planned(bf16=True).packing
    assert not planned("dpo", {"packing": True}, bf16=True, **many).packing
    assert planned(asked={"packing": True}).packing
