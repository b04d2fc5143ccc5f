"""Signatures of what is delivered, the Standard Webhooks way (www.standardwebhooks.com)."""

from __future__ import annotations

import base64

from router.mac import HmacSha256

PREFIX = "whsec_"


def key_of(secret: str) -> HmacSha256:
    """The key of a `whsec_` secret.

    Raises:
        ValueError: it is not `whsec_` and base64.
    """
    if not secret.startswith(PREFIX):
        raise ValueError("a Standard Webhooks secret begins with whsec_")
    return HmacSha256(base64.b64decode(secret.removeprefix(PREFIX), validate=True))


def sign(key: HmacSha256, webhook_id: str, timestamp: int, body: bytes) -> str:
    """The value of `webhook-signature`: version 1, HMAC-SHA256 of `id.timestamp.body`."""
    signed = b"%s.%d.%s" % (webhook_id.encode("ascii"), timestamp, body)
    return "v1," + base64.b64encode(key.digest(signed)).decode("ascii")
