"""Translates what asyncpg raises, once, into what the ports promise."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg

from actors.errors import JournalUnavailable, LeaseLost

FLUSH_GIVEN_UP = "PR001"  # raised by postroom_append
EPOCH_OVER = "PR002"  # raised by postroom_require_epoch

# Connection gone, timed out, refused, shut down, out of room, read-only after a failover, not made yet.
TRANSIENT = (
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.CannotConnectNowError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.LockNotAvailableError,
    asyncpg.PostgresSystemError,
    asyncio.TimeoutError,
    OSError,
)


def describe(error: BaseException) -> str:
    """The kind of failure without any statement's values, which may hold a message's text."""
    state = getattr(error, "sqlstate", None)
    return f"{type(error).__name__} {state}" if state else f"{type(error).__name__}: {error}"


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Raise JournalUnavailable or LeaseLost for what the server or the connection raised."""
    try:
        yield
    except asyncpg.PostgresError as error:
        if error.sqlstate == EPOCH_OVER:
            raise LeaseLost(str(error)) from None
        raise JournalUnavailable(f"{what}: {describe(error)}") from error
    except TRANSIENT as error:
        raise JournalUnavailable(f"{what}: {describe(error)}") from error
