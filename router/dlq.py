"""`postroom dlq`: what operators do with dead letters. Chooses them, shows them, and hands them over a page
at a time; what an act does stands in router.operations.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import IO, TYPE_CHECKING, Any

import click

from router.command import (
    F,
    Failure,
    actor,
    age,
    json_option,
    operate,
    print_json,
    printable,
    say,
    with_config,
)
from router.config import Config
from router.observe.masking import mask_text

if TYPE_CHECKING:
    from router.operations import Letters, Operations

PAGE = 50  # letters in one statement of a bulk act


def _filters(function: F) -> F:
    for option in (
        click.option("--older-than", callback=age, metavar="AGE", help="Dead for longer: 30m, 12h, 7d."),
        click.option(
            "--session", callback=printable, help="Only those of one conversation (its session_key)."
        ),
        click.option(
            "--resolution",
            type=click.Choice(
                ["deferred", "exhausted", "rejected", "discarded", "no_service", "reprocessed"]
            ),
        ),
        click.option("--status", type=click.Choice(["pending", "processing", "reprocessed", "failed"])),
        click.option("--service", callback=printable, help="Only those of one service."),
    ):
        function = option(function)
    return function


def _bulk(function: F) -> F:
    for option in (
        click.option("--rate", type=click.FloatRange(min=0.1), help="Letters a second, at most."),
        click.option("--dry-run", is_flag=True, help="Only say how many it would be."),
        click.option("--all", "everything", is_flag=True, help="All that the filters leave, instead of ids."),
    ):
        function = option(function)
    return click.argument("ids", nargs=-1, type=click.UUID)(function)


def _which(ids: Sequence[uuid.UUID], chosen: dict[str, Any], limit: int | None = None) -> Letters:
    from router.operations import Letters

    older_than: timedelta | None = chosen["older_than"]
    try:
        before = None if older_than is None else datetime.now(UTC) - older_than
    except OverflowError:
        raise click.UsageError("--older-than: that is before the calendar begins") from None
    return Letters(
        ids=tuple(ids) or None,
        service=chosen["service"],
        status=chosen["status"],
        resolution=chosen["resolution"],
        session=chosen["session"],
        created_before=before,
        limit=limit,
    )


@click.group()
def dlq() -> None:
    """Dead letters: what could not be delivered.

    \b
    Example:   postroom dlq list
    """


@dlq.command("list")
@_filters
@click.option("--limit", type=click.IntRange(1, 100_000), default=50, show_default=True)
@json_option
@with_config
def list_letters(config: Config, limit: int, as_json: bool, **chosen: Any) -> None:
    """List dead letters, oldest message first.

    \b
    Example:   postroom dlq list --status pending --service rides
    """
    letters = operate(config, lambda o: o.dead_letters(_which((), chosen, limit)))
    if as_json:
        print_json([{key: value for key, value in one.items() if key != "payload"} for one in letters])
        return
    for letter in letters:
        click.echo(
            f"{letter['id']}  {letter['status']:<11} {letter['resolution'] or '-':<11} "
            f"{letter['service']:<12} retries={letter['retry_count']} "
            f"attempts={letter['attempts']} since={letter['created_at']:%Y-%m-%d %H:%M:%S} "
            f"{letter['error_message']}"
        )
    click.echo(f"{len(letters)} dead letter(s)")


@dlq.command("show")
@click.argument("identity", metavar="ID", type=click.UUID)
@json_option
@with_config
def show(config: Config, identity: uuid.UUID, as_json: bool) -> None:
    """Show one dead letter, with its message.

    \b
    Example:   postroom dlq show 5f0c7d4e-0000-4000-8000-000000000001
    """
    letter = _one(config, identity)
    if as_json:
        print_json(letter)
        return
    for name, value in letter.items():
        if name != "payload":
            click.echo(f"{name:<15} {'-' if value is None else value}")
    click.echo(json.dumps(letter["payload"], indent=2, ensure_ascii=False))


@dlq.command("retry")
@_bulk
@_filters
@json_option
@with_config
def retry(config: Config, as_json: bool, **asked: Any) -> None:
    """Have dead letters delivered again now, by the running router or by the next one that starts.

    \b
    Example:   postroom dlq retry --all --service rides --rate 20
    """
    _act(config, "retried", as_json, asked, lambda o, ids: o.retry(ids, actor=actor()))


@dlq.command("discard")
@_bulk
@_filters
@click.option(
    "--reason", required=True, callback=printable, help="Why; it stands in the audit log. No personal data."
)
@json_option
@with_config
def discard(config: Config, as_json: bool, reason: str, **asked: Any) -> None:
    """Give dead letters up for good: they are listed as discarded, and never delivered.

    \b
    Example:   postroom dlq discard --all --resolution exhausted --older-than 7d --reason "campaign is over"
    """
    _act(
        config,
        "discarded",
        as_json,
        asked,
        lambda o, ids: o.discard(ids, reason=mask_text(reason), actor=actor()),
    )


@dlq.command("edit")
@click.argument("identity", metavar="ID", type=click.UUID)
@click.option(
    "--message",
    "source",
    type=click.File("r", encoding="utf-8-sig"),
    help="File with the new message as JSON, - for standard input. Without it $EDITOR opens.",
)
@with_config
def edit(config: Config, identity: uuid.UUID, source: IO[str] | None) -> None:
    """Change the message of a dead letter and have it delivered now, under a new idempotency key.

    \b
    Example:   postroom dlq edit 5f0c7d4e-0000-4000-8000-000000000001 --message message.json
    """
    letter = _one(config, identity)
    if source is not None:
        try:
            text = source.read()
        except UnicodeDecodeError:
            raise Failure("the message is not UTF-8") from None
    else:
        before = json.dumps(letter["payload"], indent=2, ensure_ascii=False)
        text = click.edit(before, extension=".json") or before
    message = _message(text, "the message")
    if message == letter["payload"]:
        click.echo("nothing was changed")
        return
    number = operate(config, lambda o: o.edit(identity, message, actor=actor()))
    if number is None:
        raise Failure(f"{identity} is {letter['status']} and cannot be edited")
    click.echo(f"edit {number} of {identity} is to be delivered")


@dlq.command("export")
@_filters
@click.option(
    "--output",
    type=click.File("w", encoding="utf-8", lazy=False),
    default="-",
    help="File [standard output].",
)
@with_config
def export(config: Config, output: IO[str], **chosen: Any) -> None:
    """Write dead letters as JSON Lines, one letter a line, with their messages.

    \b
    Example:   postroom dlq export --service rides --output letters.jsonl
    """
    letters = operate(config, lambda o: o.dead_letters(_which((), chosen)))
    for letter in letters:
        output.write(json.dumps(letter, default=str, ensure_ascii=False) + "\n")
    say(f"{len(letters)} dead letter(s) exported")


@dlq.command("import")
@click.argument("source", metavar="FILE", type=click.File("r", encoding="utf-8-sig"))
@click.option("--dry-run", is_flag=True, help="Only say how many it would be.")
@click.option("--rate", type=click.FloatRange(min=0.1), help="Letters a second, at most.")
@json_option
@with_config
def import_letters(config: Config, source: IO[str], dry_run: bool, rate: float | None, as_json: bool) -> None:
    """Apply an exported file: each letter whose message was changed in it is edited and delivered again.

    Letters that are as they were are left alone, so that a second import of the same file does nothing.

    \b
    Example:   postroom dlq import letters.jsonl
    """
    wanted = dict(_imported(source))

    async def work(operations: Operations) -> dict[str, int]:
        from router.operations import Letters

        counts = {"edited": 0, "unchanged": 0, "refused": 0, "unknown": 0}
        pace = _Pace(rate)
        for page in _pages(list(wanted)):
            found = {one["id"]: one for one in await operations.dead_letters(Letters(ids=page))}
            possible = set(await operations.choose(Letters(ids=page)))
            for identity in page:
                if identity not in found:
                    counts["unknown"] += 1
                elif found[identity]["payload"] == wanted[identity]:
                    counts["unchanged"] += 1
                elif dry_run:
                    counts["edited" if identity in possible else "refused"] += 1
                else:
                    await pace.wait(1)
                    number = await operations.edit(identity, wanted[identity], actor=actor())
                    counts["refused" if number is None else "edited"] += 1
        return counts

    counts = operate(config, work)
    if as_json:
        print_json(counts)
    else:
        click.echo(", ".join(f"{count} {name}" for name, count in counts.items()))
    if counts["refused"] or counts["unknown"]:
        raise Failure("some are not there, or are done or being processed")


def _act(
    config: Config,
    done: str,
    as_json: bool,
    asked: dict[str, Any],
    act: Callable[[Operations, Sequence[uuid.UUID]], Awaitable[int]],
) -> None:
    """`act` on all that was asked for, a page at a time, no faster than `--rate`."""
    ids: tuple[uuid.UUID, ...] = asked.pop("ids")
    if bool(ids) == asked.pop("everything"):
        raise click.UsageError("name the ids, or say --all")
    rate, dry_run = asked.pop("rate"), asked.pop("dry_run")

    async def work(operations: Operations) -> tuple[int, int]:
        chosen = await operations.choose(_which(ids, asked))
        if dry_run:
            return len(chosen), 0
        count, pace = 0, _Pace(rate)
        hidden = not sys.stderr.isatty()
        with click.progressbar(length=len(chosen), label=done, file=sys.stderr, hidden=hidden) as bar:
            for page in _pages(chosen, 1 if rate is not None and rate < PAGE else PAGE):
                await pace.wait(len(page))
                count += await act(operations, page)
                bar.update(len(page))
        return len(chosen), count

    chosen, count = operate(config, work)
    if as_json:
        print_json({"chosen": chosen, done: count})
    elif dry_run:
        click.echo(f"{chosen} would be {done}")
    else:
        click.echo(
            f"{count} of {chosen} {done}" if done == "discarded" else f"{count} of {chosen} to be {done}"
        )
    missing = len(set(ids)) - (chosen if dry_run else count)
    if ids and missing:
        raise Failure(f"{missing} of {len(set(ids))} are not there, or are done or being processed")


class _Pace:
    """Lets `rate` letters a second go on; None: all of them."""

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        self._free_at = time.monotonic()

    async def wait(self, letters: int) -> None:
        import trio

        if self._rate is None:
            return
        now = time.monotonic()
        await trio.sleep(max(0.0, self._free_at - now))
        self._free_at = max(self._free_at, now) + letters / self._rate


def _pages(ids: Sequence[uuid.UUID], size: int = PAGE) -> Iterator[tuple[uuid.UUID, ...]]:
    for start in range(0, len(ids), size):
        yield tuple(ids[start : start + size])


def _one(config: Config, identity: uuid.UUID) -> dict[str, Any]:
    from router.operations import Letters

    found: list[dict[str, Any]] = operate(config, lambda o: o.dead_letters(Letters(ids=(identity,))))
    if not found:
        raise Failure(f"there is no dead letter {identity}")
    return found[0]


def _message(text: str, where: str) -> dict[str, Any]:
    from router.operations import as_stored

    try:
        message = as_stored(text)
    except ValueError as error:
        raise Failure(f"{where} cannot be taken: {error}") from None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise Failure(f'{where} is not a message: give an object with its "type", as Meta sends it')
    return message


def _imported(source: IO[str]) -> Iterator[tuple[uuid.UUID, dict[str, Any]]]:
    try:
        for number, line in enumerate(source, 1):
            if not line.strip():
                continue
            where = f"line {number}"
            try:
                letter = json.loads(line)
                identity = uuid.UUID(letter["id"])
                payload = letter["payload"]
            except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
                raise Failure(
                    f'{where} is not a dead letter: it needs "id" and "payload", as exported'
                ) from None
            yield identity, _message(json.dumps(payload), where)
    except UnicodeDecodeError:
        raise Failure("the file is not UTF-8") from None
