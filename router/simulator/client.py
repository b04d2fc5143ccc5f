"""A small HTTP/1.1 client that posts signed bodies over one kept-alive connection and reads answers strictly.

It never sends anything twice: what got no complete answer is the caller's to redeliver.
"""

from __future__ import annotations

import select
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urlencode, urlsplit

import trio

from router.simulator.deliveries import OTHER_BYTES, OTHER_SECRET, PLAIN, UNSIGNED, Manner
from router.simulator.fields import content_length, is_digits, parsed_fields
from router.simulator.signing import SIGNATURE_HEADER, signature

MAX_HEAD = 65_536
MAX_ANSWER = 1_048_576
RECEIVE = 65_536


class NotAnswered(Exception):
    """No complete answer came: not connected, closed early, too late, or not HTTP. Meta would redeliver."""


@dataclass(frozen=True)
class Answer:
    """`headers` have lowercase names; `seconds` run from before connecting to the last byte of the answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float


class WebhookClient:
    """One connection to one webhook URL, opened when it is first needed and kept.

    `url` is `http://host[:port]/path`, `timeout` the seconds that one exchange may take, connecting
    included. A kept connection that the server has closed meanwhile is replaced before anything is written.
    Use one client per task.
    """

    def __init__(self, url: str, secret: str, *, timeout: float = 10.0) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"not an http:// URL with a host: {url!r}")
        self._host = parts.hostname
        self._port = parts.port or 80
        self._authority = parts.netloc.rpartition("@")[2]
        self._path = parts.path or "/"
        self._query = parts.query
        self._secret = secret
        self._timeout = timeout
        self._connection: trio.SocketStream | None = None
        self._received = bytearray()
        self._exchanging = False

    def __repr__(self) -> str:
        return f"WebhookClient(http://{self._authority}{self._path})"

    async def post(
        self, body: bytes, *, headers: Iterable[tuple[str, str]] = (), manner: Manner = PLAIN
    ) -> Answer:
        """Post `body` in this `manner`; `headers` are added, and may replace the signature.

        Raises:
            NotAnswered: always, if the manner is to hang up.
        """
        lines = list(headers)
        named = {name.lower() for name, _ in lines}
        if SIGNATURE_HEADER.lower() not in named and manner.forgery != UNSIGNED:
            lines.append((SIGNATURE_HEADER, self._signature(body, manner.forgery)))
        if "content-type" not in named:
            lines.append(("Content-Type", "application/json"))
        lines.append(("Content-Length", str(len(body))))
        return await self._exchange("POST", self._query, lines, body, manner)

    def _signature(self, body: bytes, forgery: str | None) -> str:
        if forgery == OTHER_SECRET:
            return signature(self._secret[::-1] + "?", body)
        return signature(self._secret, body + b" " if forgery == OTHER_BYTES else body)

    async def get(self, query: Mapping[str, str]) -> Answer:
        """GET the URL with `query` behind it, as the handshake does. Raises NotAnswered."""
        joined = "&".join(part for part in (self._query, urlencode(query)) if part)
        return await self._exchange("GET", joined, [], b"", PLAIN)

    def close(self) -> None:
        """Close the connection, if one is open; the client can be used again."""
        if self._connection is not None:
            self._connection.socket.close()
            self._connection = None
        self._received.clear()

    async def _exchange(
        self, method: str, query: str, headers: list[tuple[str, str]], body: bytes, manner: Manner
    ) -> Answer:
        if self._exchanging:
            raise trio.BusyResourceError("one exchange at a time: use a client per task")
        target = f"{self._path}?{query}" if query else self._path
        lines = [f"{method} {target} HTTP/1.1", f"Host: {self._authority}"]
        lines += [f"{name}: {value}" for name, value in headers]
        request = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body
        started = trio.current_time()
        self._exchanging = True
        answer = None
        try:
            with trio.fail_after(self._timeout):
                connection = await self._connected()
                await _send(connection, request, manner)
                answer = await self._answer(connection, started)
            return answer
        except trio.TooSlowError:
            raise NotAnswered(f"no complete answer within {self._timeout} s") from None
        except (OSError, trio.BrokenResourceError) as failure:
            raise NotAnswered(f"connection failed: {failure}") from failure
        finally:
            self._exchanging = False
            if answer is None or answer.headers.get("connection", "").lower() == "close":
                self.close()

    async def _connected(self) -> trio.SocketStream:
        if self._connection is not None and self._is_stale(self._connection):
            self.close()
        if self._connection is None:
            self._connection = await trio.open_tcp_stream(self._host, self._port)
        return self._connection

    def _is_stale(self, connection: trio.SocketStream) -> bool:
        # Between two exchanges only the end of the connection, or an answer to nothing, can be readable.
        if self._received:
            return True
        poll = select.poll()
        poll.register(connection.socket.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    async def _answer(self, connection: trio.SocketStream, started: float) -> Answer:
        status, headers = await self._head(connection)
        while 100 <= status < 200:
            status, headers = await self._head(connection)
        length = 0 if status in (204, 304) else _content_length(headers)
        while len(self._received) < length:
            await self._receive_more(connection)
        body = bytes(self._received[:length])
        del self._received[:length]
        return Answer(status, headers, body, trio.current_time() - started)

    async def _head(self, connection: trio.SocketStream) -> tuple[int, dict[str, str]]:
        while (end := self._received.find(b"\r\n\r\n")) < 0:
            if len(self._received) > MAX_HEAD:
                raise NotAnswered(f"head of the answer longer than {MAX_HEAD} bytes")
            await self._receive_more(connection)
        head = self._received[:end].decode("latin-1")
        del self._received[: end + 4]
        return _parsed_head(head)

    async def _receive_more(self, connection: trio.SocketStream) -> None:
        chunk = await connection.receive_some(RECEIVE)
        if not chunk:
            heard = "within" if self._received else "before"
            raise NotAnswered(f"connection closed {heard} the answer")
        self._received += chunk


async def _send(connection: trio.SocketStream, request: bytes, manner: Manner) -> None:
    size = -(-len(request) // manner.pieces)
    pieces = [request[at : at + size] for at in range(0, len(request), size)]
    if manner.hang_up and len(pieces) > 1:
        del pieces[-1]
    for number, piece in enumerate(pieces):
        if number:
            await trio.sleep(manner.pause)
        await connection.send_all(piece)
    if manner.hang_up:
        raise NotAnswered("hung up without waiting for the answer")


def _parsed_head(head: str) -> tuple[int, dict[str, str]]:
    first, *lines = head.split("\r\n")
    version, _, rest = first.partition(" ")
    code = rest[:3]
    if version not in ("HTTP/1.1", "HTTP/1.0") or not is_digits(code) or rest[3:4] not in ("", " "):
        raise NotAnswered(f"not an HTTP/1 status line: {first[:80]!r}")
    try:
        headers = parsed_fields(lines)
    except ValueError as wrong:
        raise NotAnswered(str(wrong)) from wrong
    if version == "HTTP/1.0":
        headers.setdefault("connection", "close")
    return int(code), headers


def _content_length(headers: Mapping[str, str]) -> int:
    try:
        length = content_length(headers, MAX_ANSWER)
    except ValueError as wrong:
        raise NotAnswered(str(wrong)) from wrong
    if length is None:
        raise NotAnswered("answer without a Content-Length")
    return length
