"""The system's clock: what is given where nobody gives another one."""

from __future__ import annotations

from datetime import UTC, datetime


def utc_now() -> datetime:
    """The present moment, aware."""
    return datetime.now(UTC)
