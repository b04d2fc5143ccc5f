"""docs/services.md: each service on that page is run as it stands there, and serves its domain."""

# ruff: noqa: ASYNC110 - tables send no events

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import scenarios_kit as kit
import trio
from scenarios_kit import Database, RouterProcess
from test_kill_services import free_port

pytestmark = pytest.mark.postgres

PAGE = (Path(__file__).parents[2] / "docs" / "services.md").read_text(encoding="utf-8")
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


def code(holds: str) -> str:
    [found] = [block for block in blocks("python") if holds in block]
    return found


@contextmanager
def running(home: Path, *command: str, **environment: str) -> Iterator[None]:
    with (home / "service.log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=home, env=kit.environment(**environment), stdout=log, stderr=log
        )
        try:
            yield
        finally:
            process.kill()
            process.wait()


async def until_open(port: int) -> None:
    with trio.fail_after(kit.HANGS):
        while True:
            try:
                await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
                return
            except OSError:
                await trio.sleep(0.05)


async def answer(home: Path, config: str, text: str, **environment: str) -> str:
    """What a router with that configuration has for the phone that says `text`."""
    (home / "postroom.toml").write_text(config)
    router = RouterProcess(home, "--data-dir", home / "data", env=kit.environment(**environment))
    try:
        await router.ready()
        assert await kit.post(router.webhook, kit.body_of(kit.new_message(text))) == 200
        database = Database.of(home / "data")
        await database.until(lambda count: count == 0)
        with trio.fail_after(kit.HANGS):  # deferred, where the service was not there yet
            while not (
                found := await database.fetch("SELECT payload #>> '{text,body}' FROM whatsapp_outbox")
            ):
                await trio.sleep(0.1)
        return str(found[0][0])
    finally:
        router.end()


async def test_ten_lines_that_attach(home: Path) -> None:
    service = code("serve_domain")
    assert len([line for line in service.splitlines() if line.strip()]) <= 10
    (home / "rides.py").write_text(service)
    port = free_port()
    config = f"services_port = {port}\n" + blocks("toml")[0]
    with running(
        home, sys.executable, "rides.py", POSTROOM_URL=f"ws://127.0.0.1:{port}", RIDES_TOKEN="b7c1f0"
    ):
        assert await answer(home, config, "taxi", RIDES_TOKEN="b7c1f0") == "A driver is on the way: taxi"


@pytest.mark.parametrize(
    ("framework", "command"),
    [
        ("FastAPI", ("-m", "uvicorn", "jobs:app", "--port")),
        ("Flask", ("-m", "flask", "--app", "jobs", "run", "--port")),
    ],
)
async def test_one_over_http(home: Path, framework: str, command: tuple[str, ...]) -> None:
    (home / "jobs.py").write_text(code(f"import {framework}"))
    port = free_port()
    with running(home, sys.executable, *command, str(port), JOBS_SECRET=SECRET):
        await serves_jobs(home, port)


@pytest.mark.skipif(shutil.which("npm") is None, reason="Node.js and npm are not installed")
async def test_one_on_express(home: Path) -> None:
    [service] = blocks("js")
    (home / "jobs.js").write_text(service)
    install = ["npm", "install", "--no-audit", "--no-fund", "express@5"]
    installed = await trio.run_process(
        install, cwd=home, check=False, capture_stdout=True, capture_stderr=True
    )
    if installed.returncode != 0:
        pytest.skip("express cannot be installed: the npm registry is not reached")
    port = free_port()
    with running(home, "node", "jobs.js", PORT=str(port), JOBS_SECRET=SECRET):
        await serves_jobs(home, port)


async def serves_jobs(home: Path, port: int) -> None:
    """The kit finds nothing wrong with what listens there, and a router delivers to it."""
    config = blocks("toml")[1].replace(":9002", f":{port}")
    await until_open(port)
    url = f"http://127.0.0.1:{port}/messages"
    tried = await kit.postroom(
        "conformance", url, "--secret-env", "JOBS_SECRET", cwd=home, env=kit.environment(JOBS_SECRET=SECRET)
    )
    assert tried.returncode == 0, tried.stdout.decode()
    assert await answer(home, config, "job", JOBS_SECRET=SECRET) == "Looking for: job"
