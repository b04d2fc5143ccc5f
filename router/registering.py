"""How operators change services while routers run: a new version of one, looked at before it is written."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import asyncpg
import orjson

from router.clock import utc_now
from router.config import Problem, ServiceConfig
from router.credentials import digest_of
from router.operations import Operations
from router.postgres.statements import statements
from router.registry import (
    REMOVED,
    Credentials,
    Registry,
    ServiceVersion,
    Unusable,
    credentials_of,
    registry_of,
    version_of,
    with_version,
)

_SQL = statements("services")
_HISTORY = 1_000  # versions of one service that are listed


class CannotChange(Exception):
    """The version cannot be used; `problems` says all that is wrong with it."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class ChangedMeanwhile(Exception):
    """Somebody else changed the service at the same time."""


class UnknownService(Exception):
    """There is no service, or no version of it, of this name."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of the services: what is used, and the newest version of each, usable or not."""

    registry: Registry
    versions: list[ServiceVersion]
    newest: Mapping[str, ServiceVersion]
    credentials: Mapping[str, Credentials]


Change = Callable[[ServiceVersion, ServiceConfig | None], ServiceVersion]
"""The version after the newest one; of a service without any it is given version 0. Also given: what is used
now.
"""


async def known_services(operations: Operations) -> Known:
    """With the configuration of `operations` as the file's."""

    async def read(connection: asyncpg.Connection) -> tuple[list[Any], list[Any]]:
        return await connection.fetch(_SQL["versions"]), await connection.fetch(_SQL["secrets"])

    rows, secret_rows = await operations.run(read)
    versions = [version_of(row) for row in rows]
    credentials = credentials_of(secret_rows)
    newest: dict[str, ServiceVersion] = {}
    for version in versions:
        newest.setdefault(version.service, version)
    return Known(registry_of(operations.config, versions, credentials), versions, newest, credentials)


async def change_service(
    operations: Operations, name: str, change: Change, *, note: str | None, actor: str, dry_run: bool = False
) -> tuple[ServiceVersion, ServiceConfig | None]:
    """The new version, and the service as it is with it; None: it is removed. Routers hear of it at once.

    Raises:
        CannotChange: it could not be used.
        ChangedMeanwhile: nothing was written.
    """
    known = await known_services(operations)
    registry = known.registry
    used = registry.services.get(name)
    before = known.newest.get(name, ServiceVersion(service=name, version=0, state="active", definition={}))
    version = replace(change(before, used), version=before.version + 1)
    found = with_version(operations.config, registry.services, version, known.credentials.get(name))
    if isinstance(found, Unusable):
        raise CannotChange(found.problems)
    if not dry_run:
        definition = orjson.dumps(version.definition).decode()
        written = await operations.run(
            lambda c: c.fetchval(
                _SQL["add_version"], utc_now(), actor, name, before.version, version.state, definition, note
            )
        )
        if written is None:
            raise ChangedMeanwhile(
                f"{name} was changed by somebody else at this moment; look, and do it again"
            )
    return version, found.get(name)


def with_settings(given: Mapping[str, Any], dropped: frozenset[str]) -> Change:
    """Those settings are given another value, or dropped: they are as the file has them then."""

    def change(before: ServiceVersion, service: ServiceConfig | None) -> ServiceVersion:
        definition = dict(before.definition) if isinstance(before.definition, Mapping) else {}
        kept = {key: value for key, value in definition.items() if key not in dropped}
        state = "active" if before.state == REMOVED else before.state
        if before.version == 0 and service is not None:
            state = service.state  # as the file has it
        return replace(before, definition=kept | dict(given), state=state)

    return change


def in_state(state: str) -> Change:
    """It is as it was, and in that state. Raises UnknownService."""

    def change(before: ServiceVersion, service: ServiceConfig | None) -> ServiceVersion:
        if service is None and not (before.state == REMOVED and state != REMOVED):
            raise UnknownService(before.service)
        return replace(before, state=state)

    return change


def as_in(version: ServiceVersion) -> Change:
    """As that version said."""
    return lambda before, _: replace(before, state=version.state, definition=version.definition)


async def history_of(operations: Operations, name: str) -> list[dict[str, Any]]:
    """Newest first: version, state, definition, note, created_at, created_by."""
    rows = await operations.run(lambda c: c.fetch(_SQL["history"], name, _HISTORY))
    return [{**row, "definition": orjson.loads(row["definition"])} for row in rows]


async def roll_back(
    operations: Operations, name: str, version: int, *, note: str | None, actor: str
) -> tuple[ServiceVersion, ServiceConfig | None]:
    """A new version that says what an old one said. Raises UnknownService, and what change_service raises."""
    for row in await history_of(operations, name):
        if row["version"] == version:
            old = ServiceVersion(
                service=name, version=version, state=row["state"], definition=row["definition"]
            )
            said = f"as version {version}" if note is None else note
            return await change_service(operations, name, as_in(old), note=said, actor=actor)
    raise UnknownService(f"{name} {version}")


async def make_secret(operations: Operations, name: str, *, actor: str) -> str:
    """A new whsec_ secret, with which the next deliveries are signed. Raises UnknownService."""
    secret = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
    await _set_secret(operations, name, actor, secret, None)
    return secret


async def make_token(operations: Operations, name: str, *, actor: str) -> str:
    """A new token for the service to show; the database has its hash only. Raises UnknownService,
    CannotChange: the configuration could not be used with it.
    """
    token = secrets.token_hex(32)
    await _set_secret(operations, name, actor, None, digest_of(token))
    return token


async def _set_secret(
    operations: Operations, name: str, actor: str, secret: str | None, token_sha256: str | None
) -> None:
    known = await known_services(operations)
    if name not in known.registry.services:
        raise UnknownService(name)
    before = known.credentials.get(name, Credentials())
    given = Credentials(secret or before.secret, token_sha256 or before.token_sha256)
    registry = registry_of(operations.config, known.versions, {**known.credentials, name: given})
    problems = [one.problems for one in registry.unusable if (one.service, one.version) == (name, 0)]
    if problems:
        raise CannotChange(problems[0])
    now: datetime = utc_now()
    await operations.run(lambda c: c.execute(_SQL["set_secret"], now, actor, name, secret, token_sha256))
