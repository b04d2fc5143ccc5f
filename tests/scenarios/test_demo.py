"""The demo's verdict, and that it does not say ok when something is missing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from random import Random

import asyncpg
import pytest
import scenarios_kit as kit
from click.testing import CliRunner

from actors.messages import Ack, Envelope, Outcome
from router import demo
from router.cli import main
from router.delivery.in_process import HandlerFunction
from router.simulator import Ledger

pytestmark = pytest.mark.postgres

run_demo = partial(demo.run_demo, seconds=3, rate=100, phones=50, seed=7, live=False)


async def test_the_phones_and_the_router_agree(home: Path) -> None:
    summary = await run_demo(data_dir=home / "data")
    assert summary.ok, summary.problems()
    assert summary.report.received > 100
    assert summary.report.duplicates > 0
    assert set(summary.report.delivered) == {"rides", "insurance"}
    assert summary.report.replies == sum(summary.report.delivered.values())
    assert "conservation: ok" in summary.text()


async def delete_one_row(dsn: str) -> None:
    async def delete(connection: asyncpg.Connection) -> None:
        status = await connection.execute(
            "DELETE FROM whatsapp_messages_items WHERE seq = "
            "(SELECT seq FROM message_outcomes WHERE outcome = 'delivered' ORDER BY seq LIMIT 1)"
        )
        assert status == "DELETE 1"

    await kit.Database(dsn).run(delete)


async def test_a_stored_row_that_was_deleted_is_missed(home: Path) -> None:
    summary = await run_demo(data_dir=home / "data", before_verdict=delete_one_row)
    assert not summary.ok
    assert any("is not stored" in problem for problem in summary.report.problems)
    assert any("is missing" in problem for problem in summary.conservation.problems)


def forgetful_services(ledger: Ledger, rng: Random) -> Mapping[str, HandlerFunction]:
    """The demo's, but rides never hears of one message that the router delivers to it."""
    services = demo.demo_services(ledger, rng)
    rides = services["rides"]
    suppressed: list[str] = []

    async def handle(envelope: Envelope) -> Outcome:
        if not suppressed:
            suppressed.append(envelope.id)
            return Ack()
        return await rides(envelope)

    return services | {"rides": handle}


async def test_a_delivery_that_was_suppressed_is_missed(home: Path) -> None:
    summary = await run_demo(data_dir=home / "data", services=forgetful_services)
    assert not summary.ok
    assert summary.conservation.ok
    assert any("neither taken by rides nor a dead letter" in problem for problem in summary.report.problems)


def mute_services(ledger: Ledger, rng: Random) -> Mapping[str, HandlerFunction]:
    """The demo's, but one reply of rides is withheld from the router."""
    services = demo.demo_services(ledger, rng)
    rides = services["rides"]
    withheld: list[str] = []

    async def handle(envelope: Envelope) -> Outcome:
        outcome = await rides(envelope)
        if not withheld:
            withheld.append(envelope.id)
            return Ack()
        return outcome

    return services | {"rides": handle}


async def test_a_reply_that_is_not_sent_is_missed(home: Path) -> None:
    summary = await run_demo(data_dir=home / "data", services=mute_services)
    assert summary.conservation.ok
    [problem] = summary.report.problems
    assert "was given by its service but never sent" in problem


@pytest.mark.parametrize(
    ("fault", "status"),
    [({}, 0), ({"before_verdict": delete_one_row}, 1), ({"services": forgetful_services}, 1)],
)
def test_the_exit_status_is_the_verdict(
    home: Path, monkeypatch: pytest.MonkeyPatch, fault: dict[str, object], status: int
) -> None:
    monkeypatch.setattr(demo, "run_demo", partial(demo.run_demo, **fault))
    arguments = ["demo", "--seconds", "2", "--rate", "100", "--data-dir", str(home / "data"), "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == status, result.output
    summary = json.loads(result.stdout)
    assert summary["conservation"] == ("ok" if status == 0 else "broken")
