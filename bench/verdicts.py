"""The arithmetic of the benchmarks: percentiles, medians, ratios, goals, and when a round does not count.

Pure functions; nothing here measures.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import median

# A generator this busy has no core left to ask faster: the target was not what limited the rate.
GENERATOR_LIMIT = 0.90
# Below that limit it is still the suspect when the target's busiest process had time to spare.
GENERATOR_SUSPECT = 0.75
SERVER_IDLE = 0.70

_PERCENTILES = {"p50": 50.0, "p95": 95.0, "p99": 99.0, "p99.9": 99.9}


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile of an ascending sequence; 0.0 of nothing."""
    if not ordered:
        return 0.0
    return ordered[max(0, ceil(percent / 100 * len(ordered)) - 1)]


def latency_summary(seconds: Iterable[float]) -> dict[str, float]:
    """p50, p95, p99, p99.9 and max in milliseconds."""
    ordered = sorted(seconds)
    summary = {name: percentile(ordered, percent) * 1e3 for name, percent in _PERCENTILES.items()}
    summary["max"] = ordered[-1] * 1e3 if ordered else 0.0
    return {name: round(value, 3) for name, value in summary.items()}


def generator_saturated(generator_share: float, server_share: float) -> bool:
    """Whether the generator, not the target, set the rate. Shares are CPU seconds per wall second:
    of the generator, which has one thread, and of the busiest process of the target."""
    if generator_share >= GENERATOR_LIMIT:
        return True
    return generator_share >= GENERATOR_SUSPECT and server_share < SERVER_IDLE


def void_reasons(
    *, generator_share: float, server_share: float, failed: int, unanswered: int, acks: int, rows: int | None
) -> list[str]:
    """Why a round does not count; empty when it does. `rows` is None for a target that stores nothing."""
    reasons = []
    if generator_saturated(generator_share, server_share):
        reasons.append(f"generator at {generator_share:.0%} of a core, server at {server_share:.0%}")
    if failed:
        reasons.append(f"{failed} answers were not 200")
    if unanswered:
        reasons.append(f"{unanswered} requests were not answered")
    if rows is not None and rows != acks:
        reasons.append(f"{rows} rows for {acks} acks")
    if not acks:
        reasons.append("nothing was acked")
    return reasons


def median_or_none(values: Iterable[float]) -> float | None:
    kept = list(values)
    return median(kept) if kept else None


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """Their quotient, or None when either is missing or the denominator is zero."""
    if numerator is None or not denominator:
        return None
    return numerator / denominator


@dataclass(frozen=True)
class Verdict:
    """One measured value beside its goal. A verdict that is not `required` is shown and decides nothing."""

    name: str
    value: float | None
    goal: float
    at_least: bool
    required: bool
    unit: str = "x"

    @property
    def passed(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.goal if self.at_least else self.value <= self.goal


def missed(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """The required verdicts that did not pass."""
    return [verdict for verdict in verdicts if verdict.required and not verdict.passed]
