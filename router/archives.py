"""`postroom archive`: what was archived, and reading it back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from router.command import Failure, json_option, operate, print_json, printable, with_config
from router.config import Config

if TYPE_CHECKING:
    from router.archive.files import ArchiveFiles


def _files(config: Config) -> ArchiveFiles:
    from router.archive.files import ArchiveFiles

    return ArchiveFiles(config.archive_location)


@click.group()
def archive() -> None:
    """Weeks of messages and months of bodies that have left the database.

    \b
    Example:   postroom archive list
    """


@archive.command("list")
@with_config
@json_option
def list_archives(config: Config, as_json: bool) -> None:
    """List the archives, oldest first, with those that are being made.

    \b
    Example:   postroom archive list --json
    """
    found = operate(config, lambda operations: operations.archives())
    if as_json:
        print_json(found)
        return
    for one in found:
        rows = "" if one["tables"] is None else f"{sum(t['rows'] for t in one['tables'].values())} rows"
        size = "" if one["tables"] is None else f"{sum(t['bytes'] for t in one['tables'].values()):,} bytes"
        click.echo(
            f"{one['name']:<30} {one['state']:<9} {one['from_at']:%Y-%m-%d} to {one['until_at']:%Y-%m-%d}  "
            f"{rows}  {size}"
        )
    click.echo(f"{len(found)} archive(s)")


@archive.command()
@click.argument("name")
@with_config
@json_option
def show(config: Config, name: str, as_json: bool) -> None:
    """Show what an archive holds, and read all of it back: exit status 0 says that it is whole.

    \b
    Example:   postroom archive show whatsapp_messages_y2026w40
    """
    from router.archive.files import ArchiveError

    files = _files(config)
    try:
        manifest = files.manifest(name)
        for table, told in files.tables(name).items():
            for _ in files.rows(name, table, told):
                pass
    except ArchiveError as error:
        raise Failure(str(error)) from None
    if as_json:
        print_json(manifest)
        return
    click.echo(f"{manifest['name']}  {manifest['from']} to {manifest['until']}, at {files.location}")
    for table, one in manifest["tables"].items():
        click.echo(f"  {table:<10} {one['rows']:>10} rows  {one['bytes']:>12,} bytes  sha256 {one['digest']}")
    click.echo("read back: whole")


@archive.command()
@click.argument("name")
@click.option("--into", default="restored", show_default=True, callback=printable, help="The schema.")
@with_config
@json_option
def restore(config: Config, name: str, into: str, as_json: bool) -> None:
    """Put an archive's tables back into the database, in a schema of their own.

    No router reads them there, and no job archives them again; drop the schema when you are done.

    \b
    Example:   postroom archive restore whatsapp_messages_y2026w40
    """
    from router import retrieval

    async def work(operations: Any) -> dict[str, int]:
        try:
            return await retrieval.restore(operations, _files(config), name, into)
        except (retrieval.ArchiveError, retrieval.RestoreError) as error:
            raise Failure(str(error)) from None

    restored = operate(config, work, as_owner=True)
    if as_json:
        print_json(restored)
    else:
        for table, rows in restored.items():
            click.echo(f"{table:<45} {rows} rows")


@archive.command()
@click.option("--wa-id", callback=printable, help="A phone number, as Meta writes it.")
@click.option("--user-id", callback=printable, help="A business-scoped user id.")
@click.option("--message-id", callback=printable, help="Meta's id of a message.")
@with_config
@json_option
def search(
    config: Config, wa_id: str | None, user_id: str | None, message_id: str | None, as_json: bool
) -> None:
    """Find what was archived of a person, or one message.

    \b
    Example:   postroom archive search --wa-id 250788000001
    """
    from router import retrieval

    if sum(one is not None for one in (wa_id, user_id, message_id)) != 1:
        raise click.UsageError("give one of --wa-id, --user-id and --message-id")

    async def work(operations: Any) -> list[dict[str, Any]]:
        try:
            return await retrieval.search(
                operations, _files(config), person=wa_id or user_id, message_id=message_id
            )
        except retrieval.ArchiveError as error:
            raise Failure(str(error)) from None

    found = operate(config, work)
    if as_json:
        print_json(found)
        return
    for item in found:
        click.echo(
            f"{item['received_at']:%Y-%m-%d %H:%M:%S}  {item['archive']}  {item['seq']}  "
            f"{item['place'] or '-':<11} {item['service'] or '-':<12} {item['message_id'] or '-'}"
        )
    click.echo(f"{len(found)} item(s)")
