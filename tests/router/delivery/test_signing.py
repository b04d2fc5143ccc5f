"""The reference implementation of Standard Webhooks verifies what we sign, and signs the same."""

from __future__ import annotations

import base64
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks.webhooks import Webhook, WebhookVerificationError
from tables import each
from texts import patterns, texts

from router.delivery.signing import key_of, sign

KEYS = st.binary(min_size=1, max_size=100)
IDS = patterns(r"msg_[0-9a-f]{32}(_r[1-9])?")
BODIES = texts()  # the reference takes text


def secret_of(key: bytes) -> str:
    return "whsec_" + base64.b64encode(key).decode()


@given(KEYS, IDS, st.integers(0, 4_000_000_000), BODIES)
def test_we_produce_what_the_reference_signs(key: bytes, id: str, timestamp: int, body: str) -> None:
    secret = secret_of(key)
    theirs = Webhook(secret).sign(id, datetime.fromtimestamp(timestamp, UTC), body)
    assert sign(key_of(secret), id, timestamp, body.encode()) == theirs


@given(KEYS, IDS, st.text(alphabet="ab 1é", max_size=8))
def test_the_reference_verifies_ours_and_nothing_else(key: bytes, id: str, text: str) -> None:
    body = b'{"a":"%s"}' % text.encode()
    now = int(datetime.now(UTC).timestamp())
    headers = {
        "webhook-id": id,
        "webhook-timestamp": str(now),
        "webhook-signature": sign(key_of(secret_of(key)), id, now, body),
    }
    webhook = Webhook(secret_of(key))
    assert webhook.verify(body, headers) == {"a": text}
    for changed, given_headers in (
        (body + b" ", headers),
        (body, headers | {"webhook-id": id + "0"}),
        (body, headers | {"webhook-timestamp": str(now + 1)}),
        (body, headers | {"webhook-signature": sign(key_of(secret_of(key + b"x")), id, now, body)}),
    ):
        with pytest.raises(WebhookVerificationError):
            webhook.verify(changed, given_headers)


@each("secret", ["", "abc", "whsec_***", "WHSEC_YWJj", "whsec_YWJ", "whsec_Y Jj"])
def test_what_is_no_secret_is_refused(secret: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        key_of(secret)


def test_a_body_that_is_no_text_is_signed_too() -> None:
    assert sign(key_of(secret_of(b"k")), "msg_1", 1, b"\xff").startswith("v1,")
