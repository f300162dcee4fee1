"""How long an engine's steps take, and how much longer each request more makes them. Pure."""

import bisect
import time
from collections.abc import Callable

#: Decoding steps are told apart by how many requests they serve: up to 1, 2, 3, 4, 6, 8, ...
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
#: Of a size's mean, the last step's share; and no step counts as longer than so many means.
_SHARE, _MOST = 0.05, 3.0
#: A size that was not seen for so long tells nothing any more: the machine may have changed.
_OLD_S = 600.0


class StepTimes:
    """`seen` each decoding step; `line` sums them up."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._means: dict[int, tuple[float, float, float]] = {}  # size -> requests, s, seen at

    def seen(self, requests: int, seconds: float) -> None:
        if requests < 1 or seconds <= 0:
            return
        size = bisect.bisect_left(_SIZES, requests)
        now = self._clock()
        mean = self._means.get(size)
        if mean is None or now - mean[2] > _OLD_S:
            self._means[size] = (float(requests), seconds, now)
            return
        count, time_s, _ = mean
        count += _SHARE * (requests - count)
        time_s += _SHARE * (min(seconds, _MOST * time_s) - time_s)
        self._means[size] = (count, time_s, now)

    def line(self) -> tuple[float, float]:
        """Seconds of a step without any request, and seconds that each request adds.

        The straight line of least squares of the relative error; (0, 0) until steps of two
        different sizes were seen.
        """
        oldest = self._clock() - _OLD_S
        points = [(n, t) for n, t, at in self._means.values() if at > oldest]
        if len(points) < 2:
            return 0.0, 0.0
        weights = [1 / t**2 for _, t in points]
        total = sum(weights)
        mean_n = sum(w * n for w, (n, _) in zip(weights, points, strict=True)) / total
        mean_t = sum(w * t for w, (_, t) in zip(weights, points, strict=True)) / total
        spread = sum(w * (n - mean_n) ** 2 for w, (n, _) in zip(weights, points, strict=True))
        if spread == 0:
            return 0.0, 0.0
        rises = sum(
            w * (n - mean_n) * (t - mean_t) for w, (n, t) in zip(weights, points, strict=True)
        )
        slope = max(0.0, rises / spread)
        return max(0.0, mean_t - slope * mean_n), slope
