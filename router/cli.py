"""The command line: reads what was asked, calls the one function that does it, prints, sets the exit
status.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from router.archives import archive
from router.audit import audit
from router.command import (
    Failure,
    database_options,
    failing_plainly,
    json_option,
    load,
    operate,
    print_json,
    read_again,
    run_command,
    say,
    with_config,
)
from router.config import Config
from router.conform import conformance
from router.dlq import dlq
from router.erase import erase
from router.events import events
from router.jobs import jobs, settings
from router.services import services

if TYPE_CHECKING:
    from router.operations import Operations


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="postroom", prog_name="postroom")
def main() -> None:
    """Postroom: one WhatsApp number, many services behind it, no message lost.

    \b
    Try it:    postroom demo
    Run it:    postroom serve --dev
    """


main.add_command(archive)
main.add_command(audit)
main.add_command(conformance)
main.add_command(dlq)
main.add_command(erase)
main.add_command(events)
main.add_command(jobs)
main.add_command(services)
main.add_command(settings)


@main.command()
@click.option("--host", help="Address of the webhook port [0.0.0.0; 127.0.0.1 with --dev].")
@click.option("--port", type=int, help="Webhook port, 0 for any [8080].")
@click.option("--admin-host", help="Address of the admin port [127.0.0.1].")
@click.option("--admin-port", type=int, help="Admin port, 0 for any [8081].")
@click.option("--dev", is_flag=True, help="Loopback only, secrets made up and printed, echo services.")
@click.option(
    "--migrate", "apply_migrations", is_flag=True, help="Bring an outside database up to date first."
)
@database_options
def serve(
    host: str | None,
    port: int | None,
    admin_host: str | None,
    admin_port: int | None,
    dev: bool,
    apply_migrations: bool,
    data_dir: Path | None,
    database_url: str | None,
    schema: str | None,
    config_file: Path | None,
) -> None:
    """Take webhooks, store, route and deliver them, until SIGTERM. SIGHUP reads services and routing again.

    \b
    Example:   postroom serve --dev --port 8080
    """
    overrides = {
        "host": host,
        "port": port,
        "admin_host": admin_host,
        "admin_port": admin_port,
        "dev": dev,
        "data_dir": data_dir,
        "database_url": database_url,
        "schema": schema,
    }
    config = load(config_file=config_file, need_secrets=True, **overrides)
    from router.observe.logs import configure_logging
    from router.serve import echo
    from router.serve import serve as run_server

    # Requests in flight are many small objects that soon go by themselves: looking at them and at all
    # that was imported every 700 allocations is a tenth of the CPU time of an ack.
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    configure_logging(form="console" if sys.stderr.isatty() else "json")
    for name, value in config.generated.items():
        say(f"{name}={value}  (made up for this run)")
    handlers = (
        {name: echo for name, s in config.services.items() if s.url is None and not s.attaches}
        if config.dev
        else {}
    )
    run_command(
        partial(
            run_server,
            config,
            handlers=handlers,
            reload=lambda: read_again(config, config_file=config_file, overrides=overrides),
            apply_migrations=True if apply_migrations else None,
            announce=click.echo,
            report=say,
        )
    )


@main.command()
@click.option("--dry-run", is_flag=True, help="Print the SQL that would be applied, and apply nothing.")
@with_config
@json_option
def migrate(config: Config, dry_run: bool, as_json: bool) -> None:
    """Bring the database's schema up to date.

    \b
    Example:   postroom migrate --database-url postgresql://localhost/postroom
    """

    async def run() -> list[Any]:
        from router.database import migrate_database, open_database, pending_migrations
        from router.postgres.bridge import open_bridge

        async with open_database(config, report=say) as dsn, open_bridge() as bridge:
            if dry_run:
                return await pending_migrations(bridge, dsn())
            return await migrate_database(bridge, dsn(), apply=True, schema=config.schema)

    found = run_command(run)
    if dry_run:
        for migration in found:
            click.echo(f"-- {migration.version:04}_{migration.name}\n\n{migration.sql}")
        say(f"{len(found)} to apply")
    elif as_json:
        print_json({"applied": found})
    else:
        click.echo("\n".join(f"applied {name}" for name in found) or "nothing to apply")


@main.command()
@click.option("--text", help="The text of a message.")
@click.option("--active-service", help="The service that the conversation is with.")
@click.option("--live", is_flag=True, help="With services as the routers on the database have them now.")
@with_config
def explain(config: Config, text: str | None, active_service: str | None, live: bool) -> None:
    """Print where a message would be routed, by which rule, and why.

    Without --text a body as Meta sends it, or one message object, is read from standard input. Services are
    those of postroom.toml; with --live also as they were changed since.

    \b
    Example:   postroom explain --text "taxi please" --active-service wallet
    """
    from router.explain import ExplainError, explain_all

    if live:
        config = operate(config, _with_services_of_now)
    payload = sys.stdin.buffer.read() if text is None else None
    try:
        decisions = explain_all(config, text=text, payload=payload, active_service=active_service)
    except ExplainError as error:
        raise click.UsageError(str(error)) from None
    for decision in decisions:
        print_json(decision)


async def _with_services_of_now(operations: Operations) -> Config:
    from router.registering import known_services

    registry = (await known_services(operations)).registry
    return replace(operations.config, services=registry.services)


@main.command()
@with_config
def dsn(config: Config) -> None:
    """Print the owner's connection string.

    \b
    Example:   psql "$(postroom dsn)"
    """
    from router.database import in_schema

    click.echo(in_schema(_dsn(config), config.schema))


def _dsn(config: Config) -> str:
    from router.postgres.embedded import EmbeddedPostgres

    if config.database_url is not None:
        return config.database_url
    if not (config.data_dir / "pgdata").is_dir():
        raise Failure(
            f"{config.data_dir} has no database yet; run postroom serve or migrate, or use --data-dir"
        )
    with failing_plainly():
        return EmbeddedPostgres(config.data_dir).dsn()


@main.command(context_settings={"ignore_unknown_options": True})
@with_config
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def psql(config: Config, arguments: tuple[str, ...]) -> None:
    """Open psql on the database; further arguments are psql's own.

    \b
    Example:   postroom psql -- -c 'SELECT count(*) FROM whatsapp_messages'
    """

    async def run() -> int:
        import subprocess

        import trio

        from router.database import open_database
        from router.postgres.embedded import find_binary

        async with open_database(config, report=say) as dsn:
            process = await trio.run_process(
                [find_binary("psql"), dsn(), *arguments], stdin=None, check=False
            )
        assert isinstance(process, subprocess.CompletedProcess)
        return process.returncode

    sys.exit(run_command(run))


@main.command()
@with_config
@json_option
def check(config: Config, as_json: bool) -> None:
    """Recount every item from the tables: each must be in exactly one place.

    \b
    Example:   postroom check --json
    """
    result = operate(config, lambda operations: operations.check())
    if as_json:
        print_json(result.as_dict())
    else:
        click.echo(f"received {result.received}, duplicates {result.duplicates}")
        for place, count in result.places.items():
            click.echo(f"  {place:<12} {count}")
        click.echo("replies: " + ", ".join(f"{count} {status}" for status, count in result.replies.items()))
        for problem in result.problems:
            click.echo(f"  ! {problem}")
        click.echo(f"conservation: {'ok' if result.ok else 'broken'}")
    sys.exit(0 if result.ok else 1)


@main.command("rls-audit")
@with_config
@json_option
def rls_audit(config: Config, as_json: bool) -> None:
    """Look for tables without row-level security, without a policy, or with one that opens every row.

    Exit status 1 if there is one. docs/roles.md says who may do what.

    \b
    Example:   postroom rls-audit
    """
    findings = operate(config, lambda operations: operations.rls_audit())
    if as_json:
        print_json(findings)
    else:
        for one in findings:
            click.echo(f"{one['table_name']:<30} {one['policy'] or '-':<20} {one['finding']}")
        click.echo(f"{len(findings)} finding(s)")
    sys.exit(1 if findings else 0)


@main.command()
@click.option("--text", required=True, help="What the phone writes.")
@click.option("--url", default="http://127.0.0.1:8080/webhooks/whatsapp", show_default=True)
@click.option(
    "--secret", envvar="WHATSAPP_APP_SECRET", required=True, help="App secret [WHATSAPP_APP_SECRET]."
)
@click.option("--phone", default="250780000001", show_default=True, help="Who writes.")
@click.option("--number", default="100000000000001", show_default=True, help="phone_number_id written to.")
@click.option("--wait", type=float, default=10.0, show_default=True, help="Seconds to wait for its outcome.")
@with_config
@json_option
def send(
    config: Config,
    text: str,
    url: str,
    secret: str,
    phone: str,
    number: str,
    wait: float,
    as_json: bool,
) -> None:
    """Send one signed message into a running router and print what became of it.

    \b
    Example:   postroom send --text taxi
    """

    async def run() -> dict[str, Any]:
        from router.trial import send_one

        return await send_one(
            config, url=url, secret=secret, phone=phone, number=number, text=text, wait=wait, report=say
        )

    result = run_command(run)
    if as_json:
        print_json(result)
    else:
        for name, value in result.items():
            click.echo(f"{name:<12} {value}")
    sys.exit(0 if result.get("answered") == 200 else 1)


@main.command()
@click.option("--seconds", type=float, help="Stop after this long; without it, on Ctrl-C.")
@click.option("--rate", type=float, default=200.0, show_default=True, help="Webhooks per second.")
@click.option("--phones", type=click.IntRange(1, 100_000), default=200, show_default=True)
@click.option("--seed", type=int, help="Repeat the same traffic.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Keep the data here [a new temporary one].")
@json_option
def demo(
    seconds: float | None,
    rate: float,
    phones: int,
    seed: int | None,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """A router, two services and a population of phones, on an embedded Postgres, in the terminal.

    Exit status 0 only if the phones' own ledger and the router agree at the end.

    \b
    Example:   postroom demo --seconds 10
    """
    from router.demo import run_demo

    async def run() -> Any:
        return await run_demo(
            seconds=seconds, rate=rate, phones=phones, seed=seed, data_dir=data_dir, live=not as_json
        )

    summary = run_command(run)
    if as_json:
        print_json(summary.as_dict())
    else:
        click.echo(summary.text())
    sys.exit(0 if summary.ok else 1)
