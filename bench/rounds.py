"""One measured load on one running target: CPU clocks read around it, rows compared with acks."""

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import trio

from bench.load import LoadResult, LoadSpec
from bench.processes import CpuClocks, ProcessFailed
from bench.targets import SECRET, Running
from bench.verdicts import void_reasons

SETTLE_SECONDS = 60
_WARM_UP_REQUESTS = 20_000
# The warm-up's rate may be below what follows, and running out of requests would shorten the run.
_HEADROOM = 2


@dataclass(frozen=True)
class Round:
    """One load and what it cost; CPU in microseconds per ack, of the server and of its Postgres.

    `server_us` and `postgres_us` cover the load itself, `settled_*` also what was still on its way to
    services after the last ack. Shares are in cores; `others_share` is what neither the target nor the
    generator used, so a round disturbed by another program can be seen.
    """

    target: str
    number: int
    load: LoadResult
    rows: int | None
    server_us: float
    postgres_us: float
    server_share: float
    generator_share: float
    others_share: float
    settled_seconds: float
    settled_server_us: float
    settled_postgres_us: float
    void: list[str]

    @property
    def rate(self) -> float:
        return self.load.rate

    @property
    def settled_rate(self) -> float:
        """Messages per second until the last of them was with its service."""
        return self.load.ok / self.settled_seconds if self.settled_seconds > 0 else 0.0

    @property
    def cpu_us(self) -> float:
        return self.server_us + self.postgres_us

    def as_json(self) -> dict[str, Any]:
        return {"rate": round(self.rate, 1), "settled_rate": round(self.settled_rate, 1), **asdict(self)}


def spec_for(running: Running, *, connections: int, seconds: float, requests: int) -> LoadSpec:
    """A closed loop on this target; `dataclasses.replace` makes it an open one."""
    return LoadSpec(
        port=running.port,
        path=running.path,
        secret=SECRET,
        connections=connections,
        seconds=seconds,
        requests=requests,
        wait_for_go=True,
    )


class GeneratorProcess:
    """The load generator in its own process, built and waiting for the go."""

    def __init__(self, spec: LoadSpec) -> None:
        self._process = subprocess.Popen(
            (sys.executable, "-m", "bench.load", "--spec", json.dumps(asdict(spec))),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_built(self) -> None:
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "built":
            raise ProcessFailed(f"the load generator ended with {self._process.wait()}")

    def run(self) -> LoadResult:
        output, _ = self._process.communicate("go\n")
        if self._process.returncode != 0:
            raise ProcessFailed(f"the load generator ended with {self._process.returncode}")
        return LoadResult(**json.loads(output))

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


async def run_generator(spec: LoadSpec) -> LoadResult:
    """One load from a process of its own, built before it begins."""
    generator = GeneratorProcess(replace(spec, wait_for_go=True))
    try:
        await trio.to_thread.run_sync(generator.wait_built)
        return await trio.to_thread.run_sync(generator.run)
    except BaseException:
        generator.kill()
        raise


async def _generate(running: Running, spec: LoadSpec) -> tuple[CpuClocks, LoadResult, CpuClocks]:
    generator = GeneratorProcess(spec)
    try:
        await trio.to_thread.run_sync(generator.wait_built)
        before = running.cpu()
        result = await trio.to_thread.run_sync(generator.run)
        return before, result, running.cpu()
    except BaseException:
        generator.kill()
        raise


async def warm_up(running: Running, connections: int, seconds: float) -> float:
    """Brings pools, caches and code paths to work; the rate that was reached."""
    spec = spec_for(running, connections=connections, seconds=seconds, requests=_WARM_UP_REQUESTS)
    _, result, _ = await _generate(running, spec)
    await settle(running)
    return result.rate


async def settle(running: Running) -> None:
    """Waits until nothing stored is still on its way; raises ProcessFailed when that takes too long."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while await trio.to_thread.run_sync(running.count_unsettled):
        if time.monotonic() > deadline:
            raise ProcessFailed(
                f"{running.target.name} had messages undelivered {SETTLE_SECONDS} s after the load"
            )
        await trio.sleep(0.05)


async def measure(running: Running, number: int, spec: LoadSpec) -> Round:
    """Run the load of `spec` and judge whether the round counts."""
    rows_before = await trio.to_thread.run_sync(running.count_rows)
    before, load, after = await _generate(running, spec)
    settle_started = time.monotonic()
    settled = after
    if running.target.unsettled is not None:
        await settle(running)
        settled = running.cpu()
    settled_seconds = load.seconds + (time.monotonic() - settle_started)
    rows_after = await trio.to_thread.run_sync(running.count_rows)
    rows = None if rows_before is None or rows_after is None else rows_after - rows_before
    acks = max(1, load.ok)
    server_share = (after.busiest - before.busiest) / load.seconds
    generator_share = load.cpu_seconds / load.seconds
    machine = after.machine - before.machine
    ours = after.server - before.server + after.postgres - before.postgres + load.cpu_seconds
    return Round(
        target=running.target.name,
        number=number,
        load=load,
        rows=rows,
        server_us=(after.server - before.server) * 1e6 / acks,
        postgres_us=(after.postgres - before.postgres) * 1e6 / acks,
        server_share=server_share,
        generator_share=generator_share,
        others_share=max(0.0, machine - ours) / load.seconds,
        settled_seconds=settled_seconds,
        settled_server_us=(settled.server - before.server) * 1e6 / acks,
        settled_postgres_us=(settled.postgres - before.postgres) * 1e6 / acks,
        void=void_reasons(
            generator_share=generator_share,
            server_share=server_share,
            failed=load.failed,
            unanswered=load.unanswered,
            acks=load.ok,
            rows=rows,
        ),
    )


async def measure_closed(
    running: Running, number: int, *, connections: int, seconds: float, warm_up_seconds: float
) -> Round:
    """A warm-up, then as many requests as the target takes in `seconds`."""
    rate = await warm_up(running, connections, warm_up_seconds)
    requests = int(rate * seconds * _HEADROOM) + 2_000
    return await measure(
        running, number, spec_for(running, connections=connections, seconds=seconds, requests=requests)
    )


async def measure_open(
    running: Running, number: int, *, connections: int, seconds: float, warm_up_seconds: float, rate: float
) -> Round:
    """A warm-up, then `rate` requests per second for `seconds`, whatever the target makes of it."""
    await warm_up(running, connections, warm_up_seconds)
    spec = spec_for(running, connections=connections, seconds=seconds, requests=int(rate * seconds))
    return await measure(running, number, replace(spec, mode="open", rate=rate))
