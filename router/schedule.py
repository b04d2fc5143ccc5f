"""Cron expressions, in UTC. Pure."""

from __future__ import annotations

from datetime import UTC, datetime

from cronsim import CronSim, CronSimError


def next_time(expression: str, after: datetime) -> datetime:
    """The first time of a cron expression of five fields that is later than `after`.

    Raises:
        ValueError: it cannot be read, or never comes true.
    """
    try:
        return next(CronSim(expression, after.astimezone(UTC)))
    except CronSimError as error:
        raise ValueError(f"schedule {expression!r} cannot be read: {error}") from None
    except StopIteration:
        raise ValueError(f"schedule {expression!r} never comes true") from None
