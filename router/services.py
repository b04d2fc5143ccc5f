"""`postroom services`: which services there are, and how they are changed while routers run."""

from __future__ import annotations

import tomllib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from router.command import Failure, actor, json_option, operate, print_json, printable, with_config
from router.config import Config, ServiceConfig
from router.domains import canonical_domain

if TYPE_CHECKING:
    from router.operations import Operations
    from router.registering import Change, Known
    from router.registry import ServiceVersion

_note_option = click.option("--note", callback=printable, help="Why; it stays with the version.")


@click.group()
def services() -> None:
    """The services behind the number, and changing them while routers run.

    \b
    Example:   postroom services list
    """


@services.command("list")
@with_config
@json_option
def list_services(config: Config, as_json: bool) -> None:
    """List the services as the configuration file and later changes have them.

    \b
    Example:   postroom services list --json
    """
    known = _operate(config, _known)
    found = [_shown(known, name) for name in known.registry.services]
    unusable = [
        {
            "service": one.service,
            "version": one.version,
            "problems": [str(problem) for problem in one.problems],
        }
        for one in known.registry.unusable
    ]
    if as_json:
        print_json({"services": found, "unusable": unusable})
        return
    for one in found:
        source = f"version {one['version']}" if one["version"] else "configuration"
        click.echo(f"{one['name']:<16} {one['state']:<9} {source:<14} {one['reached']}")
        for name, url in (("canary", one["canary_url"]), ("shadow", one["shadow_url"])):
            if url is not None:
                click.echo(f"{'':<16} {name} {one[f'{name}_share']:.0%} {url}")
    for one in unusable:
        click.echo(f"{one['service']}: version {one['version']} cannot be used, and the one before it is:")
        for problem in one["problems"]:
            click.echo(f"  {problem}")


@services.command()
@click.argument("name", callback=printable)
@with_config
def show(config: Config, name: str) -> None:
    """Print one service with all its settings, as JSON; no secrets.

    \b
    Example:   postroom services show rides
    """
    known = _operate(config, _known)
    if (domain := canonical_domain(name)) not in known.registry.services:
        raise Failure(_unknown(domain, known.registry.services))
    print_json(_shown(known, domain))


@services.command("set")
@click.argument("name", callback=printable)
@click.argument("settings", nargs=-1, metavar="KEY=VALUE...")
@_note_option
@click.option("--dry-run", is_flag=True, help="Only look whether it could be used.")
@with_config
@json_option
def set_service(
    config: Config, name: str, settings: Sequence[str], note: str | None, dry_run: bool, as_json: bool
) -> None:
    """Add a service, or give one other settings: those of [services.NAME] in postroom.toml, with values as
    they are written there; a text needs no quotes. KEY= takes a setting back: it is as the file has it then.
    A URL given here must be public, or allow_private=true be given, too.

    \b
    Example:   postroom services set rides url=https://rides-2.example.com/hook lanes=16
               postroom services set rides canary_url=https://canary.example.com/hook canary_share=0.1
               postroom services set chess url=https://chess.example.com/hook 'keywords={en = ["chess"]}'
    """
    from router.registering import with_settings

    given, dropped = _settings(settings)
    _change(config, name, with_settings(given, dropped), note, dry_run=dry_run, as_json=as_json)


@services.command()
@click.argument("name", callback=printable)
@_note_option
@with_config
@json_option
def pause(config: Config, name: str, note: str | None, as_json: bool) -> None:
    """Leave a service alone: what comes for it waits, in order, for 48 hours at most
    (dead_letter_max_age_hours). Running attempts are finished.

    \b
    Example:   postroom services pause rides --note "database move"
    """
    _set_state(config, name, "paused", note, as_json)


@services.command()
@click.argument("name", callback=printable)
@_note_option
@with_config
@json_option
def resume(config: Config, name: str, note: str | None, as_json: bool) -> None:
    """Deliver to a service again that was paused, draining or removed.

    \b
    Example:   postroom services resume rides
    """
    _set_state(config, name, "active", note, as_json)


@services.command()
@click.argument("name", callback=printable)
@_note_option
@with_config
@json_option
def drain(config: Config, name: str, note: str | None, as_json: bool) -> None:
    """Let no new conversation get to a service; those that are with it go on until they leave.

    \b
    Example:   postroom services drain rides
    """
    _set_state(config, name, "draining", note, as_json)


@services.command()
@click.argument("name", callback=printable)
@_note_option
@with_config
@json_option
def remove(config: Config, name: str, note: str | None, as_json: bool) -> None:
    """Take a service out: nothing goes to it any more, and its words mean nothing. What waited for it stays a
    dead letter, and goes when there is one of that name again.

    \b
    Example:   postroom services remove chess
    """
    _set_state(config, name, "removed", note, as_json)


@services.command()
@click.argument("name", callback=printable)
@with_config
@json_option
def history(config: Config, name: str, as_json: bool) -> None:
    """List the versions of a service, newest first: who changed what, and when.

    \b
    Example:   postroom services history rides
    """

    async def work(operations: Operations) -> Any:
        from router.registering import history_of

        return await history_of(operations, canonical_domain(name))

    found = _operate(config, work)
    if as_json:
        print_json(found)
        return
    for one in found:
        settings = " ".join(f"{key}={value}" for key, value in one["definition"].items())
        said = f"  # {one['note']}" if one["note"] else ""
        click.echo(
            f"{one['version']:>4}  {one['created_at']:%Y-%m-%d %H:%M:%S}  {one['created_by']:<16} "
            f"{one['state']:<9} {settings}{said}"
        )
    if not found:
        click.echo("it is as the configuration file has it")


@services.command()
@click.argument("name", callback=printable)
@click.argument("version", type=click.IntRange(1, 2**31 - 1))
@_note_option
@with_config
@json_option
def rollback(config: Config, name: str, version: int, note: str | None, as_json: bool) -> None:
    """Make a service as it was with an earlier version; secrets stay as they are.

    \b
    Example:   postroom services rollback rides 3
    """

    async def work(operations: Operations) -> Any:
        from router.registering import roll_back

        return await roll_back(operations, canonical_domain(name), version, note=note, actor=actor())

    _say(*_operate(config, work), as_json=as_json)


@services.command()
@click.argument("name", callback=printable)
@with_config
def secret(config: Config, name: str) -> None:
    """Make a new secret for what is posted to a service, and print it once. The next deliveries are signed
    with it.

    \b
    Example:   postroom services secret rides
    """

    async def work(operations: Operations) -> str:
        from router.registering import make_secret

        return await make_secret(operations, canonical_domain(name), actor=actor())

    click.echo(_operate(config, work))


@services.command()
@click.argument("name", callback=printable)
@with_config
def token(config: Config, name: str) -> None:
    """Make a new token for a service to show when it attaches or sends a message, and print it once. The one
    before it is good for nothing any more.

    \b
    Example:   postroom services token jobs
    """

    async def work(operations: Operations) -> str:
        from router.registering import make_token

        return await make_token(operations, canonical_domain(name), actor=actor())

    click.echo(_operate(config, work))


async def _known(operations: Operations) -> Known:
    from router.registering import known_services

    return await known_services(operations)


def _set_state(config: Config, name: str, state: str, note: str | None, as_json: bool) -> None:
    from router.registering import in_state

    _change(config, name, in_state(state), note, as_json=as_json)


def _change(
    config: Config, name: str, change: Change, note: str | None, *, dry_run: bool = False, as_json: bool
) -> None:
    async def work(operations: Operations) -> Any:
        from router.registering import change_service

        return await change_service(
            operations, canonical_domain(name), change, note=note, actor=actor(), dry_run=dry_run
        )

    _say(*_operate(config, work), as_json=as_json, dry_run=dry_run)


def _operate(config: Config, work: Callable[[Operations], Awaitable[Any]]) -> Any:
    async def run(operations: Operations) -> Any:
        from router.registering import CannotChange, ChangedMeanwhile, UnknownService

        try:
            return await work(operations)
        except CannotChange as error:
            problems = "\n".join(f"  {problem}" for problem in error.problems)
            raise click.UsageError(f"it could not be used:\n{problems}") from None
        except ChangedMeanwhile as error:
            raise Failure(str(error)) from None
        except UnknownService as error:
            raise Failure(_unknown(str(error), (await _known(operations)).registry.services)) from None

    return operate(config, run)


def _unknown(name: str, known: Mapping[str, ServiceConfig]) -> str:
    return f"no service {name!r}; there are: {', '.join(known)}"


def _settings(written: Sequence[str]) -> tuple[dict[str, Any], frozenset[str]]:
    given: dict[str, Any] = {}
    dropped: set[str] = set()
    for one in written:
        key, equals, value = one.partition("=")
        if not equals or not key.isidentifier():
            raise click.UsageError(f"{one!r} is not KEY=VALUE, such as lanes=16")
        if not value.isprintable():
            raise click.UsageError(f"{key}: has characters that no setting has")
        if value:
            given[key] = _value(value)
        else:
            dropped.add(key)
    return given, frozenset(dropped)


def _value(written: str) -> Any:
    """A TOML value; anything else is a text."""
    try:
        table = tomllib.loads(f"value = {written}")
    except (ValueError, RecursionError):
        return written
    value = table.get("value")
    return value if isinstance(value, str | int | float | list | dict) and len(table) == 1 else written


def _say(
    version: ServiceVersion, service: ServiceConfig | None, *, as_json: bool, dry_run: bool = False
) -> None:
    if as_json:
        print_json(
            {"name": version.service, "version": version.version, "state": version.state, "dry_run": dry_run}
        )
        return
    verb = "would be" if dry_run else "is"
    reached = "" if service is None else f", {_reached(service)}"
    click.echo(f"{version.service} {verb} {version.state}{reached} (version {version.version})")


def _reached(service: ServiceConfig) -> str:
    if service.url is not None:
        return service.url
    return "attaches" if service.attaches else "not reached over the network"


def _shown(known: Known, name: str) -> dict[str, Any]:
    service = known.registry.services[name]
    newest = known.newest.get(name)
    return {
        "name": name,
        "state": service.state,
        "version": known.registry.versions.get(name, 0),
        "changed": {} if newest is None else newest.definition,
        "reached": _reached(service),
        "url": service.url,
        "canary_url": service.canary_url,
        "canary_share": service.canary_share,
        "shadow_url": service.shadow_url,
        "shadow_share": service.shadow_share,
        "timeout_ms": service.timeout_ms,
        "deadline_ms": service.deadline_ms,
        "lanes": service.lanes,
        "lanes_min": service.lanes_min,
        "allow_private": service.allow_private,
        "public_only": sorted(service.public_only),
        "statuses": service.statuses,
        "dead_letters": service.dead_letters,
        "order": service.order,
        "breaker_failures": service.breaker_failures,
        "breaker_failure_ratio": service.breaker_failure_ratio,
        "breaker_slow_ms": service.breaker_slow_ms,
        "breaker_slow_ratio": service.breaker_slow_ratio,
        "signed": service.secret is not None,
        "has_token": service.credential is not None,
        "keywords": service.keywords,
    }
