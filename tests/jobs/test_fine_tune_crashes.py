"""Whatever is killed, and whenever: a fine-tune ends as if nothing had happened."""

import pytest

from tests.jobs.fine_tune_soak import soak

pytestmark = [pytest.mark.slow, pytest.mark.alone]

KILLS = 24


@pytest.mark.slow
def test_nothing_is_lost_or_doubled_by_kills_at_random_moments():
    cost = soak(KILLS, seed=4, timeout_s=240)
    assert cost["kill job"] + cost["kill trainer"] >= KILLS
