"""The questions of a decision: their shape, how they are put to a model, and what its probabilities
mean. No I/O."""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from llm_engine.api.openai.problems import MAX_SHOWN
from llm_engine.api.openai.requests import read
from llm_engine.errors import InvalidRequest

Values = dict[str, Any]

MOST_QUESTIONS = 64
MOST_OPTIONS = 26
_MOST_NAME = 256  # characters of a question's name
_FIELDS = frozenset(("model", "state", "questions", "images"))
_QUESTION_FIELDS = frozenset(("type", "instructions", "criteria"))
_LETTERS = string.ascii_uppercase


@dataclass(frozen=True, slots=True)
class Question:
    """`options`: what each is called, and its description. `labels`: what the model may call them;
    the first that suit its tokenizer are taken."""

    name: str
    type: str  # choice | score | noul
    instructions: str
    options: list[tuple[str, str]]
    labels: list[list[str]]
    legend: Values

    @property
    def shown(self) -> str:
        return _short(self.name)

    def prompt(self, state: str, labels: Sequence[str]) -> str:
        """The state comes first: it is the same for all questions."""
        lines = [state, "", f"Question: {self.instructions or self.name}", "Options:"]
        for label, (option, description) in zip(labels, self.options, strict=True):
            said = ": ".join(filter(None, (option, description)))
            lines.append(label if said == label else f"{label}. {said}")
        return "\n".join([*lines, f"Answer with one of {', '.join(labels)} and nothing else."])

    def answer(self, probabilities: list[float], mass: float) -> Values:
        """`confidence`: how likely the model says just this, of all that it could say."""
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        confidence = probabilities[best] * mass
        match self.type:
            case "choice":
                names = [name for name, _ in self.options]
                return {
                    "type": "choice",
                    "choice": names[best],
                    "confidence": confidence,
                    "probabilities": dict(zip(names, probabilities, strict=True)),
                }
            case "score":
                return {
                    "type": "score",
                    "score": sum(level * p for level, p in enumerate(probabilities)),
                    "confidence": confidence,
                    "legend": self.legend,
                    "probabilities": {str(level): p for level, p in enumerate(probabilities)},
                }
        return {"type": "noul", "noul": probabilities[0]}


@dataclass(frozen=True, slots=True)
class Asked:
    model: str
    state: str
    questions: list[Question]


def parse(body: bytes) -> Asked:
    """Raises InvalidRequest for the first thing that is wrong."""
    data = read(body)
    _known(data, _FIELDS, "")
    model = _required(data, "model", "")
    if not isinstance(model, str) or not 0 < len(model) <= _MOST_NAME:
        raise _invalid("model", f"it must be a text of 1 to {_MOST_NAME} characters")
    state = _required(data, "state", "")
    asked = _required(data, "questions", "")
    if not isinstance(asked, dict):
        raise _invalid("questions", "it must be an object: a question by each name", "invalid_type")
    if not 0 < len(asked) <= MOST_QUESTIONS:
        raise _invalid(
            "questions", f"there must be 1 to {MOST_QUESTIONS}, and there are {len(asked)}"
        )
    images = data.get("images")
    if images is not None and images != []:
        raise InvalidRequest(
            "Unsupported parameter: 'images' is not supported here. Decisions are made about text "
            "and JSON.",
            param="images",
            code="unsupported_parameter",
        )
    questions = [_question(name, each) for name, each in asked.items()]
    return Asked(model, _text(state), questions)


def _question(name: str, asked: Any) -> Question:
    where = f"questions.{_short(name)}"
    if not 0 < len(name) <= _MOST_NAME:
        raise _invalid("questions", f"a question's name must have 1 to {_MOST_NAME} characters")
    if not isinstance(asked, dict):
        raise _invalid(where, "it must be an object", "invalid_type")
    _known(asked, _QUESTION_FIELDS, f"{where}.")
    kind = _required(asked, "type", f"{where}.")
    given = asked.get("instructions")
    instructions = "" if given is None else _text(given)
    criteria, where = asked.get("criteria"), f"{where}.criteria"
    legend: Values = {}
    match kind:
        case "choice":
            options, labels = _choices(criteria, where), [list(_LETTERS)]
        case "score":
            options, labels = _levels(criteria, where), [list(string.digits), list(_LETTERS)]
            legend = {str(level): each for level, each in enumerate(criteria)}
        case "noul":
            options, labels = _truth(criteria, where), [["yes", "no"], list(_LETTERS)]
        case _:
            param = where.removesuffix("criteria") + "type"
            raise _invalid(param, "it must be 'choice', 'score' or 'noul'")
    count = len(options)
    fitting = [each[:count] for each in labels if len(each) >= count]
    return Question(name, kind, instructions, options, fitting, legend)


def _choices(criteria: Any, where: str) -> list[tuple[str, str]]:
    if not isinstance(criteria, dict):
        raise _invalid(where, "it must be an object: a description, or null, by each option's name",
                       "invalid_type")  # fmt: skip
    _check_count(criteria, 1, where)
    if "" in criteria:
        raise _invalid(where, "an option's name must not be empty")
    return [(name, "" if each is None else _text(each)) for name, each in criteria.items()]


def _levels(criteria: Any, where: str) -> list[tuple[str, str]]:
    if not isinstance(criteria, list):
        raise _invalid(where, "it must be a list of levels, the lowest first", "invalid_type")
    _check_count(criteria, 2, where)
    return [(_text(level), "") for n, level in enumerate(criteria)]


def _truth(criteria: Any, where: str) -> list[tuple[str, str]]:
    if criteria is None:
        criteria = {}
    if not isinstance(criteria, dict):
        raise _invalid(
            where, "it must be an object with 'true' and 'false', or null", "invalid_type"
        )
    _known(criteria, frozenset(("true", "false")), f"{where}.")
    told = [criteria.get(side) for side in ("true", "false")]
    texts = ["" if each is None else _text(each) for each in told]
    return list(zip(("yes", "no"), texts, strict=True))


def _check_count(criteria: dict[str, Any] | list[Any], least: int, where: str) -> None:
    if not least <= len(criteria) <= MOST_OPTIONS:
        raise _invalid(
            where, f"there must be {least} to {MOST_OPTIONS}, and there are {len(criteria)}"
        )


def _text(value: Any) -> str:
    """Anything as a model reads it."""
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def _known(given: Values, fields: frozenset[str], where: str) -> None:
    for name in given:
        if name not in fields:
            raise InvalidRequest(
                f"Unknown parameter: '{where}{_short(name)}'. There are "
                f"{', '.join(sorted(fields))}.",
                param=where + _short(name),
                code="unknown_parameter",
            )


def _required(given: Values, name: str, where: str) -> Any:
    if name not in given:
        raise InvalidRequest(
            f"Missing required parameter: '{where}{name}'.",
            param=where + name,
            code="missing_required_parameter",
        )
    return given[name]


def _short(name: str) -> str:
    return name if len(name) <= MAX_SHOWN else name[:MAX_SHOWN] + "..."


def _invalid(param: str, why: str, code: str = "invalid_value") -> InvalidRequest:
    return InvalidRequest(f"Invalid '{param}': {why}.", param=param, code=code)
