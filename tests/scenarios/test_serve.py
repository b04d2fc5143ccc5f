"""`postroom serve` from start to end, and the commands beside it, as a user types them."""

# ruff: noqa: ASYNC110 - processes send no events

from __future__ import annotations

import json
import re
import signal
import socket
import urllib.parse
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import scenarios_kit as kit
import trio
from click import Command, Group
from scenarios_kit import Plan, RouterProcess, open_services

from router.cli import main
from router.simulator import WebhookClient, signature

pytestmark = pytest.mark.postgres


async def test_from_ready_line_to_drained_exit(home: Path) -> None:
    async with open_services() as services:
        services.plan = lambda sight: Plan(delay=0.3)
        config = kit.write_config(home, services)
        async with kit.serving(home, "--data-dir", home / "data", "--config", config) as router:
            [line] = router.output.splitlines()
            assert re.fullmatch(
                r"ready webhook=http://127\.0\.0\.1:\d+/webhooks/whatsapp admin=http://127\.0\.0\.1:\d+ "
                rf"data={re.escape(str(home / 'data'))}",
                line,
            )
            assert (await kit.get(f"{router.admin}/health/ready"))[0] == 200
            assert (await kit.get(f"{router.admin}/health/live"))[0] == 200
            status, body = await kit.get(f"{router.admin}/health")
            assert status == 200
            assert json.loads(body)["components"]["database"]["status"] == "healthy"

            handshake = {"hub.mode": "subscribe", "hub.challenge": "42", "hub.verify_token": kit.VERIFY_TOKEN}
            assert await kit.get(f"{router.webhook}?{urllib.parse.urlencode(handshake)}") == (200, b"42")

            client = WebhookClient(router.webhook, kit.SECRET)
            answer = await client.post(kit.body_of(kit.new_message("taxi")))
            assert (answer.status, answer.body) == (200, b'{"status":"accepted"}')
            assert float(answer.headers["x-wa-core-latency"]) > 0
            forged = await client.post(b"{}", headers=[("X-Hub-Signature-256", signature("wrong", b"{}"))])
            assert forged.status == 401
            client.close()
            assert await router.stop() == 0
    # The delivery that ran was waited for.
    checked = await kit.postroom("check", "--json", "--data-dir", home / "data", cwd=home)
    assert json.loads(checked.stdout)["places"]["delivered"] == 1


async def test_requests_in_flight_at_sigterm_are_answered_and_readiness_ends(home: Path) -> None:
    body = kit.body_of(kit.new_message("taxi"))
    async with AsyncExitStack() as stack, open_services() as services:
        config = kit.write_config(home, services)
        async with kit.serving(home, "--data-dir", home / "data", "--config", config) as router:
            place = urllib.parse.urlsplit(router.webhook)
            admin = urllib.parse.urlsplit(router.admin)
            begun, watching = [
                await stack.enter_async_context(await trio.open_tcp_stream(at.hostname or "", at.port or 0))
                for at in (place, admin)
            ]
            head = (
                f"POST {place.path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
                f"X-Hub-Signature-256: {signature(kit.SECRET, body)}\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            await begun.send_all(head.encode() + body[:100])
            assert await status_over(watching) == 200
            router.signal(signal.SIGTERM)
            with trio.fail_after(kit.HANGS):
                while await accepts(place.hostname or "", place.port or 0):
                    await trio.sleep(0.01)
            assert await status_over(watching) == 503
            await begun.send_all(body[100:])
            answer = b""
            while chunk := await begun.receive_some():
                answer += chunk
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert answer.endswith(b'{"status":"accepted"}')
            assert await router.exit_code() == 0
    checked = await kit.postroom("check", "--json", "--data-dir", home / "data", cwd=home)
    assert json.loads(checked.stdout)["received"] == 1


async def status_over(stream: trio.SocketStream) -> int:
    """Ask for readiness over a connection that stays open."""
    await stream.send_all(b"GET /health/ready HTTP/1.1\r\nHost: admin\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}\n"):
        chunk = await stream.receive_some()
        assert chunk, f"closed after {answer!r}"
        answer += chunk
    return int(answer.split(b" ")[1])


async def accepts(host: str, port: int) -> bool:
    try:
        stream = await trio.open_tcp_stream(host, port)
    except OSError:
        return False
    await stream.aclose()
    return True


async def test_without_secrets_it_lists_all_that_is_missing(home: Path) -> None:
    env = {n: v for n, v in kit.environment(WA_ROUTER_TIMEOUT_MS="soon").items() if "WHATSAPP" not in n}
    ended = await kit.postroom("serve", "--data-dir", home / "data", cwd=home, env=env)
    assert ended.returncode == 2
    said = ended.stderr.decode()
    for name in ("WHATSAPP_APP_SECRET", "WHATSAPP_VERIFY_TOKEN", "WA_ROUTER_TIMEOUT_MS"):
        assert re.search(rf"^ *{name}: .*; fix: ", said, re.M), said
    assert ended.stdout == b""


@pytest.mark.parametrize("option", ["--port", "--admin-port"])
async def test_a_port_that_is_taken(home: Path, option: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        arguments = ("--host", "127.0.0.1", "--data-dir", home / "data", option, port)
        router = RouterProcess(home, *arguments)
        try:
            assert await router.exit_code() == 1
            assert f"cannot listen on 127.0.0.1:{port}" in router.errors
            assert option in router.errors
            assert "Traceback" not in router.errors
        finally:
            router.end()


async def test_dev_makes_up_secrets_listens_on_loopback_and_answers_for_every_domain(home: Path) -> None:
    env = {name: value for name, value in kit.environment().items() if "WHATSAPP" not in name}
    async with kit.serving(home, "--dev", "--data-dir", home / "data", env=env) as router:
        assert router.webhook.startswith("http://127.0.0.1:")
        made = dict(re.findall(r"^(WHATSAPP_\w+)=(\S+)", router.errors, re.M))
        assert set(made) == {"WHATSAPP_APP_SECRET", "WHATSAPP_VERIFY_TOKEN"}
        common = ("--url", router.webhook, "--data-dir", home / "data", "--json")
        sent = await kit.postroom("send", "--text", "taxi", *common, cwd=home, env=env | made)
        assert sent.returncode == 0, sent.stderr
        became = json.loads(sent.stdout)
        assert (became["answered"], became["place"], became["service"]) == (200, "delivered", "rides")
        assert became["rule"] == "keyword"
        menu = await kit.postroom("send", "--text", "hello?", *common, cwd=home, env=env | made)
        assert json.loads(menu.stdout)["place"] in ("handled", "delivered")
        assert await router.stop() == 0


async def test_the_commands_beside_a_running_server(home: Path) -> None:
    common = ("--data-dir", home / "data")
    async with open_services() as services:
        config = kit.write_config(home, services)
        async with kit.serving(home, *common, "--config", config) as router:
            where = ("--url", router.webhook, *common)
            sent = await kit.postroom("send", "--text", "taxi", *where, cwd=home)
            assert sent.returncode == 0, sent.stderr
            assert re.search(r"^place +delivered$", sent.stdout.decode(), re.M)
            assert re.search(r"^service +rides$", sent.stdout.decode(), re.M)

            dsn = await kit.postroom("dsn", *common, cwd=home)
            address = dsn.stdout.decode().strip()
            assert await kit.Database(address).value("SELECT count(*) FROM whatsapp_messages") == 1

            statement = ("--", "-XAtc", "SELECT place FROM whatsapp_messages")
            psql = await kit.postroom("psql", *common, *statement, cwd=home)
            assert (psql.returncode, psql.stdout.strip()) == (0, b"delivered"), psql.stderr

            migrate = await kit.postroom("migrate", "--json", *common, cwd=home)
            assert json.loads(migrate.stdout) == {"applied": []}

            check = await kit.postroom("check", *common, cwd=home)
            assert check.returncode == 0
            assert check.stdout.decode().splitlines()[-1] == "conservation: ok"
            counted = json.loads((await kit.postroom("check", "--json", *common, cwd=home)).stdout)
            assert (counted["conservation"], counted["places"]["delivered"]) == ("ok", 1)

            letters = await kit.postroom("dlq", "list", "--json", *common, cwd=home)
            assert json.loads(letters.stdout) == []
            assert await router.stop() == 0
    assert kit.postmaster_of(home / "data") is None, "the last one to leave stops Postgres"


async def test_check_finds_a_row_that_is_gone(home: Path) -> None:
    async with open_services() as services:
        config = kit.write_config(home, services)
        async with kit.serving(home, "--data-dir", home / "data", "--config", config) as router:
            database = kit.Database.of(home / "data")
            for _ in range(3):
                assert await kit.post(router.webhook, kit.body_of(kit.new_message("taxi"))) == 200
            await database.until(lambda count: count == 0)
            await database.value("DELETE FROM whatsapp_messages_items WHERE seq = 2")
            check = await kit.postroom("check", "--data-dir", home / "data", cwd=home)
            assert check.returncode == 1
            assert b"item 2 is missing" in check.stdout
            assert check.stdout.decode().splitlines()[-1] == "conservation: broken"
            assert await router.stop() == 0


@pytest.mark.parametrize(
    ("text", "active", "domain", "rule"),
    [
        ("Menu", None, None, "menu"),
        ("home", "rides", None, "home"),
        ("exit", "rides", None, "exit"),
        ("taxi", None, "rides", "keyword"),
        ("how long?", "insurance", "insurance", "active_service"),
        ("I need a taxi now", None, "rides", "keyword"),
        ("hello", None, None, "fallback"),
    ],
)
async def test_explain(home: Path, text: str, active: str | None, domain: str | None, rule: str) -> None:
    more = ("--active-service", active) if active else ()
    explained = await kit.postroom("explain", "--text", text, *more, cwd=home)
    said = json.loads(explained.stdout)
    assert (said["domain"], said["rule"]) == (domain, rule)
    assert said["reason"]


async def test_explain_reads_a_body(home: Path) -> None:
    body = kit.body_of(kit.new_message("taxi"), kit.new_message("insurance"))
    explained = await kit.postroom("explain", cwd=home, stdin=body)
    decisions = [json.loads(line) for line in explained.stdout.splitlines()]
    assert [decision["domain"] for decision in decisions] == ["rides", "insurance"]


def commands(group: Group, names: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Command]]:
    found: list[tuple[tuple[str, ...], Command]] = []
    for name, one in group.commands.items():
        found += commands(one, (*names, name)) if isinstance(one, Group) else [((*names, name), one)]
    return found


@pytest.mark.parametrize(("names", "one"), commands(main), ids=lambda value: str(value))
def test_every_command_has_help_with_an_example(names: tuple[str, ...], one: Command) -> None:
    from click.testing import CliRunner

    shown = CliRunner().invoke(main, [*names, "--help"])
    assert shown.exit_code == 0
    assert re.search(rf"Example: +(?:\S+ \")?.*postroom {' '.join(names)}\b", shown.output), shown.output
