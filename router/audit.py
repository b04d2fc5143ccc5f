"""`postroom audit`: who changed what, and which tables are watched."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from router.command import Failure, age, json_option, operate, print_json, printable, with_config
from router.config import Config

if TYPE_CHECKING:
    from router.operations import Operations


@click.group()
def audit() -> None:
    """What was changed, by whom. The log is only ever added to, and names columns, never values.

    \b
    Example:   postroom audit list --table system_settings
    """


@audit.command("list")
@click.option("--table", callback=printable, help="Only changes of this table.")
@click.option("--id", "identity", callback=printable, help="Only of the row with this key.")
@click.option("--within", callback=age, help="Only of the last time, as 12h or 7d.")
@click.option("--limit", type=click.IntRange(1, 100_000), default=50, show_default=True)
@with_config
@json_option
def list_changes(
    config: Config,
    table: str | None,
    identity: str | None,
    within: timedelta | None,
    limit: int,
    as_json: bool,
) -> None:
    """List changes, newest first.

    \b
    Example:   postroom audit list --table webhook_dlq --within 7d
    """
    try:
        since = None if within is None else datetime.now(UTC) - within
    except OverflowError:
        raise click.UsageError("--within: that is before the calendar begins") from None
    found = operate(config, lambda operations: operations.audit_log(table, identity, since, limit))
    if as_json:
        print_json(found)
        return
    for one in found:
        said = ", ".join(one["changed"] or ()) or " ".join(f"{k}={v}" for k, v in one["detail"].items())
        click.echo(
            f"{one['acted_at']:%Y-%m-%d %H:%M:%S}  {one['actor']:<24} {one['action']:<12} "
            f"{one['object_type']} {one['object_id']}  {said}"
        )
    click.echo(f"{len(found)} change(s)")


@audit.command()
@click.argument("table")
@click.option("--ignore", multiple=True, help="A column whose change alone is no news.")
@with_config
def watch(config: Config, table: str, ignore: tuple[str, ...]) -> None:
    """Put every change of a table into the log from now on.

    \b
    Example:   postroom audit watch payments --ignore updated_at
    """
    _act(config, lambda operations: operations.watch(table, ignore))
    click.echo(f"{table} is watched")


@audit.command()
@click.argument("table")
@with_config
def unwatch(config: Config, table: str) -> None:
    """Watch a table no more. What is in the log stays.

    \b
    Example:   postroom audit unwatch payments
    """
    _act(config, lambda operations: operations.unwatch(table))
    click.echo(f"{table} is not watched")


def _act(config: Config, act: Any) -> None:
    async def work(operations: Operations) -> None:
        from router.operations import CannotWatch

        try:
            await act(operations)
        except CannotWatch as error:
            raise Failure(str(error)) from None

    operate(config, work, as_owner=True)
