"""Statistics of a measurement: percentiles, medians over rounds, ratios of paired rounds. Pure."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile; `share` is 0..1."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    rank = max(1, -(-len(ordered) * share // 1))  # rounded up
    return ordered[int(rank) - 1]


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over several rounds."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Round by round, then the median: what slowed a whole round is in both halves of a pair."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def differences(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    return spread([a - b for a, b in zip(ours, theirs, strict=True)])


def alternate(targets: Sequence[T], round_number: int) -> list[T]:
    """The targets in an order that gives each every place equally often: A B, B A, A B..."""
    if len(targets) == 2:
        return list(targets) if round_number % 2 == 0 else list(reversed(targets))
    turn = round_number % len(targets)
    return [*targets[turn:], *targets[:turn]]
