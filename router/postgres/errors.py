"""Translates what asyncpg raises, once, into what the ports promise."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg

from actors.errors import JournalRefused, JournalUnavailable, LeaseLost

FLUSH_GIVEN_UP = "PR001"  # raised by postroom_append
EPOCH_OVER = "PR002"  # raised by postroom_require_epoch
_CHECK_VIOLATION = "23514"
_OF_THE_DATA = ("22", "23", "54")  # SQLSTATE classes: data exception, constraint, program limit

# Connection gone, timed out, refused, shut down, out of room, read-only after a failover, not made yet.
TRANSIENT = (
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    # The server's last words came while nothing was asked, and its end of the connection has not yet.
    asyncpg.InternalClientError,
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


def is_homeless(error: BaseException) -> bool:
    """A partition is missing for a row, which is nobody's data: a violated check without a constraint."""
    return (
        isinstance(error, asyncpg.PostgresError)
        and error.sqlstate == _CHECK_VIOLATION
        and not getattr(error, "constraint_name", None)
    )


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Raise JournalUnavailable, JournalRefused or LeaseLost for what the server or the connection raised."""
    try:
        yield
    except asyncpg.PostgresError as error:
        if error.sqlstate == EPOCH_OVER:
            raise LeaseLost(str(error)) from None
        refused = (error.sqlstate or "").startswith(_OF_THE_DATA) and not is_homeless(error)
        kind = JournalRefused if refused else JournalUnavailable
        raise kind(f"{what}: {describe(error)}") from error
    except TRANSIENT as error:
        raise JournalUnavailable(f"{what}: {describe(error)}") from error
