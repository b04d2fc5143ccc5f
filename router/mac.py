"""HMAC-SHA256 (RFC 2104), quickly for many short messages under one key. Pure."""

from __future__ import annotations

from hashlib import sha256


class HmacSha256:
    """A key with both of its hash states made once: keying them for each message would cost more than hashing
    it. Nor does a short message let go of the interpreter, as `hmac.digest` does, for another thread to take.
    """

    __slots__ = ("_inner", "_outer")

    def __init__(self, key: bytes) -> None:
        short = key if len(key) <= sha256().block_size else sha256(key).digest()
        padded = short.ljust(sha256().block_size, b"\0")
        self._inner = sha256(bytes(byte ^ 0x36 for byte in padded))
        self._outer = sha256(bytes(byte ^ 0x5C for byte in padded))

    def digest(self, message: bytes) -> bytes:
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(message)
        outer.update(inner.digest())
        return outer.digest()
