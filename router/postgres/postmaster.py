"""One postmaster: how it is launched, and what it shows of itself by its pid file, process and socket.

When to start or stop it is decided in embedded.py.
"""

import contextlib
import os
import subprocess
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import trio

from router.postgres.binaries import Account, child_environment, child_options, replace_file

PORT = 5432  # names the socket file only: TCP is off

SETTINGS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "listen_addresses": "",
    "port": str(PORT),
    "unix_socket_permissions": "0700",
    "cluster_name": "postroom",
    "max_connections": "60",
    "shared_buffers": "128MB",
    "max_wal_size": "2GB",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "logging_collector": "off",
    "log_checkpoints": "off",
    # The texts of errors quote what was sent, so nothing a statement raises is written to the server's log:
    # the level `log` is above `error` there, and the client gets every error anyway.
    "log_min_messages": "log",
    "log_error_verbosity": "terse",
    "log_min_error_statement": "panic",
    "log_statement": "none",
    "log_min_duration_statement": "-1",
    "log_parameter_max_length": "0",
    "log_parameter_max_length_on_error": "0",
}

# Version-independent greeting "SSLRequest" of the wire protocol: length 8, code 80877103.
_SSL_REQUEST = bytes.fromhex("0000000804d2162f")

# Every postmaster this process launched and has not reaped yet; any instance may be the one that sees it die.
_launched: list[subprocess.Popen[bytes]] = []


@dataclass(frozen=True)
class Postmaster:
    """A live postmaster. `status` is `starting`, `ready`, `stopping` or `standby`."""

    pid: int
    status: str


def launch_postmaster(
    postgres: Path, pgdata: Path, socket_dir: Path, log: Path, account: Account | None
) -> tuple[subprocess.Popen[bytes], int]:
    """Run the program `postgres` on `pgdata`, its output appended to `log`; also the size of the log before.

    It outlives this process, and is reaped by `runs` whenever it ends.

    Raises:
        OSError: the log cannot be opened, or the program not be run.
    """
    # PostgreSQL reads a list of directories here (SplitDirectoriesString), so the one path is quoted.
    directories = '"' + str(socket_dir).replace('"', '""') + '"'
    settings = SETTINGS | {"unix_socket_directories": directories}
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        offset = os.fstat(output).st_size
        child = subprocess.Popen(
            [postgres, "-D", pgdata, *(f"--{name}={value}" for name, value in settings.items())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            env=child_environment(),
            start_new_session=True,  # Ctrl-C in our terminal is for us to handle
            **child_options(account),
        )
    finally:
        os.close(output)
    _launched.append(child)
    return child, offset


def find_postmaster(pgdata: Path) -> Postmaster | None:
    """The live postmaster of exactly this data directory, None when there is none."""
    try:
        lines = (pgdata / "postmaster.pid").read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return None
    if not lines or not lines[0].isdecimal() or not runs(int(lines[0]), pgdata):
        return None
    return Postmaster(int(lines[0]), lines[7].strip() if len(lines) > 7 else "starting")


def runs(pid: int, pgdata: Path) -> bool:
    """True while `pid` is a postmaster of `pgdata`; a zombie or another program with that pid is not."""
    _launched[:] = [child for child in _launched if child.poll() is None]
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return (b"-D", os.fsencode(pgdata)) in pairwise(arguments)


def release_lock_files(pgdata: Path, socket_dir: Path, account: Account | None) -> None:
    """Let the lock files of a dead server stand for nobody; only for who knows that there is no live one.

    After a restart of the machine or container their pid can belong to any other process, for which Postgres
    would refuse to start. postmaster.pid is not removed, because its other lines are how Postgres notices
    orphaned backends; our own pid is put in, which a postmaster takes for stale when it is its parent's.
    """
    path = pgdata / "postmaster.pid"
    with contextlib.suppress(FileNotFoundError):
        _, _, rest = path.read_bytes().partition(b"\n")
        replace_file(path, f"{os.getpid()}\n".encode() + rest, account)
    socket_path(socket_dir).with_name(f"{socket_path(socket_dir).name}.lock").unlink(missing_ok=True)


async def answers(socket_dir: Path) -> bool:
    """True when a Postgres reacts on the socket within a second."""
    with trio.move_on_after(1):
        try:
            async with await trio.open_unix_socket(str(socket_path(socket_dir))) as stream:
                await stream.send_all(_SSL_REQUEST)
                return await stream.receive_some(1) in (b"N", b"S")
        except (OSError, trio.BrokenResourceError):
            return False
    return False


def socket_path(socket_dir: Path) -> Path:
    """The socket file a postmaster makes in `socket_dir`."""
    return socket_dir / f".s.PGSQL.{PORT}"
