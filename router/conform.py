"""`postroom conformance`: tries out a service, without a router."""

from __future__ import annotations

import os
from typing import Any

import click

from router.command import json_option, print_json, run_command

_MARKS = {"pass": "ok  ", "warn": "warn", "fail": "FAIL"}


@click.command()
@click.argument("url")
@click.option(
    "--secret-env",
    default="SERVICE_SECRET",
    show_default=True,
    help="The environment variable with the whsec_ secret that the service verifies with.",
)
@click.option("--unsigned", is_flag=True, help="The service verifies no signature.")
@click.option("--domain", default="rides", show_default=True, help="The domain of the deliveries.")
@click.option(
    "--timeout-ms", type=click.IntRange(50, 120_000), default=4_000, show_default=True, help="For one answer."
)
@json_option
def conformance(
    url: str, secret_env: str, unsigned: bool, domain: str, timeout_ms: int, as_json: bool
) -> None:
    """Play good, duplicate, forged, late, hostile and huge deliveries against a service of yours.

    Exit status 1: something has to be mended. Give it a service of your own that is not in use.

    \b
    Example:   SERVICE_SECRET=whsec_... postroom conformance http://127.0.0.1:9001/messages
    """
    from router.config_rules import secret_problem, url_problem
    from router.conformance import Finding, play

    if (wrong := url_problem(url)) is not None:
        raise click.UsageError(f"URL {wrong[0]}; {wrong[1]}")
    secret = None if unsigned else os.environ.get(secret_env, "")
    if secret is not None and (said := secret_problem(secret)) is not None:
        raise click.UsageError(f"{secret_env} {said}; set it, or say --unsigned")

    def say(finding: Finding) -> None:
        if not as_json:
            detail = f": {finding.detail}" if finding.detail else ""
            click.echo(f"{_MARKS[finding.verdict]}  {finding.check}{detail}")

    async def work() -> Any:
        return await play(url, secret=secret, domain=domain, timeout=timeout_ms / 1000, on_finding=say)

    report = run_command(work)
    if as_json:
        print_json(report.as_dict())
    else:
        failed = sum(one.verdict == "fail" for one in report.findings)
        warned = sum(one.verdict == "warn" for one in report.findings)
        click.echo(f"{len(report.findings)} checks, {failed} failed, {warned} warning(s)")
    raise SystemExit(0 if report.ok else 1)
