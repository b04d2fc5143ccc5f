"""Who was erased: hashes of names, each with the time until which. What such a person sent before is not
taken in again, whoever brings it. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from hashlib import sha256

_UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Tombstones:
    """`newest`: Unix seconds of the last erasure, 0 without any; nothing that was sent later is covered."""

    __slots__ = ("_key", "_until", "newest")

    def __init__(self) -> None:
        self.load(b"", ())

    def load(self, key: bytes, erased: Iterable[tuple[str, datetime]]) -> None:
        """Replace all: `key` is that of the hashes."""
        self._key = key
        self._until = {subject: (at - _UNIX_EPOCH).total_seconds() for subject, at in erased}
        self.newest = max(self._until.values(), default=0.0)

    def cover(self, name: str, sent_at: float) -> bool:
        """Whether a person of that name was erased after this time (Unix seconds)."""
        return sent_at <= self.newest and sent_at <= self._until.get(self._hash(name), -1.0)

    def erased_at(self, name: str) -> datetime | None:
        """When the person of that name was erased."""
        until = self._until.get(self._hash(name))
        return None if until is None else _UNIX_EPOCH + timedelta(seconds=until)

    def _hash(self, name: str) -> str:
        # postroom_subject_hash() in migrations/0010_audit.sql
        return sha256(self._key + sha256(self._key + name.encode("utf-8", "replace")).digest()).hexdigest()
