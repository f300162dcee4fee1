"""Hyperparameters of this API, and what they are called everywhere else. What they may be is said
where a fine-tune is planned."""

from typing import Any

from llm_engine.api.llm_engine_api.vllm_options import refuse
from llm_engine.errors import InvalidRequest

Values = dict[str, Any]
WHERE = "hyperparameters"
PEFT = "peft_config"

#: As this API's pages have them.
DEFAULTS: Values = {
    "n_epochs": 5,
    "learning_rate": 2e-3,
    "lr_scheduler": "cosine",
    "warmup_ratio": 0.03,
    "weight_decay": 0.001,
}
#: Where no validation file is given: so much of the training data is not trained on.
SPLIT = "validation_split"
SPLIT_SHARE = 0.1
_NAMES = {"epochs": "n_epochs", "lr": "learning_rate", "lr_scheduler_type": "lr_scheduler"}
_LORA = {
    "r": "lora_rank",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "target_modules",
}
#: Fields of PEFT's LoraConfig that may say what is so anyway.
_SAID = {
    "bias": ("none",),
    "init_lora_weights": (True,),
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
}
_NOTHING = (None, False, "", [], {})


class Hyperparameters:
    """`asked` by our names, and how to tell what is wrong with them by this API's."""

    def __init__(self, values: Values) -> None:
        """Raises InvalidRequest."""
        self._theirs: dict[str, str] = {}
        given: Values = {}
        for name, value in values.items():
            if name == PEFT:
                given |= self._lora(value)
            elif name == "report_to":
                _check_report(value)
            elif value is not None:
                ours = _NAMES.get(name, name)
                self._name(ours, name)
                given[ours] = value
        multiplied = given.get("learning_rate_multiplier") is not None
        self.asked = {
            name: value
            for name, value in DEFAULTS.items()
            if not (multiplied and name == "learning_rate")
        } | given

    def in_their_words(self, error: InvalidRequest) -> InvalidRequest:
        theirs = self._theirs.get((error.param or "").removeprefix(f"{WHERE}."))
        if theirs is not None:
            param = f"{WHERE}.{theirs}"
            error.message = error.message.replace(f"'{error.param}'", f"'{param}'")
            error.param = param
        return error

    def _lora(self, config: Any) -> Values:
        if config is None:
            return {}
        if not isinstance(config, dict):
            raise refuse(f"{WHERE}.{PEFT}", "expected an object, as PEFT's LoraConfig has it.")
        given: Values = {}
        for name, value in config.items():
            where = f"{PEFT}.{name}"
            if name in _LORA and value is not None:
                self._name(_LORA[name], where)
                given[_LORA[name]] = value
            elif value not in _NOTHING and value not in _SAID.get(name, ()):
                raise refuse(f"{WHERE}.{where}", "it cannot be honoured here.")
        return given

    def _name(self, ours: str, theirs: str) -> None:
        if ours in self._theirs:
            other = self._theirs[ours]
            raise refuse(f"{WHERE}.{theirs}", f"it means the same as '{other}'; set only one.")
        self._theirs[ours] = theirs


def _check_report(value: Any) -> None:
    wanted = value if isinstance(value, list) else [value]
    if any(each not in (None, "none", "") for each in wanted):
        raise refuse(
            f"{WHERE}.report_to",
            "nothing is sent elsewhere; the events of the fine-tune and its result file have "
            "every number.",
        )
