"""`postroom events`: stored bodies, and splitting what was malformed again after a fix."""

from __future__ import annotations

import sys
from typing import Any

import click

from router.command import Failure, actor, json_option, operate, print_json, printable, with_config
from router.config import Config

_UNPRINTED = ("body", "malformed")


@click.group()
def events() -> None:
    """Stored bodies: what Meta signed, byte for byte.

    \b
    Example:   postroom events list
    """


@events.command("list")
@click.option("--all", "every", is_flag=True, help="Also those without a malformed item.")
@click.option(
    "--reason",
    callback=printable,
    help="Only those with an item that is malformed for this reason, as no_sender.",
)
@click.option("--limit", type=click.IntRange(1, 100_000), default=50, show_default=True)
@json_option
@with_config
def list_events(config: Config, every: bool, reason: str | None, limit: int, as_json: bool) -> None:
    """List stored bodies with malformed items, newest first.

    \b
    Example:   postroom events list --reason no_sender
    """
    found = operate(config, lambda o: o.events(every=every, reason=reason, limit=limit))
    if as_json:
        print_json(found)
        return
    for event in found:
        click.echo(
            f"{event['event_id']:>8}  {event['received_at']:%Y-%m-%d %H:%M:%S}  {event['app']:<12} "
            f"{event['bytes']:>8} bytes  malformed={event['malformed']} {', '.join(event['reasons'] or ())}"
        )
    click.echo(f"{len(found)} event(s)")


@events.command("show")
@click.argument("event_id", metavar="ID", type=click.IntRange(1, 2**63 - 1))
@click.option(
    "--body", "only_body", is_flag=True, help="Write the body as it was received, and nothing else."
)
@json_option
@with_config
def show(config: Config, event_id: int, only_body: bool, as_json: bool) -> None:
    """Show one stored body, and which of its items are malformed.

    \b
    Example:   postroom events show 17 --body > body.json
    """
    event = operate(config, lambda o: o.event(event_id))
    if event is None:
        raise Failure(f"there is no event {event_id}")
    body: bytes = event["body"]
    if only_body:
        sys.stdout.buffer.write(body)
        return
    if as_json:
        print_json({**event, "body": body.decode("utf-8", "replace")})
        return
    for name, value in event.items():
        if name not in _UNPRINTED:
            click.echo(f"{name:<15} {'-' if value is None else value}")
    for item in event["malformed"]:
        click.echo(f"malformed       {item['path'] or 'the body'}: {item['reason']}")
    click.echo(body.decode("utf-8", "replace"))


@events.command("reparse")
@click.argument("ids", metavar="[ID]...", nargs=-1, type=click.IntRange(1, 2**63 - 1))
@click.option("--all", "every", is_flag=True, help="All that have malformed items.")
@click.option("--reason", callback=printable, help="Only items that are malformed for this reason.")
@click.option("--dry-run", is_flag=True, help="Only say how many it would be.")
@json_option
@with_config
def reparse(
    config: Config, ids: tuple[int, ...], every: bool, reason: str | None, dry_run: bool, as_json: bool
) -> None:
    """Split malformed items again, with this version and configuration, and journal what is readable now.

    \b
    Example:   postroom events reparse --all --reason foreign_number --dry-run
    """
    from router.operations import Reparsed, UnknownApp

    if bool(ids) == every:
        raise click.UsageError("give event ids, or --all")

    async def work(operations: Any) -> Any:
        return await operations.reparse(ids or None, reason, dry_run=dry_run, actor=actor())

    try:
        done: Reparsed = operate(config, work)
    except UnknownApp as unknown:
        raise Failure(str(unknown)) from None
    if as_json:
        print_json({"events": done.events, "malformed": done.items, "reparsed": done.readable})
        return
    verb = "can be read now" if dry_run else "were read and journaled"
    click.echo(f"{done.readable} of {done.items} malformed item(s) in {done.events} event(s) {verb}")
