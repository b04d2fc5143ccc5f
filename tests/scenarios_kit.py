"""What the scenario tests share: a router process, the services that it delivers to, its database, a load of
phones, and the verdict over all of them. Nothing here is told by the router how things went.
"""

# ruff: noqa: ASYNC110 - processes and tables send no events, so they are asked again

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import asyncpg
import trio

from router.conservation import Conservation, recount
from router.postgres.embedded import EmbeddedPostgres
from router.postgres.postmaster import find_postmaster
from router.simulator import Faults, Ledger, Population, Report, WebhookClient, payloads, run_traffic
from router.simulator.deliveries import PLAIN, Manner

SECRET = "0123456789abcdef0123456789abcdef"
VERIFY_TOKEN = "scenario"
NUMBERS = ("100000000000001", "100000000000002", "100000000000003")
TEXTS = {
    "rides": ("taxi", "a ride to the airport", "moto please"),
    "insurance": ("insurance", "my claim", "assurance auto"),
}
HANGS = 90.0
"""Seconds after which a test that waits for something is given up. Nothing is measured with it."""


def say(line: str) -> None:
    """For who runs the tests with -s: what a round was worth."""
    sys.stdout.write(f"{line}\n")


# Homes


@contextmanager
def new_home() -> Iterator[Path]:
    """A directory that an unprivileged Postgres can reach; its processes end and it goes with the block."""
    home = Path(tempfile.mkdtemp(prefix="postroom-scenario-", dir="/tmp"))
    home.chmod(0o755)
    try:
        yield home
    finally:
        kill_processes_of(home)
        for record in home.rglob("socket_dir"):
            shutil.rmtree(record.read_text().strip(), ignore_errors=True)
        shutil.rmtree(home, ignore_errors=True)


def processes_of(home: Path) -> list[int]:
    """Living processes that work in `home` or name it on their command line."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and int(process.name) != os.getpid():
            with suppress(OSError):
                command = (process / "cmdline").read_bytes().decode(errors="replace")
                working = Path(os.readlink(process / "cwd"))
                if f"{home}" in command or working.is_relative_to(home):
                    found.append(int(process.name))
    return found


def kill_processes_of(home: Path) -> None:
    for _ in range(200):
        left = processes_of(home)
        if not left:
            return
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def postmaster_of(data_dir: Path) -> int | None:
    found = find_postmaster(data_dir / "pgdata")
    return None if found is None else found.pid


# Processes


def environment(**given: str) -> dict[str, str]:
    """Ours, without anything that configures a router, and with the secrets of these tests."""
    ours = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("WHATSAPP_", "WA_", "PG"))
        and name not in ("DATABASE_URL", "SESSION_TTL_HOURS")
    }
    secrets = {"WHATSAPP_APP_SECRET": SECRET, "WHATSAPP_VERIFY_TOKEN": VERIFY_TOKEN}
    return {**ours, **secrets, **given}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "router", *map(str, arguments)]


async def postroom(
    *arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None, stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """Run one `postroom` command to its end."""
    with trio.fail_after(HANGS):
        return await trio.run_process(
            command(*arguments),
            stdin=stdin,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            cwd=cwd,
            env=dict(environment() if env is None else env),
        )


class RouterProcess:
    """One `postroom serve`. Its output goes to files, so that a full pipe can never stop it."""

    def __init__(self, home: Path, *arguments: str | Path, env: Mapping[str, str] | None = None) -> None:
        self.home = home
        self.webhook = self.admin = ""
        name = f"serve-{len(list(home.glob('serve-*.out'))):03}"
        self._out, self._err = home / f"{name}.out", home / f"{name}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                command("serve", "--port", "0", "--admin-port", "0", *arguments),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=home,
                env=dict(environment() if env is None else env),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def errors(self) -> str:
        return self._err.read_text(errors="replace")

    @property
    def output(self) -> str:
        return self._out.read_text(errors="replace")

    async def ready(self) -> RouterProcess:
        """Wait for the ready line, as long as the process lives."""
        with trio.fail_after(HANGS):
            while (found := re.search(r"^ready webhook=(\S+) admin=(\S+) data=", self.output, re.M)) is None:
                assert self._process.poll() is None, f"ended before it was ready:\n{self.errors}"
                await trio.sleep(0.01)
        self.webhook, self.admin = found.groups()
        return self

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def exit_code(self) -> int:
        with trio.fail_after(HANGS):
            while self._process.poll() is None:
                await trio.sleep(0.01)
        return self._process.wait()

    async def kill(self) -> None:
        """SIGKILL; returns when the process is gone."""
        self.signal(signal.SIGKILL)
        await self.exit_code()

    async def stop(self) -> int:
        """SIGTERM; its exit code."""
        self.signal(signal.SIGTERM)
        return await self.exit_code()

    def end(self) -> None:
        """Whatever state it is in, a stopped one included: gone."""
        self._process.kill()
        self._process.wait()

    def rss(self) -> int:
        """Resident bytes."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@asynccontextmanager
async def serving(
    home: Path, *arguments: str | Path, env: Mapping[str, str] | None = None
) -> AsyncIterator[RouterProcess]:
    """A ready router, killed at the end if it still runs."""
    process = RouterProcess(home, *arguments, env=env)
    try:
        yield await process.ready()
    finally:
        process.end()


async def get(url: str) -> tuple[int, bytes]:
    def request() -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(url, timeout=20) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    return await trio.to_thread.run_sync(request)


# The database


class Database:
    """Asked over a connection of its own each time, so it minds no restart of the server."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn

    @classmethod
    def of(cls, data_dir: Path) -> Database:
        return cls(EmbeddedPostgres(data_dir).dsn())

    async def run(self, work: Callable[[asyncpg.Connection], Awaitable[Any]]) -> Any:
        async def connected() -> Any:
            give_up = time.monotonic() + HANGS
            while True:
                try:
                    connection = await asyncpg.connect(self.dsn, timeout=20)
                    break
                # It recovers from what the test did to it, or is not there yet again.
                except (asyncpg.CannotConnectNowError, ConnectionRefusedError, FileNotFoundError):
                    if time.monotonic() > give_up:
                        raise
                    await asyncio.sleep(0.05)
            try:
                return await work(connection)
            finally:
                await connection.close()

        return await trio.to_thread.run_sync(lambda: asyncio.run(connected()))

    async def fetch(self, statement: str, *arguments: Any) -> list[Any]:
        rows: list[Any] = await self.run(lambda connection: connection.fetch(statement, *arguments))
        return rows

    async def value(self, statement: str, *arguments: Any) -> Any:
        return await self.run(lambda connection: connection.fetchval(statement, *arguments))

    async def recount(self) -> Conservation:
        counted: Conservation = await self.run(recount)
        return counted

    async def unfinished(self) -> int:
        """Counted from the tables: items that a session takes and that have no outcome."""
        count: int = await self.value(
            "SELECT count(*) FROM whatsapp_messages_items i WHERE i.bucket IS NULL AND NOT EXISTS "
            "(SELECT FROM message_outcomes o WHERE o.seq = i.seq AND o.received_at = i.received_at)"
        )
        return count

    async def until(self, holds: Callable[[int], bool]) -> int:
        """Wait until the count of unfinished items is as wanted; returns it."""
        with trio.fail_after(HANGS):
            while not holds(count := await self.unfinished()):
                await trio.sleep(0.05)
        return count


# Services


@dataclass(frozen=True)
class Sight:
    """One attempt as the service saw it. `at` is trio's clock."""

    domain: str
    at: float
    headers: Mapping[str, str]
    body: Mapping[str, Any]

    @property
    def key(self) -> str:
        return str(self.body["id"])

    @property
    def message_id(self) -> str:
        return str(self.body["message_id"])

    @property
    def text(self) -> str:
        return payloads.text_of(self.body["message"])


@dataclass(frozen=True)
class Plan:
    """What the service does with an attempt: wait, then answer, or never answer."""

    status: int = 200
    delay: float = 0.0
    hang: bool = False
    answer: bytes = b"{}"
    retry_after: int | None = None  # seconds

    @property
    def accepts(self) -> bool:
        return not self.hang and 200 <= self.status < 300


@dataclass
class Services:
    """An HTTP server that plays every service; the domain is the path. `plan` decides about an attempt at
    the moment it arrives, when it is also told to the ledger."""

    ledger: Ledger = field(default_factory=Ledger)
    plan: Callable[[Sight], Plan] = lambda sight: Plan()
    sights: list[Sight] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    port: int = 0

    def url(self, domain: str) -> str:
        return f"http://127.0.0.1:{self.port}/{domain}"

    def of(self, message_id: str) -> list[Sight]:
        return [sight for sight in self.sights if sight.message_id == message_id]

    async def until_seen(self, count: int) -> None:
        with trio.fail_after(HANGS):
            while len(self.sights) < count:
                await trio.sleep(0.01)

    async def handle(self, stream: trio.SocketStream) -> None:
        received = bytearray()
        async with stream:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                while (request := await _request(stream, received)) is not None:
                    path, headers, body = request
                    sight = Sight(path.strip("/"), trio.current_time(), headers, json.loads(body))
                    plan = self._take(sight)
                    if plan.hang:
                        await trio.sleep_forever()
                    await trio.sleep(plan.delay)
                    head = f"HTTP/1.1 {plan.status} Said\r\nContent-Length: {len(plan.answer)}\r\n"
                    if plan.retry_after is not None:
                        head += f"Retry-After: {plan.retry_after}\r\n"
                    head += "\r\n"
                    await stream.send_all(head.encode() + plan.answer)

    def _take(self, sight: Sight) -> Plan:
        if not sight.headers["idempotency-key"] == sight.headers["webhook-id"] == sight.key:
            self.wrong.append(f"{sight.message_id} came under several keys")
        plan = self.plan(sight)
        self.sights.append(sight)
        number = re.search(r"#(\d+)$", sight.text)
        self.ledger.seen(
            sight.domain,
            sight.message_id,
            sight.key,
            int(sight.body["attempt"]),
            int(number.group(1)) if number else None,
            sight.text,
            accepted=plan.accepts,
        )
        return plan


@asynccontextmanager
async def open_services(ledger: Ledger | None = None) -> AsyncIterator[Services]:
    services = Services(ledger or Ledger())
    serve = partial(trio.serve_tcp, services.handle, 0, host="127.0.0.1", backlog=1000)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(serve)
        services.port = listeners[0].socket.getsockname()[1]
        try:
            yield services
        finally:
            nursery.cancel_scope.cancel()


async def _request(
    stream: trio.SocketStream, received: bytearray
) -> tuple[str, dict[str, str], bytes] | None:
    while (end := received.find(b"\r\n\r\n")) < 0:
        if not (chunk := await stream.receive_some(65_536)):
            return None
        received += chunk
    first, *lines = received[:end].decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    length = end + 4 + int(headers["content-length"])
    while len(received) < length:
        if not (chunk := await stream.receive_some(65_536)):
            return None
        received += chunk
    body = bytes(received[end + 4 : length])
    del received[:length]
    return first.split(" ")[1], headers, body


def write_config(home: Path, services: Services, more: str = "", **settings: Mapping[str, int | str]) -> Path:
    """A postroom.toml with the services of `TEXTS`, each with its own `settings`."""
    tables = []
    for domain in TEXTS:
        lines = [f"[services.{domain}]", f'url = "{services.url(domain)}"']
        lines += [f"{name} = {value}" for name, value in settings.get(domain, {}).items()]
        tables.append("\n".join(lines))
    path = home / "scenario.toml"
    path.write_text("\n\n".join([*tables, more]) + "\n")
    return path


# Phones


@dataclass(frozen=True)
class Message:
    """A text message of one phone, before it is put into a body."""

    message_id: str
    sender: str
    number: str
    json: dict[str, Any]


_rng = Random(20_240_601)


def new_message(text: str, *, sender: str = "999000000001", number: str = NUMBERS[0]) -> Message:
    message_id = payloads.wamid(sender, _rng)
    head = payloads.Head(message_id, sender, int(time.time()))
    return Message(message_id, sender, number, payloads.text_message(head, text))


def body_of(*messages: Message) -> bytes:
    """One body, with an entry for each number."""
    entries = []
    for number in dict.fromkeys(message.number for message in messages):
        mine = [message for message in messages if message.number == number]
        contacts = [payloads.contact("Ada", sender) for sender in dict.fromkeys(m.sender for m in mine)]
        change = payloads.change(number, "15550000000", messages=[m.json for m in mine], contacts=contacts)
        entries.append(payloads.entry("1", change))
    return payloads.body(*entries)


async def post(url: str, body: bytes) -> int:
    client = WebhookClient(url, SECRET, timeout=30)
    try:
        return (await client.post(body)).status
    finally:
        client.close()


class Load:
    """A population that writes until `stop`, to wherever `url` says at the moment; not answered 200, it
    sends again. With `faults` it writes messages of all kinds."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        seed: int,
        phones: int = 60,
        rate: float = 150.0,
        connections: int = 32,
        faults: Faults | None = None,
        texts: Mapping[str, Sequence[str]] = TEXTS,
        numbers: Sequence[str] = NUMBERS,
    ) -> None:
        self.urls: list[str] = []
        self._ledger = ledger
        self._rate = rate
        self._connections = connections
        self.population = Population(
            phones,
            numbers,
            Random(seed),
            texts,
            unnumbered_share=0.05,
            longest_pause=0.5,
            kinds=0.0 if faults is None else "all",
            other_share=0.0 if faults is None else 0.05,
            faults=faults,
        )
        self._stop = trio.Event()
        self._going = trio.Event()
        self._going.set()
        self._next = 0
        self.unanswered = -1

    async def run(self) -> None:
        self.unanswered = await run_traffic(
            self.population,
            self._ledger,
            "",
            SECRET,
            connections=self._connections,
            rate=self._rate,
            stop=self._stop,
            settle=60.0,
            open_client=lambda url, secret: _Moving(self),
        )

    def rest(self) -> None:
        """Send nothing until `go_on`: a backlog is caught up with on a machine of any speed."""
        if self._going.is_set():
            self._going = trio.Event()

    def go_on(self) -> None:
        self._going.set()

    async def next_turn(self) -> None:
        await self._going.wait()

    def next_url(self) -> str:
        self._next += 1
        return self.urls[self._next % len(self.urls)]

    def stop(self) -> None:
        self.go_on()
        self._stop.set()


class _Moving:
    """One connection of a phone; a router that was started anew has another port."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._url = ""
        self._client: WebhookClient | None = None

    async def post(self, body: bytes, *, manner: Manner = PLAIN) -> Any:
        await self._load.next_turn()
        url = self._load.next_url()
        if self._client is None or url != self._url:
            self.close()
            self._url, self._client = url, WebhookClient(url, SECRET, timeout=15)
        return await self._client.post(body, manner=manner)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()


async def caught_up(load: Load, database: Database) -> None:
    """The phones rest until next to nothing is unfinished."""
    load.rest()
    await database.until(lambda count: count < 10)
    load.go_on()


# The verdict


async def verdict(
    database: Database, services: Services, *, replies: bool = False, in_doubt: Sequence[str] = ()
) -> Report:
    """Everything answered 200 is where it belongs, by the sender's ledger, the journal and the recount; with
    `replies`, these too."""
    conservation = await database.recount()
    assert conservation.ok, conservation.problems
    journal = await database.fetch(
        "SELECT seq, session_key, message_id FROM whatsapp_messages_items "
        "WHERE kind = 'm' AND message_id IS NOT NULL ORDER BY seq"
    )
    letters = {row["message_id"] for row in await database.fetch("SELECT message_id FROM webhook_dlq")}
    report = services.ledger.verify(
        dead_letters=letters,
        stored=[row["message_id"] for row in journal],
        allow_repeats=True,
        replies=replies,
        in_doubt=in_doubt,
    )
    assert report.ok, report.problems
    assert services.wrong == []
    place = {row["message_id"]: (row["session_key"], row["seq"]) for row in journal}
    assert len(place) == len(journal), "a message has two places in the journal"
    assert late_first_deliveries(services.sights, place, letters) == []
    return report


def out_of_order(sights: Sequence[Sight], sent: Sequence[Message]) -> list[str]:
    """Messages that a service was first handed after a later one of the same sender, as `sent` has them."""
    place = {message.message_id: (message.sender, number) for number, message in enumerate(sent)}
    newest: dict[str, int] = {}
    seen: set[str] = set()
    late = []
    for sight in sights:
        if sight.message_id not in seen and sight.message_id in place:
            seen.add(sight.message_id)
            sender, number = place[sight.message_id]
            if number < newest.get(sender, -1):
                late.append(f"{sight.message_id} of {sender}: {number} after {newest[sender]}")
            newest[sender] = max(newest.get(sender, -1), number)
    return late


def late_first_deliveries(
    sights: Sequence[Sight], place: Mapping[str, tuple[str, int]], letters: set[str]
) -> list[str]:
    """Messages first delivered after a later one of their conversation, by seq; dead letters left out."""
    newest: dict[str, int] = {}
    seen: set[str] = set()
    late = []
    for sight in sights:
        if sight.message_id in seen or sight.message_id in letters:
            continue
        seen.add(sight.message_id)
        session, seq = place[sight.message_id]
        if seq < newest.get(session, 0):
            late.append(f"{sight.message_id}: seq {seq} after {newest[session]}")
        newest[session] = max(newest.get(session, 0), seq)
    return late
