"""The conformance kit: a good service passes, and every defect is found by the check that is there for it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import trio
from click.testing import CliRunner
from standardwebhooks.webhooks import Webhook, WebhookVerificationError
from tables import each

from router.cli import main
from router.conformance import FAIL, PASS, WARN, Report, play

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@dataclass
class Service:
    """Verifies, keeps the answers of what it has dealt with, and answers JSON; `answer` may spoil it."""

    answer: Callable[[Service, bytes, dict[str, str]], tuple[int, bytes] | None] = lambda *_: None
    closes: bool = False
    delay: float = 0.0
    known: dict[str, bytes] = field(default_factory=dict)
    requests: int = 0

    async def handle(self, stream: trio.SocketStream) -> None:
        received = bytearray()
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while True:
                while (end := received.find(b"\r\n\r\n")) < 0:
                    if not (data := await stream.receive_some(65_536)):
                        return
                    received += data
                lines = received[:end].decode("latin-1").split("\r\n")[1:]
                headers = {
                    name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
                }
                length = end + 4 + int(headers["content-length"])
                while len(received) < length:
                    received += await stream.receive_some(65_536)
                body = bytes(received[end + 4 : length])
                del received[:length]
                self.requests += 1
                status, said = self.answer(self, body, headers) or self.good(body, headers)
                await trio.sleep(self.delay)
                close = "Connection: close\r\n" if self.closes else ""
                head = f"HTTP/1.1 {status} Said\r\n{close}Content-Length: {len(said)}\r\n\r\n"
                await stream.send_all(head.encode() + said)
                if self.closes:
                    return

    def good(self, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        # As the router sends it: a service that reads its trace context is tried out with one.
        assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", headers["traceparent"])
        try:
            Webhook(SECRET).verify(body, headers)
        except (WebhookVerificationError, RuntimeError):
            return 401, b""
        delivery = json.loads(body)
        said = json.dumps({"replies": [{"text": f"number {len(self.known)}"}]}).encode()
        return 200, self.known.setdefault(delivery["id"], said)


@asynccontextmanager
async def served(service: Service) -> AsyncIterator[str]:
    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, service.handle, 0, host="127.0.0.1"))
        yield f"http://127.0.0.1:{listener.socket.getsockname()[1]}/messages"
        nursery.cancel_scope.cancel()


async def played(service: Service, *, secret: str | None = SECRET, timeout: float = 5.0) -> Report:
    with trio.fail_after(60):
        async with served(service) as url:
            return await play(url, secret=secret, domain="rides", timeout=timeout)


def verdicts(report: Report, verdict: str) -> set[str]:
    return {one.check for one in report.findings if one.verdict == verdict}


async def test_a_good_service_passes() -> None:
    report = await played(Service())
    assert [one for one in report.findings if one.verdict != PASS] == []
    assert report.ok
    assert len(report.findings) > 30


async def test_one_that_verifies_nothing_is_not_asked_to() -> None:
    report = await played(Service(lambda service, body, headers: (200, b"")), secret=None)
    assert report.ok
    assert not any("signature" in one.check for one in report.findings)


def always(status: int, body: bytes = b"") -> Callable[..., tuple[int, bytes] | None]:
    """For everything that is rightly signed."""
    return lambda service, got, headers: (status, body) if service.good(got, headers)[0] == 200 else None


def where(text: str, status: int) -> Callable[..., tuple[int, bytes] | None]:
    return lambda service, got, headers: (status, b"") if text in got.decode("utf-8", "replace") else None


def without_verifying(*parts: str) -> Callable[..., tuple[int, bytes] | None]:
    """Lets through what only these parts of the verification would refuse."""

    def answer(service: Service, body: bytes, headers: dict[str, str]) -> tuple[int, bytes] | None:
        signature = headers.get("webhook-signature")
        if signature is None:
            return (200, b"") if "presence" in parts else None
        if "time" in parts:
            expected = Webhook(SECRET)
            moment = int(headers["webhook-timestamp"])
            if abs(time.time() - moment) > 300:
                from datetime import UTC, datetime

                signed = expected.sign(
                    headers["webhook-id"], datetime.fromtimestamp(moment, UTC), body.decode()
                )
                return (200, b"") if signed in signature else None
        if "signature" in parts and service.good(body, headers)[0] == 401:
            return 200, b""
        if "rotation" in parts and " " in signature:
            return 401, b""
        return None

    return answer


@each(
    ("service", "check", "verdict"),
    [
        (Service(always(500)), "a delivery is answered 2xx", FAIL),
        (Service(always(200, b"OK")), "the answer can be read", FAIL),
        (Service(always(200, b'{"replies": 1}')), "the answer can be read", FAIL),
        (
            Service(lambda s, body, h: (200, b'{"replies": [{"text": "%d"}]}' % s.requests)),
            "a duplicate is answered as before",
            WARN,
        ),
        (Service(where('"redelivered":true', 409)), "a later attempt is taken, too", FAIL),
        (Service(closes=True), "many deliveries go over one connection", WARN),
        (Service(where('"type":"location"', 500)), "a message of type location is no error", FAIL),
        (
            Service(where("hologram", 500)),
            "a message of type hologram, which there is none of yet is no error",
            FAIL,
        ),
        (Service(where("DROP TABLE", 500)), "a text that looks like code is no error", FAIL),
        (Service(where("\\u0000", 500)), "a text of NUL and half a surrogate is no error", FAIL),
        (Service(where("invented", 500)), "fields that are not known yet are no error", FAIL),
        (Service(where('"contact":null', 500)), "without a contact, for a user without a number", FAIL),
        (Service(where("x" * 500_000, 413)), "a huge message is answered", WARN),
        (Service(where("x" * 500_000, 500)), "a huge message is answered", FAIL),
        (Service(without_verifying("presence")), "without a signature it is refused", FAIL),
        (Service(without_verifying("signature")), "with a wrong signature it is refused", FAIL),
        (Service(without_verifying("signature")), "with a changed body it is refused", FAIL),
        (Service(without_verifying("signature")), "with another delivery's signature it is refused", FAIL),
        (Service(without_verifying("rotation")), "one right signature of two is enough", FAIL),
        (Service(without_verifying("time")), "a delivery of an hour ago is refused", FAIL),
        (Service(without_verifying("time")), "a delivery of an hour ahead is refused", FAIL),
    ],
)
async def test_a_defect_is_found_by_the_check_for_it(service: Service, check: str, verdict: str) -> None:
    report = await played(service)
    assert check in verdicts(report, verdict), report.findings
    assert report.ok == (not verdicts(report, FAIL))


async def test_one_that_is_slow_is_told_so() -> None:
    report = await played(Service(delay=0.15), timeout=0.25)
    assert "answers come in half of the time" in verdicts(report, WARN)


async def test_one_that_answers_nothing_is_asked_once() -> None:
    report = await played(Service(delay=9.0), timeout=0.2)
    assert [(one.check, one.verdict) for one in report.findings] == [("a delivery is answered 2xx", FAIL)]
    assert report.findings[0].detail == "no answer within 0.2 s"


@each(
    ("arguments", "environment", "said"),
    [
        (["http://127.0.0.1:1/"], {}, "SERVICE_SECRET is not set"),
        (["http://127.0.0.1:1/"], {"SERVICE_SECRET": "x"}, "SERVICE_SECRET is no"),
        (["ftp://127.0.0.1/"], {"SERVICE_SECRET": SECRET}, "URL is not http"),
    ],
)
def test_what_is_wrong_with_the_arguments_is_said(
    arguments: list[str], environment: dict[str, str], said: str
) -> None:
    done = CliRunner().invoke(main, ["conformance", *arguments], env={"SERVICE_SECRET": None, **environment})
    assert done.exit_code == 2
    assert said in done.output


@pytest.mark.parametrize("as_json", [True, False])
def test_where_nobody_listens_it_says_so(as_json: bool) -> None:
    arguments: list[Any] = [
        "conformance",
        "http://127.0.0.1:1/",
        "--unsigned",
        *(["--json"] if as_json else []),
    ]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    if as_json:
        assert json.loads(done.output)["findings"][0]["verdict"] == FAIL
    else:
        assert "FAIL  a delivery is answered 2xx: connection failed" in done.output
