"""Plays a router against a service over HTTP and says what the service does well, and what not: good
deliveries, duplicates, forged and late ones, every type of message, hostile and huge ones.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

import orjson
import trio

from actors.messages import Ack, Envelope, Session
from actors.ports import Unreadable
from router.delivery import signing
from router.delivery.connection import HttpConnection, NoAnswer, Origin, Response
from router.delivery.contract import body_of, read_answer, request_of
from router.simulator import payloads

PASS: Final = "pass"
WARN: Final = "warn"
FAIL: Final = "fail"
TOLERANCE: Final = 300
"""Seconds that a signature may be old: what the libraries of Standard Webhooks allow."""
HUGE: Final = 1_000_000
"""Characters of the huge text. Meta's own bodies may have three times as many bytes."""
AT_ONCE: Final = 8
_NEVER_ASKED = frozenset({405, 404})
_REFUSALS = frozenset({400, 401, 403})
_ANSWERS = frozenset({*range(200, 300), 400, 410, 413, 422})
_PHONE, _NUMBER = "250788000001", "100000000000001"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was tried, how it went (PASS, WARN, FAIL), and where it did not pass, what was seen."""

    check: str
    verdict: str
    detail: str = ""


@dataclass
class Report:
    """All findings; `ok`: none is a FAIL."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(one.verdict != FAIL for one in self.findings)

    def as_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "findings": [
                {"check": one.check, "verdict": one.verdict, "detail": one.detail} for one in self.findings
            ],
        }


class Player:
    """One service at a URL. `secret` is the whsec_ one that it verifies with; None: it verifies nothing, and
    forged deliveries are not tried. `timeout`: seconds for one answer.
    """

    def __init__(self, url: str, *, secret: str | None, domain: str, timeout: float) -> None:
        self._origin = Origin.of(url)
        self._tls = self._origin.tls_context()
        self._key = None if secret is None else signing.key_of(secret)
        self._domain = domain
        self._timeout = timeout
        self._rng = random.SystemRandom()
        self.seconds: list[float] = []

    # What is sent

    def envelope(self, message: dict[str, Any] | None = None, *, key: str = "", **changes: Any) -> Envelope:
        """A new delivery, of a text unless it is given another message."""
        said = payloads.text_message(self.head(), "hello") if message is None else message
        made = Envelope(
            id=f"msg_{secrets.token_hex(16)}",
            message_id=str(said.get("id")),
            domain=self._domain,
            session=Session(
                key=key or f"{_NUMBER}:{_PHONE}",
                phone_number_id=_NUMBER,
                wa_id=_PHONE,
                active_service=self._domain,
                version=1,
            ),
            message=said,
            contact=payloads.contact("Ada", _PHONE),
            received_at=datetime.now(UTC),
            correlation_id=f"conformance-{secrets.token_hex(8)}",
        )
        return replace(made, **changes)

    def head(self) -> payloads.Head:
        return payloads.Head(payloads.wamid(_PHONE, self._rng), _PHONE, int(time.time()))

    def signature(self, envelope: Envelope, at: int, body: bytes) -> str | None:
        return None if self._key is None else signing.sign(self._key, envelope.id, at, body)

    async def send(
        self,
        envelope: Envelope,
        *,
        connection: HttpConnection | None = None,
        body: bytes | None = None,
        at: int | None = None,
        signature: Callable[[str | None], str | None] = lambda right: right,
    ) -> Response:
        """Post it. `signature` makes what is sent of the right one. Raises NoAnswer, also for the timeout."""
        written = body_of(envelope)
        moment = int(time.time()) if at is None else at
        signed = signature(self.signature(envelope, moment, written))
        posted = written if body is None else body
        request = request_of(self._origin, envelope, posted, timestamp=moment, signature=signed)
        own = HttpConnection(self._origin, tls=self._tls) if connection is None else connection
        began = trio.current_time()
        try:
            with trio.move_on_after(self._timeout):
                answer = await own.exchange(request)
                self.seconds.append(trio.current_time() - began)
                return answer
            raise NoAnswer(f"no answer within {self._timeout:g} s")
        finally:
            if connection is None:
                await own.close()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[HttpConnection]:
        one = HttpConnection(self._origin, tls=self._tls)
        try:
            yield one
        finally:
            await one.close()

    @property
    def verifies(self) -> bool:
        return self._key is not None


Check = Callable[[Player], Awaitable[Finding]]


async def play(
    url: str,
    *,
    secret: str | None,
    domain: str,
    timeout: float,
    on_finding: Callable[[Finding], None] = lambda finding: None,
) -> Report:
    """Every check, one after the other. A service that does not answer at all fails the first one, and no
    other is tried.
    """
    player = Player(url, secret=secret, domain=domain, timeout=timeout)
    report = Report()
    for name, check in _checks(player):
        try:
            finding = replace(await check(player), check=name)
        except NoAnswer as error:
            finding = Finding(name, FAIL, str(error))
        report.findings.append(finding)
        on_finding(finding)
        if len(report.findings) == 1 and not report.ok:
            break
    return report


def _checks(player: Player) -> list[tuple[str, Check]]:
    checks: list[tuple[str, Check]] = [
        ("a delivery is answered 2xx", _is_delivered),
        ("the answer can be read", _is_readable),
        ("a duplicate is answered as before", _duplicate),
        ("a later attempt is taken, too", _later_attempt),
        ("many deliveries go over one connection", _kept_alive),
        ("several conversations are served at once", _at_once),
        *((f"a message of type {name} is no error", _of_type(make)) for name, make in _TYPES.items()),
        *((f"{name} is no error", _hostile(text)) for name, text in _HOSTILE.items()),
        ("fields that are not known yet are no error", _new_fields),
        ("without a contact, for a user without a number", _nobody),
        ("a huge message is answered", _huge),
    ]
    if player.verifies:
        checks += [
            ("without a signature it is refused", _forged(lambda right: None)),
            ("with a wrong signature it is refused", _forged(lambda right: f"v1,{'A' * 43}=")),
            ("with another delivery's signature it is refused", _other_signature),
            ("with a changed body it is refused", _changed_body),
            ("one right signature of two is enough", _rotating),
            ("a delivery of an hour ago is refused", _late(-3_600)),
            ("a delivery of an hour ahead is refused", _late(3_600)),
            ("a delivery of two minutes ago is taken", _in_time),
        ]
    checks.append(("answers come in half of the time", _fast))
    return checks


def _judged(answer: Response, allowed: frozenset[int], expected: str, *, otherwise: str = FAIL) -> Finding:
    if answer.status in allowed:
        return Finding("", PASS)
    return Finding("", otherwise, f"answered {answer.status}, not {expected}")


def _is_2xx(answer: Response, *, otherwise: str = FAIL) -> Finding:
    return _judged(answer, frozenset(range(200, 300)), "2xx", otherwise=otherwise)


async def _is_delivered(player: Player) -> Finding:
    answer = await player.send(player.envelope())
    finding = _is_2xx(answer)
    if answer.status in _NEVER_ASKED:
        return replace(finding, detail=f"{finding.detail}: is this the path and does it take POST?")
    if answer.status in _REFUSALS and player.verifies:
        return replace(finding, detail=f"{finding.detail}: does it verify with the same secret?")
    return finding


async def _is_readable(player: Player) -> Finding:
    answer = await player.send(player.envelope())
    read = read_answer(bytes(answer.body), lambda name: True)
    if isinstance(read, Unreadable):
        return Finding("", FAIL, f"{read.reason}: it counts as delivered, and what it says is lost")
    return Finding("", PASS)


async def _duplicate(player: Player) -> Finding:
    envelope = player.envelope()
    first, second = await player.send(envelope), await player.send(envelope)
    if not 200 <= second.status < 300:
        return Finding("", FAIL, f"answered {second.status} to the same delivery again, not 2xx")
    if _meaning(first) != _meaning(second):
        what = "it answered otherwise the second time; keep the ids that were dealt with, and their answers"
        return Finding("", WARN, what)
    return Finding("", PASS)


async def _later_attempt(player: Player) -> Finding:
    envelope = player.envelope()
    await player.send(envelope)
    return _is_2xx(await player.send(replace(envelope, attempt=2, redelivered=True)))


async def _kept_alive(player: Player) -> Finding:
    async with player.connection() as connection:
        for number in range(10):
            answer = await player.send(player.envelope(), connection=connection)
            if not 200 <= answer.status < 300:
                return Finding("", FAIL, f"the request number {number + 1} was answered {answer.status}")
            if not answer.reusable:
                return Finding("", WARN, "it closes the connection: each delivery costs it and us a new one")
    return Finding("", PASS)


async def _at_once(player: Player) -> Finding:
    statuses: list[int] = []

    async def one(number: int) -> None:
        try:
            statuses.append((await player.send(player.envelope(key=f"{_NUMBER}:{number}"))).status)
        except NoAnswer:
            statuses.append(0)

    async with trio.open_nursery() as nursery:
        for number in range(AT_ONCE):
            nursery.start_soon(one, number)
    failed = sum(not 200 <= status < 300 for status in statuses)
    return Finding("", FAIL, f"{failed} of {AT_ONCE} failed") if failed else Finding("", PASS)


_rng = random.Random(1)
_TYPES: dict[str, Callable[[payloads.Head], Any]] = {
    "image": lambda head: payloads.image_message(head, _rng, "a caption"),
    "audio": lambda head: payloads.audio_message(head, _rng),
    "location": lambda head: payloads.location_message(head, -1.95, 30.06, "Kigali"),
    "contacts": lambda head: payloads.contacts_message(head, "Grace", "250788000009"),
    "interactive (a button)": lambda head: payloads.button_reply_message(head, "yes", "Yes"),
    "interactive (a list)": lambda head: payloads.list_reply_message(head, "row", "Row", "of a list"),
    "reaction": lambda head: payloads.reaction_message(head, "wamid.QQ==", "+"),
    "unsupported": payloads.unsupported_message,
    "hologram, which there is none of yet": payloads.future_message,
}
_HOSTILE = {
    "an empty text": "",
    "a text of NUL and half a surrogate": "a\0b\ud800c",
    "a text in several directions": "\u202eabc\u202d \u0645\u0631\u062d\u0628\u0627 \u200b",
    "a text that looks like code": "'; DROP TABLE users; -- <script>alert(1)</script> ${7*7} ../../etc",
    "a text of emoji": "\U0001f469\u200d\U0001f680" * 500,
    "a text of 4,096 characters": "x" * 4_096,
}


def _of_type(make: Callable[[payloads.Head], Any]) -> Check:
    async def check(player: Player) -> Finding:
        return _answered(await player.send(player.envelope(make(player.head()))))

    return check


def _hostile(text: str) -> Check:
    async def check(player: Player) -> Finding:
        return _answered(await player.send(player.envelope(payloads.text_message(player.head(), text))))

    return check


def _answered(answer: Response) -> Finding:
    """Delivered, or rejected for good: anything else is tried again, for hours, and fails each time."""
    return _judged(answer, _ANSWERS, "2xx, or 400, 410 or 422 where it can never take it")


async def _new_fields(player: Player) -> Finding:
    envelope = player.envelope()
    document = {**orjson.loads(body_of(envelope)), "invented": {"since": "yesterday"}}
    document["message"] |= {"invented": [1, None]}
    body = orjson.dumps(document)
    moment = int(time.time())
    right = player.signature(envelope, moment, body)
    return _answered(await player.send(envelope, body=body, at=moment, signature=lambda signed: right))


async def _nobody(player: Player) -> Finding:
    message = payloads.text_message(
        replace(player.head(), sender=None, user_id="RW.1349120865530274"), "hello"
    )
    envelope = player.envelope(message, contact=None)
    session = replace(envelope.session, wa_id=None, user_id="RW.1349120865530274", active_service=None)
    return _answered(await player.send(replace(envelope, session=session)))


async def _huge(player: Player) -> Finding:
    answer = await player.send(player.envelope(payloads.text_message(player.head(), "x" * HUGE)))
    if answer.status == 413:
        return Finding("", WARN, "answered 413: it is tried again for hours; allow bodies of 4 MB")
    return _answered(answer)


def _forged(signature: Callable[[str | None], str | None]) -> Check:
    async def check(player: Player) -> Finding:
        return _refused(await player.send(player.envelope(), signature=signature))

    return check


async def _other_signature(player: Player) -> Finding:
    other = player.envelope()
    moment = int(time.time())
    wrong = player.signature(other, moment, body_of(other))
    return _refused(await player.send(player.envelope(), at=moment, signature=lambda right: wrong))


async def _changed_body(player: Player) -> Finding:
    envelope = player.envelope()
    body = body_of(envelope).replace(b"hello", b"jello")
    return _refused(await player.send(envelope, body=body))


def _refused(answer: Response) -> Finding:
    if 200 <= answer.status < 300:
        return Finding("", FAIL, f"answered {answer.status}: anybody could write to this service")
    return _judged(answer, _REFUSALS, "401", otherwise=WARN)


async def _rotating(player: Player) -> Finding:
    answer = await player.send(player.envelope(), signature=lambda right: f"v1,{'A' * 43}= {right}")
    finding = _is_2xx(answer)
    if finding.verdict == FAIL:
        return replace(
            finding, detail=f"{finding.detail}: while a secret is rotated there are two signatures"
        )
    return finding


def _late(seconds: int) -> Check:
    async def check(player: Player) -> Finding:
        answer = await player.send(player.envelope(), at=int(time.time()) + seconds)
        if 200 <= answer.status < 300:
            what = (
                f"answered {answer.status}: whoever has seen it once can send it again; allow {TOLERANCE} s"
            )
            return Finding("", FAIL, what)
        return _judged(answer, _REFUSALS, "401", otherwise=WARN)

    return check


async def _in_time(player: Player) -> Finding:
    return _is_2xx(await player.send(player.envelope(), at=int(time.time()) - 120))


async def _fast(player: Player) -> Finding:
    half = player._timeout / 2
    slow = sum(seconds > half for seconds in player.seconds)
    if slow:
        what = f"{slow} of {len(player.seconds)} answers took longer than {half:g} s"
        why = "what takes longer than the timeout is tried again: answer first, and work afterwards"
        return Finding("", WARN, f"{what}; {why}")
    return Finding("", PASS)


def _meaning(answer: Response) -> Any:
    read = read_answer(bytes(answer.body), lambda name: True)
    return read if isinstance(read, Ack) else bytes(answer.body)
