"""What both peers do with one request: check the signature, find the messages, store each in a row.

Shared so that the peers differ in framework and server only.
"""

import hmac
import os
import socket
from dataclasses import dataclass
from typing import Any, Literal

import click
import orjson

ANSWER = b'{"status":"accepted"}'
REFUSAL = b'{"error":"bad_signature"}'
PATH = "/webhooks/whatsapp"
POOL_SIZE = 20

CREATE_TABLE = """
CREATE TABLE IF NOT EXISTS peer_messages (
    wamid       text PRIMARY KEY,
    body        bytea NOT NULL,
    received_at timestamptz NOT NULL DEFAULT now()
)
"""
INSERT = "INSERT INTO peer_messages (wamid, body) VALUES ($1, $2) ON CONFLICT DO NOTHING"

Variant = Literal["full", "bare", "hello"]


def signature_matches(secret: bytes, body: bytes, header: str | None) -> bool:
    expected = "sha256=" + hmac.digest(secret, body, "sha256").hex()
    return header is not None and hmac.compare_digest(expected, header)


def wamids(body: bytes) -> list[str]:
    """The ids of all messages in a webhook body."""
    parsed = orjson.loads(body)
    return [
        message["id"]
        for entry in parsed["entry"]
        for change in entry["changes"]
        for message in change["value"].get("messages", ())
    ]


async def keep_nothing(connection: Any) -> None:
    """The pool's reset hook. asyncpg's default sends a second statement after each insert; a pool whose
    connections only ever run one INSERT has nothing to reset, and the peer is better off without it."""


@dataclass(frozen=True)
class PeerOptions:
    """`full` stores messages, `bare` is the same handler with its work removed, `hello` the
    framework's smallest app. All three run on the same server settings."""

    variant: Variant
    port: int

    @property
    def secret(self) -> bytes:
        return os.environ["WHATSAPP_APP_SECRET"].encode()

    @property
    def dsn(self) -> str:
        return os.environ["PEER_DSN"]

    def listen(self) -> socket.socket:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", self.port))
        sock.listen(2_048)
        return sock


def print_ready(sock: socket.socket) -> None:
    print(f"ready webhook=http://127.0.0.1:{sock.getsockname()[1]}{PATH}", flush=True)


def peer_options(*, bare: bool, hello: bool, port: int) -> PeerOptions:
    if bare and hello:
        raise click.UsageError("--bare and --hello exclude each other")
    return PeerOptions("bare" if bare else "hello" if hello else "full", port)
