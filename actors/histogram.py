"""Durations in buckets, as Prometheus has them: cheap to add to, and enough to tell a percentile."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Final

BOUNDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds in seconds, inclusive; what is longer is in one more bucket."""


@dataclass(frozen=True, slots=True)
class HistogramSnapshot:
    """`counts` of each bucket alone, one more than BOUNDS; `seconds` is their sum."""

    counts: tuple[int, ...]
    seconds: float

    @property
    def count(self) -> int:
        return sum(self.counts)

    def quantile(self, share: float) -> float | None:
        """Seconds that this share of them did not exceed, as if they lay evenly in their bucket; the last
        bound for one beyond it, None when there are none. `share` is in 0 to 1.
        """
        if not self.count:
            return None
        rank = share * self.count
        below, lower = 0, 0.0
        for count, upper in zip(self.counts, BOUNDS, strict=False):
            if count and below + count >= rank:
                return lower + (upper - lower) * (rank - below) / count
            below, lower = below + count, upper
        return BOUNDS[-1]


class Histogram:
    """Owned by whoever measures."""

    __slots__ = ("_counts", "_seconds")

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._seconds = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._seconds += seconds

    def snapshot(self) -> HistogramSnapshot:
        return HistogramSnapshot(tuple(self._counts), self._seconds)
