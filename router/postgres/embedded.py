"""Runs the embedded Postgres of one data directory: starts, finds again, restarts and stops it.

Several processes may share the server; what is stored in it is no concern of this file.
"""

import fcntl
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote

import trio

from router.postgres.binaries import (
    Account,
    EmbeddedPostgresError,
    claim_data_dir,
    find_binary,
    usable_installation,
)
from router.postgres.cluster import (
    create_cluster,
    last_lines,
    make_socket_dir,
    require_same_version,
    socket_dir,
)
from router.postgres.postmaster import (
    PORT,
    Postmaster,
    answers,
    find_postmaster,
    launch_postmaster,
    release_lock_files,
    runs,
)

__all__ = ["EmbeddedPostgres", "EmbeddedPostgresError", "ServerInfo", "claim_data_dir", "find_binary"]

_POLL = 0.01
_WATCH_POLL = 0.05
_FAST_SHUTDOWN_SECONDS = 30
_ORPHAN_SECONDS = 20
_LONGEST_RETRY_SECONDS = 30
_HELD_MEMORY = "pre-existing shared memory block"
_ORPHANS = "waiting for the last processes of a killed Postgres to end"
_RECOVERY = "automatic recovery in progress"


@dataclass(frozen=True)
class ServerInfo:
    """A server that accepts connections.

    `started_by_us` is False when it was found running; `recovered` is True when our start replayed its log
    after a crash.
    """

    dsn: str
    pid: int
    data_dir: Path
    started_by_us: bool
    recovered: bool


class EmbeddedPostgres:
    """The Postgres server in `data_dir`, shared by every process that has started and not stopped it.

    `report` gets one line of text whenever something takes long or the server had to be restarted.
    """

    def __init__(self, data_dir: Path, *, report: Callable[[str], None] = lambda line: None) -> None:
        self._data_dir = data_dir.resolve()
        self._report = report
        self._pgdata = self._data_dir / "pgdata"
        self._log = self._data_dir / "postgres.log"
        self._users_lock: int | None = None
        self._pid: int | None = None

    def __repr__(self) -> str:
        return f"EmbeddedPostgres({str(self._data_dir)!r}, pid={self._pid})"

    def dsn(self) -> str:
        """The connection string, also when the server is not running.

        Raises:
            EmbeddedPostgresError: only a first start can tell, because `data_dir` is too long for a socket.
        """
        # The port is spelled out because clients would otherwise take it from PGPORT.
        return f"postgresql://postroom@/postroom?host={quote(str(self._socket_dir()), safe='')}&port={PORT}"

    async def start(self) -> ServerInfo:
        """Use the running server, or start it and wait as long as it is starting.

        The directory is made when it is missing. If this is cancelled, the server it was starting stops.

        Raises:
            EmbeddedPostgresError: Postgres cannot run here; the message says why and what to do.
        """
        with _translated(self._data_dir):
            await trio.to_thread.run_sync(claim_data_dir, self._data_dir)
            async with self._starting() as start_lock:
                held = self._users_lock
                if held is None:
                    self._users_lock = await self._locked("users.lock", fcntl.LOCK_SH)
                try:
                    return await self._bring_up(start_lock)
                except BaseException:
                    if held is None:
                        self._release()
                    raise

    async def watch(self) -> NoReturn:
        """Restart the server whenever it has died, until cancelled; a restart that fails is repeated."""
        delay = 1
        while True:
            if self._users_lock is None or self._pid is None:
                await trio.sleep(_WATCH_POLL)
                continue
            await _ended(self._pid, self._pgdata)
            if self._users_lock is None or self._pid is None or runs(self._pid, self._pgdata):
                continue
            self._report(f"Postgres (pid {self._pid}) died, restarting it")
            try:
                with _translated(self._data_dir):
                    async with self._starting() as start_lock:
                        if self._users_lock is not None:
                            info = await self._bring_up(start_lock)
                            self._report(f"Postgres is back (pid {info.pid})")
                            delay = 1
            except EmbeddedPostgresError as error:
                self._report(f"{error}; next attempt in {delay} s")
                await trio.sleep(delay)
                delay = min(2 * delay, _LONGEST_RETRY_SECONDS)

    async def stop(self) -> None:
        """Shut the server down if no other process uses it, else leave it; without a start, do nothing.

        Cancelling is safe: at worst the server stays up, and the next start finds it.

        Raises:
            EmbeddedPostgresError: the lock files or the server are out of reach.
        """
        users_lock, self._users_lock, self._pid = self._users_lock, None, None
        if users_lock is None:
            return
        try:
            with _translated(self._data_dir):
                async with self._starting():
                    if _try_lock(users_lock, fcntl.LOCK_EX):
                        await self._shut_down()
        finally:
            os.close(users_lock)

    async def _bring_up(self, start_lock: int) -> ServerInfo:
        """Find or launch the server; the caller holds the start lock."""
        found = await self._await_running()
        if found is not None:
            self._pid = found
            return ServerInfo(self.dsn(), found, self._data_dir, started_by_us=False, recovered=False)
        account = await trio.to_thread.run_sync(claim_data_dir, self._data_dir)
        installation = await trio.to_thread.run_sync(usable_installation, self._data_dir, account)
        if not await trio.Path(self._pgdata).exists():
            await create_cluster(self._data_dir, installation, account, start_lock)
        await trio.to_thread.run_sync(require_same_version, self._data_dir, installation)
        pid, said = await self._launch(installation, account)
        self._pid = pid
        return ServerInfo(self.dsn(), pid, self._data_dir, started_by_us=True, recovered=_RECOVERY in said)

    async def _await_running(self) -> int | None:
        """The pid of a server that runs already, once it is ready; None when there is none or it ends."""
        patience = _Patience(self._report)
        while (found := find_postmaster(self._pgdata)) is not None:
            if found.status == "ready" and await answers(self._socket_dir()):
                return found.pid
            patience.tick(f"waiting for Postgres (pid {found.pid}) to answer, it is {found.status}")
            await trio.sleep(_POLL)
        directory = socket_dir(self._data_dir)
        if directory is not None and await answers(directory):
            raise EmbeddedPostgresError(
                f"a Postgres that is not visible from here, in another container perhaps, serves "
                f"{self._data_dir}: stop it, or choose another --data-dir"
            )
        return None

    async def _launch(self, installation: Path, account: Account | None) -> tuple[int, str]:
        """Start a postmaster and wait until it is ready; its pid, and what it wrote to the log meanwhile."""
        started = trio.current_time()
        postgres = installation / "bin" / "postgres"
        directory = await trio.to_thread.run_sync(make_socket_dir, self._data_dir, account)
        patience = _Patience(self._report)
        orphans = False
        while True:
            await trio.to_thread.run_sync(release_lock_files, self._pgdata, directory, account)
            child, offset = await trio.to_thread.run_sync(
                launch_postmaster, postgres, self._pgdata, directory, self._log, account
            )
            ready = Postmaster(child.pid, "ready")
            try:
                while child.poll() is None:
                    if find_postmaster(self._pgdata) == ready and await answers(directory):
                        return child.pid, self._log_since(offset)
                    if patience.due():
                        said = last_lines(self._log_since(offset), 1)
                        patience.tick(_ORPHANS if orphans and not said else f"Postgres is starting; {said}")
                    await trio.sleep(_POLL)
            except BaseException:
                child.send_signal(signal.SIGINT)
                raise
            said = self._log_since(offset)
            orphans = _HELD_MEMORY in said
            if not orphans or trio.current_time() - started > _ORPHAN_SECONDS:
                raise EmbeddedPostgresError(
                    f"Postgres did not start (exit status {child.returncode}); repair what the last lines of "
                    f"{self._log} name:\n{last_lines(said)}"
                )
            patience.tick(_ORPHANS)
            await trio.sleep(0.1)

    async def _shut_down(self) -> None:
        found = find_postmaster(self._pgdata)
        if found is None:
            return
        for number, seconds in ((signal.SIGINT, _FAST_SHUTDOWN_SECONDS), (signal.SIGQUIT, float("inf"))):
            with suppress(ProcessLookupError):
                os.kill(found.pid, number)
            with trio.move_on_after(seconds):
                while runs(found.pid, self._pgdata):  # noqa: ASYNC110 - no event tells of a process's end
                    await trio.sleep(_POLL)
                return
            self._report("Postgres is slow to shut down, stopping it at once; its next start recovers")

    @asynccontextmanager
    async def _starting(self) -> AsyncIterator[int]:
        """Hold the lock under which the server is started, stopped and counted on."""
        handle = await self._locked("start.lock", fcntl.LOCK_EX)
        try:
            yield handle
        finally:
            os.close(handle)

    async def _locked(self, name: str, operation: int) -> int:
        patience = _Patience(self._report)
        handle = os.open(self._data_dir / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            while not _try_lock(handle, operation):
                patience.tick("waiting for another process that starts or stops Postgres")
                await trio.sleep(_POLL)
            return handle
        except BaseException:
            os.close(handle)
            raise

    def _release(self) -> None:
        if self._users_lock is not None:
            os.close(self._users_lock)
            self._users_lock = None

    def _socket_dir(self) -> Path:
        directory = socket_dir(self._data_dir)
        if directory is None:
            raise EmbeddedPostgresError(
                f"the socket of {self._data_dir} is chosen by its first start: start it"
            )
        return directory

    def _log_since(self, offset: int) -> str:
        with self._log.open("rb") as file:
            file.seek(offset)
            return file.read().decode(errors="replace")


async def _ended(pid: int, pgdata: Path) -> None:
    """Wait until this postmaster has ended. Where the system tells nobody, look."""
    try:
        process = os.pidfd_open(pid)
    except OSError:
        while runs(pid, pgdata):  # noqa: ASYNC110  # nobody tells
            await trio.sleep(_WATCH_POLL)
        return
    try:
        if runs(pid, pgdata):  # else the pid is another program's by now
            await trio.lowlevel.wait_readable(process)
    finally:
        os.close(process)


class _Patience:
    """Reports what is waited for, after 2 seconds and then every 5."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._began = trio.current_time()
        self._next = self._began + 2

    def due(self) -> bool:
        return trio.current_time() >= self._next

    def tick(self, line: str) -> None:
        if self.due():
            self._next += 5
            self._report(f"{line} ({trio.current_time() - self._began:.0f} s)")


def _try_lock(handle: int, operation: int) -> bool:
    try:
        fcntl.flock(handle, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _translated(data_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EmbeddedPostgresError(
            f"Postgres cannot run in {data_dir}: {error}; repair that, or choose another --data-dir"
        ) from error
