"""How many attempts at a service run at once: bounds that an operator gave, and a limit between them that
follows what the service can bear. Pure.
"""

from __future__ import annotations

_SHRINK = 0.7  # of the limit that is left after a timeout; once for all attempts that ran together
_FLAT = 1.5  # times the usual latency that is still flat: the tolerance of Netflix's Gradient2Limit
_RECENT = 0.1  # weight of one attempt in the recent latency, about the last ten
_USUAL = 0.005  # in the usual one, about the last two hundred


class Concurrency:
    """Begins at `most`. A timeout takes away three tenths of the limit, down to `least`. While as many
    attempts run as may, and latency is flat, as many successes as the limit is add one.

    Raises:
        ValueError: not 1 <= least <= most.
    """

    def __init__(self, least: int, most: int) -> None:
        if not 1 <= least <= most:
            raise ValueError(f"concurrency between {least} and {most}")
        self.least = least
        self.most = most
        self._limit = float(most)
        self._shrunk_at = float("-inf")
        self._recent: float | None = None  # seconds
        self._usual = 0.0

    @property
    def limit(self) -> int:
        return int(self._limit)

    def timed_out(self, *, began: float, now: float) -> None:
        """An attempt that began then was given up now. Those that ran together count as one."""
        if began >= self._shrunk_at:
            self._limit = max(float(self.least), self._limit * _SHRINK)
            self._shrunk_at = now

    def answered(self, seconds: float, *, running: int) -> None:
        """An attempt got an answer after so long; so many ran, it included."""
        if self._recent is None:
            self._recent = self._usual = seconds
        else:
            self._recent += (seconds - self._recent) * _RECENT
            self._usual += (seconds - self._usual) * _USUAL
        if self._limit < self.most and running >= self.limit and self._recent <= self._usual * _FLAT:
            self._limit = min(float(self.most), self._limit + 1 / self._limit)
