"""An idle lane costs nothing: with connections open and nothing to deliver, no system call is made."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

SERVED = """
import trio
from functools import partial
from datetime import UTC, datetime
from actors.messages import Ack, Envelope, Session
from router.delivery.http import Target, open_lane

async def serve(stream):
    while await stream.receive_some(65_536):
        await stream.send_all(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\n{}")

async def main():
    envelope = Envelope(
        id="msg_" + "0" * 32, message_id="m", domain="rides", session=Session(key="1:2", phone_number_id="1"),
        message={"type": "text"}, received_at=datetime.now(UTC), correlation_id="c",
    )
    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}/"
        open_one = open_lane(Target.of(url, None), clock=lambda: datetime.now(UTC), known_domain=bool)
        async def lane():
            async with open_one() as handler:
                assert isinstance(await handler.attempt(envelope), Ack)
                print("idle", flush=True)
                await trio.sleep_forever()
        for _ in range(32):
            nursery.start_soon(lane)

trio.run(main)
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_thirty_two_idle_lanes_make_no_system_call(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", SERVED], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        for _ in range(32):
            assert process.stdout.readline() == b"idle\n"
        time.sleep(0.5)
        trace = tmp_path / "trace"
        strace = subprocess.Popen(
            ["strace", "-f", "-o", str(trace), "-p", str(process.pid)], stderr=subprocess.DEVNULL
        )
        time.sleep(3)
        strace.terminate()
        strace.wait()
        calls = [
            line
            for line in trace.read_text().splitlines()
            if "resumed" not in line and "<detached" not in line
        ]
        assert calls == []
    finally:
        process.kill()
        process.communicate()
