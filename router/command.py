"""What every command shares: options, the configuration, errors as messages, output. Exit status: 0 done,
1 it did not work or a check failed, 2 wrong use or configuration.
"""

from __future__ import annotations

import getpass
import json
import os
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from router.config import Config, ConfigError

if TYPE_CHECKING:
    from router.operations import Operations

F = TypeVar("F", bound=Callable[..., Any])

_AGE = re.compile(r"(\d{1,9})([smhdw])", re.ASCII)
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class Failure(click.ClickException):
    exit_code = 1


def database_options(function: F) -> F:
    for option in (
        click.option(
            "--config", "config_file", type=click.Path(path_type=Path), help="postroom.toml to read."
        ),
        click.option("--schema", help="Schema of the database that Postroom's tables are in [public]."),
        click.option("--database-url", help="Postgres to use instead of the embedded one."),
        click.option(
            "--data-dir",
            type=click.Path(path_type=Path),
            help="Directory of the embedded Postgres [.postroom].",
        ),
    ):
        function = option(function)
    return function


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def load(*, config_file: Path | None, need_secrets: bool, **overrides: object) -> Config:
    from router.settings import load_config

    try:
        return load_config(
            file=config_file, environ=os.environ, overrides=overrides, need_secrets=need_secrets
        )
    except ConfigError as error:
        problems = "\n".join(f"  {problem}" for problem in error.problems)
        raise click.UsageError(f"the configuration cannot be used:\n{problems}") from None


def read_again(config: Config, *, config_file: Path | None, overrides: Mapping[str, object]) -> Config:
    """The configuration as it is now, with the secrets that were made up for `config`. Raises ConfigError."""
    from router.settings import load_config

    return load_config(file=config_file, environ={**config.generated, **os.environ}, overrides=overrides)


@contextmanager
def failing_plainly() -> Iterator[None]:
    """What a user can cause or mend is a message, not a traceback."""
    from actors.errors import JournalUnavailable, SpoolUnavailable
    from router.postgres.embedded import EmbeddedPostgresError
    from router.postgres.migrate import MigrationError
    from router.serve import CannotListen

    expected = (JournalUnavailable, SpoolUnavailable, EmbeddedPostgresError, MigrationError, CannotListen)
    try:
        yield
    except expected as error:
        raise Failure(str(error)) from None
    except BaseExceptionGroup as group:
        if group.split(expected)[1] is not None:
            raise
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise Failure(str(first)) from None


def run_command(work: Callable[[], Awaitable[Any]]) -> Any:
    import trio

    with failing_plainly():
        try:
            return trio.run(work)
        except KeyboardInterrupt:
            raise click.Abort from None


def operate(config: Config, work: Callable[[Operations], Awaitable[Any]], *, as_owner: bool = False) -> Any:
    """What an operator does, as router_admin; `as_owner`: what changes the schema."""

    async def run() -> Any:
        from router.operations import open_operations
        from router.postgres.connections import ADMIN, OWNER

        role = OWNER if as_owner else ADMIN
        async with open_operations(config, role=role, report=say) as operations:
            return await work(operations)

    return run_command(run)


def say(line: str) -> None:
    click.echo(line, err=True)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, default=str))


def with_config(function: Callable[..., Any]) -> Callable[..., Any]:
    """Gives the command `config` for the options of the database."""

    @wraps(function)
    def command(
        data_dir: Path | None,
        database_url: str | None,
        schema: str | None,
        config_file: Path | None,
        **rest: Any,
    ) -> Any:
        config = load(
            config_file=config_file,
            need_secrets=False,
            data_dir=data_dir,
            database_url=database_url,
            schema=schema,
        )
        return function(config=config, **rest)

    return database_options(command)


def printable(_context: click.Context, _option: click.Parameter, written: str | None) -> str | None:
    """What the database takes: an argument that is not UTF-8 comes as lone surrogates."""
    if written is not None and not written.isprintable():
        raise click.BadParameter(f"{written!r} has characters that no name has")
    return written


def actor() -> str:
    """Who acts, for the audit log: the operating system's user."""
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):
        return "cli"


def age(_context: click.Context, _option: click.Parameter, written: str | None) -> timedelta | None:
    """`30m`, `12h`, `7d` as a time span."""
    if written is None:
        return None
    match = _AGE.fullmatch(written)
    if match is None:
        raise click.BadParameter(f"{written!r} is not a time span; write it like 30m, 12h or 7d")
    try:
        return timedelta(**{_UNITS[match[2]]: int(match[1])})
    except OverflowError:
        raise click.BadParameter(f"{written} is too long") from None
