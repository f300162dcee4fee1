"""Whatever is killed, and whenever: no row is lost, none is doubled, few are generated again."""

import pytest

from tests.jobs.soak import soak

pytestmark = [pytest.mark.slow, pytest.mark.alone]

KILLS = 32


@pytest.mark.slow
def test_no_row_is_lost_or_doubled_by_kills_at_random_moments():
    cost = soak(KILLS, seed=4, timeout_s=250)
    assert cost["kill"] + cost["freeze"] >= KILLS and cost["jobs"] > KILLS
    assert cost["a death costs"] <= 0.01, cost
