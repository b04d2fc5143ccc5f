"""Tokens that come with a request: how they are read, and what is kept of them. Pure."""

from __future__ import annotations

from hashlib import sha256


def bearer_of(authorization: str) -> str:
    """The token of an Authorization header (RFC 6750, 2.1); empty where it has none."""
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def digest_of(token: str) -> str:
    """Its SHA-256 in hexadecimal digits, by which it is known where the token itself is not to be kept."""
    return sha256(token.encode("utf-8", "replace")).hexdigest()
