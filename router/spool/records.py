"""The format of a spool file: records one after the other, each with the digest that tells it from anything
else. Pure: bytes in, bytes out.

A record is MAGIC, its number (8 bytes), the lengths of its header and body (4 bytes each, big-endian), a
digest of 16 bytes over all that and both, keyed with the key of its file, the header (JSON) and the body. The
key is in the name of the file and nowhere else: no body that is kept here can hold what would be read as a
record.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

import orjson

from actors.messages import Spooled

MAGIC = b"\xabPR1"
KEY_BYTES = 16
MAX_HEADER = 4_096
_NAME = re.compile(r"[0-9]{16}-([0-9a-f]{32})\.spool")
_FIXED = struct.Struct(">4sQII16s")


@dataclass(frozen=True, slots=True)
class Record:
    """A body with its number, which only grows, and the size of its record in bytes."""

    number: int
    spooled: Spooled
    size: int


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes from `start` to `end` that are no record. `torn`: nothing comes after them, as when a process was
    killed while it wrote."""

    start: int
    end: int
    torn: bool


def encode(key: bytes, number: int, spooled: Spooled) -> bytes:
    """The record of one body."""
    header = orjson.dumps([spooled.app, spooled.correlation_id, spooled.traceparent])
    return _head(key, number, header, spooled.body) + header + spooled.body


def _head(key: bytes, number: int, header: bytes, body: bytes) -> bytes:
    digest = blake2b(digest_size=16, key=key)
    digest.update(_FIXED.pack(MAGIC, number, len(header), len(body), b""))
    digest.update(header)
    digest.update(body)
    return _FIXED.pack(MAGIC, number, len(header), len(body), digest.digest())


def file_name(number: int, key: bytes) -> str:
    """The name of a file whose first record will have this number."""
    return f"{number:016}-{key.hex()}.spool"


def key_of(name: str) -> bytes | None:
    """The key of the digests in a file of this name; None: it is no spool file."""
    found = _NAME.fullmatch(name)
    return None if found is None else bytes.fromhex(found[1])


def scan(data: bytes, key: bytes, after: int = 0) -> Iterator[Record | Damage]:
    """The records whose numbers are above `after`, and what lies between them. Never raises, whatever the
    bytes are.
    """
    position = damaged_from = 0
    while position < len(data):
        record = _record(data, key, position, after)
        if record is not None:
            if damaged_from < position:
                yield Damage(damaged_from, position, torn=False)
            yield record
            after = record.number
            position += record.size
            damaged_from = position
            continue
        following = data.find(MAGIC, position + 1)
        position = following if following >= 0 else len(data)
    if damaged_from < len(data):
        yield Damage(damaged_from, len(data), torn=True)


def _record(data: bytes, key: bytes, position: int, after: int) -> Record | None:
    body_at = position + _FIXED.size
    if body_at > len(data):
        return None
    magic, number, header_length, body_length, _ = _FIXED.unpack_from(data, position)
    end = body_at + header_length + body_length
    if magic != MAGIC or number <= after or header_length > MAX_HEADER or end > len(data):
        return None
    header, body = data[body_at : body_at + header_length], data[body_at + header_length : end]
    if data[position:body_at] != _head(key, number, header, body):
        return None
    app, correlation_id, traceparent = orjson.loads(header)
    return Record(number, Spooled(app, body, correlation_id, traceparent), end - position)
