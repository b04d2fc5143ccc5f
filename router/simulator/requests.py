"""Reads HTTP/1.1 requests off one connection, strictly and within bounds, and writes answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import trio

from router.simulator.fields import content_length, parsed_fields

MAX_HEAD = 16_384
MAX_BODY = 1_048_576
RECEIVE = 65_536

_REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests"}


class BadRequest(Exception):
    """What came is no request that can be read; the connection is of no further use."""


@dataclass(frozen=True)
class Request:
    """`headers` have lowercase names; `target` is as it stood in the request line."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def keeps_alive(self) -> bool:
        return self.headers.get("connection", "").lower() != "close"


class RequestReader:
    """The requests of one connection, one after another; what came early waits for its turn."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._received = bytearray()

    async def next(self) -> Request | None:
        """The next request; None when the other side has closed the connection between two of them.

        Raises:
            BadRequest: no HTTP/1.1 with Content-Length, more than `MAX_HEAD` or `MAX_BODY` bytes, or the
                connection ends in the middle.
            trio.BrokenResourceError: the connection broke.
        """
        while (end := self._received.find(b"\r\n\r\n")) < 0 and len(self._received) <= MAX_HEAD:
            if not await self._receive_more():
                if self._received:
                    raise BadRequest("connection closed within the head")
                return None
        if not 0 <= end <= MAX_HEAD:
            raise BadRequest(f"head longer than {MAX_HEAD} bytes")
        method, target, headers, length = _parsed_head(self._received[:end].decode("latin-1"))
        del self._received[: end + 4]
        while len(self._received) < length:
            if not await self._receive_more():
                raise BadRequest("connection closed within the body")
        body = bytes(self._received[:length])
        del self._received[:length]
        return Request(method, target, headers, body)

    async def _receive_more(self) -> bool:
        chunk = await self._stream.receive_some(RECEIVE)
        self._received += chunk
        return bool(chunk)


def _parsed_head(head: str) -> tuple[str, str, dict[str, str], int]:
    first, *lines = head.split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or not all(words) or words[2] != "HTTP/1.1":
        raise BadRequest(f"not an HTTP/1.1 request line: {first[:80]!r}")
    try:
        headers = parsed_fields(lines)
        length = content_length(headers, MAX_BODY)
    except ValueError as wrong:
        raise BadRequest(str(wrong)) from wrong
    if "host" not in headers:
        raise BadRequest("no Host")
    if length is None and words[0] not in ("GET", "HEAD"):
        raise BadRequest("no Content-Length")
    return words[0], words[1], headers, length or 0


def answer_bytes(status: int, content: Mapping[str, object], *, close: bool = False) -> bytes:
    """A complete answer whose body is `content` as JSON."""
    body = json.dumps(content, separators=(",", ":")).encode()
    head = f"HTTP/1.1 {status} {_REASONS.get(status, 'Error')}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n" + ("Connection: close\r\n" if close else "") + "\r\n"
    return head.encode("ascii") + body
