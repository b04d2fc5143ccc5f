"""Both reference peers on a real Postgres: what they accept, refuse and store, and that rows equal acks."""

import socket
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import trio

from bench.databases import durable_settings
from bench.load import answer_status
from bench.payloads import Population, request_bytes
from bench.rounds import measure_closed
from bench.targets import FASTAPI, FASTAPI_BARE, QUART, QUART_HELLO, SECRET, running

pytestmark = [
    pytest.mark.postgres,
    pytest.mark.skipif(find_spec("fastapi") is None, reason="the bench extra is not installed"),
]


@pytest.fixture
def home():
    # Not pytest's own directory: Postgres runs as another user when we are root, and could not enter it.
    with tempfile.TemporaryDirectory(prefix="postroom-bench-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def status_of(port: int, request: bytes) -> str:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.sendall(request)
        data = b""
        while (answer := answer_status(data)) is None:
            data += sock.recv(65_536)
    return answer[0]


@pytest.mark.parametrize("target", [FASTAPI, QUART], ids=lambda target: target.name)
async def test_peer_stores_each_signed_message_once(target, home):
    async with running(target, home) as peer:
        first, second = (request_bytes(body, SECRET, "127.0.0.1") for body in Population().bodies(2))
        forged = request_bytes(Population().bodies(1)[0], "another secret", "127.0.0.1")
        for request, status in ((first, "200"), (first, "200"), (second, "200"), (forged, "401")):
            assert await trio.to_thread.run_sync(status_of, peer.port, request) == status
        assert await trio.to_thread.run_sync(peer.count_rows) == 2
        settings = await trio.to_thread.run_sync(durable_settings, peer.dsn)
        assert settings["synchronous_commit"] == "on"

        measured = await measure_closed(peer, 1, connections=4, seconds=0.3, warm_up_seconds=0.1)
        assert measured.rows == measured.load.ok > 0
        assert measured.load.failed == measured.load.unanswered == 0
        assert measured.server_us > 0
        assert measured.postgres_us > 0


@pytest.mark.parametrize("target", [FASTAPI_BARE, QUART_HELLO], ids=lambda target: target.name)
async def test_peer_without_its_work_only_answers(target, home):
    async with running(target, home) as peer:
        request = request_bytes(b"{}", "nobody checks", "127.0.0.1")
        assert await trio.to_thread.run_sync(status_of, peer.port, request) == "200"
        assert peer.count_rows() is None
