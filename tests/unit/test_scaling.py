"""How many replicas an endpoint should have."""

import pytest

from llm_engine.config import AutoscalingSettings
from llm_engine.scaling import Demand, Scaler

IDLE = Demand()


class World:
    """A scaler in a time of its own: a step is a second."""

    def __init__(self, start: int = 1, **settings: float) -> None:
        told = {"min_replicas": 1, "max_replicas": 4, "target_queue_depth": 8}
        told |= {"upscale_delay_s": 5, "downscale_delay_s": 20, "idle_delay_s": 60}
        self.settings = AutoscalingSettings(**told | settings)
        self.now = 1000.0
        self.scaler = Scaler(start, clock=lambda: self.now)

    def after(self, seconds: int, depth: int = 0, **demand: int) -> int:
        for _ in range(seconds):
            self.now += 1
            self.scaler.decide(self.settings, Demand(depth, **demand), proving=False)
        return self.scaler.target


@pytest.mark.parametrize(
    ("depth", "replicas"), [(0, 1), (8, 1), (9, 2), (17, 3), (32, 4), (1000, 4)]
)
def test_replicas_follow_the_engines_queues(depth, replicas):
    assert World().after(30, depth) == replicas


def test_a_twitch_changes_nothing():
    world = World()
    assert world.after(4, depth=30) == 1
    assert world.after(1, depth=0) == 1
    assert world.after(4, depth=30) == 1, "the delay begins anew"


def test_shrinking_waits_longer_and_keeps_what_the_peak_asked_for():
    world = World(start=4)
    assert world.after(19, depth=0) == 4
    assert world.after(1, depth=20) == 4
    assert world.after(2, depth=0) == 3, "20 requests in the meantime ask for three"


def test_other_bounds_take_effect_at_once():
    world = World(start=1)
    world.settings = AutoscalingSettings(min_replicas=3, max_replicas=5)
    assert world.after(1) == 3
    world.settings = AutoscalingSettings(min_replicas=1, max_replicas=2)
    assert world.after(1) == 2


def test_the_last_replica_goes_after_a_while_without_any_request():
    world = World(min_replicas=0)
    assert world.after(59) == 1
    assert world.after(1) == 0
    assert world.after(1000) == 0


def test_requests_between_two_looks_keep_it_awake():
    world = World(min_replicas=0)
    for _ in range(10):
        assert world.after(50) == 1
        assert world.after(1, active=1) == 1


def test_a_held_request_wakes_it_at_once_and_many_wake_as_many_as_they_need():
    assert World(start=0, min_replicas=0).after(1, held=1) == 1
    world = World(start=0, min_replicas=0, upscale_delay_s=0)
    assert world.after(1, held=20) == 3


def test_a_version_that_has_not_answered_yet_has_a_replica_to_answer_with():
    world = World(start=0, min_replicas=0)
    assert world.scaler.decide(world.settings, IDLE, proving=True) == 1
    world.now += 1000
    assert world.scaler.decide(world.settings, IDLE, proving=True) == 1
