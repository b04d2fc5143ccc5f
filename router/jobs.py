"""`postroom jobs`: what is done when, what became of it, and the switches; and `postroom settings`."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from router.clock import utc_now
from router.command import Failure, actor, json_option, operate, print_json, with_config
from router.config import Config
from router.schedule import next_time

if TYPE_CHECKING:
    from router.operations import Operations

_FIXED = (
    "process-dlq-entries"  # the retrier follows its letters; its schedule only says how long it waits at most
)


@click.group()
def jobs() -> None:
    """What Postroom does by itself, and when.

    \b
    Example:   postroom jobs list
    """


@jobs.command("list")
@with_config
@json_option
def list_jobs(config: Config, as_json: bool) -> None:
    """List the jobs: when each is due, whether it is switched on, how it last went.

    \b
    Example:   postroom jobs list --json
    """
    found = [_with_next(job) for job in operate(config, lambda operations: operations.jobs())]
    if as_json:
        print_json(found)
        return
    for job in found:
        alias = f" (the same as {job['job']})" if job["name"] != job["job"] else ""
        click.echo(f"{job['name']}{alias}")
        click.echo(f"  {'on ' if job['active'] else 'off'} {job['schedule']:<14} {job['command']}")
        if job["last_run"] is not None:
            last = f"{job['last_status']}: {job['last_message'] or ''}"
            click.echo(f"  last run {_time(job['last_run'])} {last}")
        if job["active"]:
            click.echo(f"  next run {_time(job['next_run']) if job['next_run'] else job['problem']}")


def _with_next(job: dict[str, Any]) -> dict[str, Any]:
    due: datetime | None = None
    problem: str | None = None
    if job["active"]:
        try:
            due = next_time(job["schedule"], job["followed_to"] or utc_now())
        except ValueError as error:
            problem = str(error)
    return {**job, "next_run": due, "problem": problem}


@jobs.command()
@click.argument("name", required=False)
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True)
@with_config
@json_option
def runs(config: Config, name: str | None, limit: int, as_json: bool) -> None:
    """List the last runs, of one job or of all, newest first.

    \b
    Example:   postroom jobs runs session-cleanup
    """

    found = _named(config, lambda operations: operations.job_runs(name, limit))
    if as_json:
        print_json(found)
        return
    for run in found:
        click.echo(
            f"{_time(run['start_time'])}  {run['status']:<9} {run['job']:<28} {run['return_message'] or ''}"
        )
    if not found:
        click.echo("no runs yet")


@jobs.command()
@click.argument("name")
@click.option("--wait", type=click.FloatRange(0), default=60.0, show_default=True, help="Seconds.")
@with_config
@json_option
def run(config: Config, name: str, wait: float, as_json: bool) -> None:
    """Have a job done now, also one that is switched off, by the router that runs on this database.

    \b
    Example:   postroom jobs run session-cleanup
    """
    done = _named(config, lambda operations: operations.run_job(name, actor=actor(), within=wait))
    if done is None:
        raise Failure(
            f"{name} was asked for, and no run has ended in {wait:g} s: is a postroom serve running on this "
            "database? It is done as soon as one does; see postroom jobs runs"
        )
    if as_json:
        print_json(done)
    else:
        click.echo(f"{done['status']}: {done['return_message'] or ''}")
    sys.exit(0 if done["status"] == "succeeded" else 1)


@jobs.command()
@click.argument("name")
@with_config
def enable(config: Config, name: str) -> None:
    """Switch a job on; it follows its schedule from now on.

    \b
    Example:   postroom jobs enable session-cleanup
    """
    job = _named(config, lambda operations: operations.switch_job(name, True, actor=actor()))
    click.echo(f"{job} is on")


@jobs.command()
@click.argument("name")
@with_config
def disable(config: Config, name: str) -> None:
    """Switch a job off. It is still done when somebody asks for it.

    \b
    Example:   postroom jobs disable process-dlq-entries
    """
    job = _named(config, lambda operations: operations.switch_job(name, False, actor=actor()))
    click.echo(f"{job} is off")


@jobs.command()
@click.argument("name")
@click.argument("expression")
@with_config
def schedule(config: Config, name: str, expression: str) -> None:
    """Give a job another schedule: a cron expression of five fields, in UTC.

    \b
    Example:   postroom jobs schedule session-cleanup "30 3 * * *"
    """
    try:
        due = next_time(expression, utc_now())
    except ValueError as error:
        raise click.UsageError(str(error)) from None

    async def work(operations: Operations) -> str:
        if any(job["name"] == name and job["job"] == _FIXED for job in await operations.jobs()):
            raise Failure(f"{name} runs when a dead letter is due, and at least every five minutes")
        return await operations.schedule_job(name, expression, actor=actor())

    job = _named(config, work)
    click.echo(f"{job} is next due at {_time(due)}")


@jobs.command("drop-cron-views")
@with_config
def drop_cron_views(config: Config) -> None:
    """Remove the views cron.job and cron.job_run_details, for who installs pg_cron itself.

    \b
    Example:   postroom jobs drop-cron-views
    """
    dropped = operate(config, lambda operations: operations.drop_cron_views())
    click.echo("removed" if dropped else "there are none of Postroom's")


@click.group()
def settings() -> None:
    """What may be changed while routers run.

    \b
    Example:   postroom settings list
    """


@settings.command("list")
@with_config
@json_option
def list_settings(config: Config, as_json: bool) -> None:
    """List the settings, with the bounds of each.

    \b
    Example:   postroom settings list
    """
    found = operate(config, lambda operations: operations.settings())
    if as_json:
        print_json(found)
        return
    for one in found:
        click.echo(f"{one['name']} = {one['value']}  ({one['minimum']} to {one['maximum']})")
        click.echo(f"  {one['description']}")


@settings.command("set")
@click.argument("name")
@click.argument("value", type=int)
@with_config
def change_setting(config: Config, name: str, value: int) -> None:
    """Change one; the next run of a job that reads it goes by it.

    \b
    Example:   postroom settings set run_log_days 90
    """

    async def work(operations: Operations) -> None:
        known = {one["name"]: one for one in await operations.settings()}
        if name not in known:
            raise click.UsageError(f"no setting {name!r}; there are: {', '.join(known)}")
        low, high = known[name]["minimum"], known[name]["maximum"]
        if not low <= value <= high:
            raise click.UsageError(f"{name} is a whole number from {low} to {high}")
        await operations.change_setting(name, value, actor=actor())

    operate(config, work)
    click.echo(f"{name} = {value}")


def _named(config: Config, work: Callable[[Operations], Awaitable[Any]]) -> Any:
    """For what takes the name of a job."""

    async def run(operations: Operations) -> Any:
        from router.operations import UnknownJob

        try:
            return await work(operations)
        except UnknownJob as error:
            known = ", ".join(job["name"] for job in await operations.jobs())
            raise Failure(f"no job {str(error)!r}; there are: {known}") from None

    return operate(config, run)


def _time(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S}"
