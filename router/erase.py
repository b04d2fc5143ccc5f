"""`postroom erase`: one person's data goes, everywhere."""

from __future__ import annotations

from typing import Any

import click

from router.command import Failure, actor, json_option, operate, print_json, printable, say, with_config
from router.config import Config

_LINES = {
    "items": "messages, statuses and other items",
    "bodies": "stored bodies changed",
    "sessions": "sessions",
    "letters": "dead letters",
    "replies": "replies",
    "statuses": "statuses of replies",
    "mentions": "mentions in what is of others",
    "spooled": "spool files emptied into the journal",
    "set_aside": "spool files removed that had been set aside",
}


@click.command()
@click.option("--wa-id", callback=printable, help="A phone number, as Meta writes it.")
@click.option("--user-id", callback=printable, help="A business-scoped user id.")
@click.option("--dry-run", is_flag=True, help="Only say what there is of the person.")
@click.option(
    "--within",
    type=click.FloatRange(0, 86_400),
    default=30.0,
    show_default=True,
    help="Seconds to wait for messages of the person that are under way.",
)
@json_option
@with_config
def erase(
    config: Config, wa_id: str | None, user_id: str | None, dry_run: bool, within: float, as_json: bool
) -> None:
    """Erase one person by any name: tables, spool and archives, and the names themselves.

    Items keep their place in the count and their hash, so that no redelivery brings them back. It can be done
    beside a running router, and again after an interruption. Backups, and the services that had the messages,
    are not Postroom's to change.

    \b
    Example:   postroom erase --wa-id 250788000001 --dry-run
    """
    from router.archive.files import ArchiveError
    from router.channels.redaction import MIN_NAME
    from router.erasing import CannotErase, Eraser, Erasure

    if (wa_id is None) == (user_id is None):
        raise click.UsageError("give one of --wa-id and --user-id")
    name = (wa_id or "").lstrip("+") or user_id or ""
    if len(name) < MIN_NAME:
        raise click.UsageError(f"{name!r} is too short for a name: give all of it")

    async def work(operations: Any) -> Erasure:
        eraser = Eraser(operations, actor=actor(), within=within, report=say)
        try:
            return await (eraser.look(name) if dry_run else eraser.erase(name))
        except (ArchiveError, CannotErase) as error:
            raise Failure(str(error)) from None

    told: Erasure = operate(config, work, as_owner=True)
    if as_json:
        print_json({"dry_run": dry_run, **told.as_dict()})
        return
    counts = told.as_dict()
    for field, what in _LINES.items():
        click.echo(f"{counts[field]:>8} {what}")
    click.echo(f"{len(told.archives):>8} archives{': ' if told.archives else ''}{', '.join(told.archives)}")
    known = f"known by {told.names} name(s)"
    click.echo(f"{known}; nothing was changed" if dry_run else f"{known}; erased")
