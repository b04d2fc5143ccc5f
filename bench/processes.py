"""Starts and stops processes and reads their CPU clocks from /proc; knows nothing of what they serve."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from re import Match, Pattern

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_POLL_SECONDS = 0.01


class ProcessFailed(Exception):
    """A process of a target ended, or did not get ready, when it should have."""


@dataclass(frozen=True)
class ProcessTimes:
    """Clocks of one process, all its threads together, in seconds.

    `reaped` is the CPU time of its children that have ended and were waited for.
    """

    pid: int
    parent: int
    own: float
    reaped: float


def parse_stat(text: str) -> ProcessTimes:
    """Reads one /proc/PID/stat; fields count from the end of the command name, which may hold anything."""
    pid = int(text[: text.index(" ")])
    fields = text[text.rindex(")") + 2 :].split()
    user, system, child_user, child_system = (int(ticks) / _TICKS_PER_SECOND for ticks in fields[11:15])
    return ProcessTimes(pid, int(fields[1]), user + system, child_user + child_system)


def all_processes() -> dict[int, ProcessTimes]:
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                stat = Path("/proc", name, "stat").read_text(encoding="utf-8", errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            found[int(name)] = parse_stat(stat)
    return found


def tree(processes: Mapping[int, ProcessTimes], root: int, without: Iterable[int] = ()) -> list[ProcessTimes]:
    """`root` and its living descendants, leaving out the subtrees of `without`."""
    children: dict[int, list[int]] = {}
    for process in processes.values():
        children.setdefault(process.parent, []).append(process.pid)
    excluded = set(without)
    members, pending = [], [root]
    while pending:
        pid = pending.pop()
        if pid in processes and pid not in excluded:
            members.append(processes[pid])
            pending.extend(children.get(pid, ()))
    return members


@dataclass(frozen=True)
class CpuClocks:
    """CPU seconds used so far: by a target's server, by its Postgres, by the server's first process
    alone (`busiest`), and by everything on this machine."""

    server: float
    postgres: float
    busiest: float
    machine: float


def _machine_seconds() -> float:
    # user nice system idle iowait irq softirq steal; what the hypervisor took away is lost to us as well.
    line = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0]
    ticks = [int(field) for field in line.split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / _TICKS_PER_SECOND


def cpu_clocks(server: int, postmaster: int | None) -> CpuClocks:
    """The clocks of a server process and of its Postgres, each with its descendants.

    A process that has ended is counted once: while it lives its time is its own, and once waited for
    it is part of its parent's `reaped`. So backends that come and go lose nothing.
    """
    processes = all_processes()
    if server not in processes:
        raise ProcessFailed(f"server process {server} has ended")
    without = [] if postmaster is None else [postmaster]
    servers = tree(processes, server, without)
    databases = [] if postmaster is None else tree(processes, postmaster)
    return CpuClocks(
        server=sum(p.own + p.reaped for p in servers),
        postgres=sum(p.own + p.reaped for p in databases),
        busiest=processes[server].own,
        machine=_machine_seconds(),
    )


def processes_of(directory: Path) -> list[int]:
    """Living processes that work in `directory` or name it on their command line, this one left out."""
    found = []
    for pid in all_processes():
        if pid == os.getpid():
            continue
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            cwd = os.readlink(f"/proc/{pid}/cwd")
        except OSError:
            continue
        if str(directory) in command or Path(cwd).is_relative_to(directory):
            found.append(pid)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """One process of ours. Its output goes to `log`, so that a full pipe can never stop it."""

    def __init__(
        self, argv: Sequence[str], env: Mapping[str, str], log: Path, cwd: Path | None = None
    ) -> None:
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                argv,
                env={**os.environ, **env},
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self, ready: Pattern[str], seconds: float) -> Match[str]:
        """Waits for a line of output that `ready` matches; raises ProcessFailed with the log's tail."""
        deadline = time.monotonic() + seconds
        while True:
            match = ready.search(self._output())
            if match is not None:
                return match
            if self._process.poll() is not None:
                raise ProcessFailed(f"ended with {self._process.returncode} before ready:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise ProcessFailed(f"not ready after {seconds:g} s:\n{self.log_tail()}")
            time.sleep(_POLL_SECONDS)

    def ended(self) -> bool:
        return self._process.poll() is not None

    def stop(self, seconds: float = 30) -> int:
        """SIGTERM, and SIGKILL for what is still there after `seconds`; the exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()
        return self._process.wait()

    def log_tail(self, lines: int = 20) -> str:
        return "\n".join(self._output().splitlines()[-lines:])

    def _output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")
