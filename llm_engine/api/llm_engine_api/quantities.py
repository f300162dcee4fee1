"""Kubernetes quantities: 500m, 1.5, 24Gi."""

import re
from decimal import Decimal, DecimalException
from typing import Any

from llm_engine.errors import InvalidRequest

_DECIMAL = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY = {"Ki": 1, "Mi": 2, "Gi": 3, "Ti": 4, "Pi": 5, "Ei": 6}
_FORM = re.compile(
    r"(-?)([0-9]{1,18}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})(e[+-]?[0-9]{1,2}|[A-Za-z]{0,2})"
)


def parse(field: str, value: Any) -> Decimal:
    """The number that is meant. Raises InvalidRequest, also for what is not above 0."""
    try:
        number = _number(value)
    except (KeyError, TypeError, DecimalException):
        raise InvalidRequest(
            f"Invalid '{field}': it is incorrectly formatted. Expected a Kubernetes quantity such "
            "as 4, '500m' or '24Gi'.",
            param=field,
        ) from None
    if number <= 0:
        raise InvalidRequest(f"Invalid '{field}': it must be positive.", param=field)
    return number


def _number(value: Any) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError(value)
    found = _FORM.fullmatch(str(value))
    if found is None:
        raise KeyError(value)
    sign, digits, unit = found.groups()
    if unit.startswith("e"):
        return Decimal(sign + digits + unit)
    if unit in _BINARY:
        return Decimal(sign + digits) * 1024 ** _BINARY[unit]
    return Decimal(sign + digits).scaleb(_DECIMAL[unit])
