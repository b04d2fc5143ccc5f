"""The spool of one process: a locked directory of segments, each record synced before it counts. What an
ended process left in its own is adopted by the next one that starts, and comes first.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from actors.errors import SpoolUnavailable
from actors.messages import Delivery, Spooled
from router.spool.records import KEY_BYTES, Damage, Record, encode, file_name, key_of, scan

T = TypeVar("T")

SEGMENT_BYTES = 8_388_608  # of one file: as much is read at once, and replayed again after a crash
_BODIES_AT_ONCE = 1_000
_LOCK = "lock"
_DIRECTORY = re.compile(r"[0-9]{20}-[0-9a-f]{8}")

Report = Callable[[str, dict[str, object]], None]
"""Told of what a person should know: the event and its details."""


@dataclass(eq=False, slots=True)
class _Segment:
    """One file. `size` are the bytes that count, of which `scanned` were read; `ready` are the records that
    were found and have not been replayed, which begin at `offset`.
    """

    path: Path
    key: bytes
    size: int = 0
    scanned: int = 0
    offset: int = 0
    last: int = 0  # the number of the last record found
    ready: deque[Record] = field(default_factory=deque)
    unreadable: bool = False  # in part or whole, without a copy: the file is not removed


class SpoolDirectory:
    """One per process, under `root`, used by one task tree; what blocks runs in a thread.

    A file that could not be written or synced is never written again: after a failed fsync nobody can say
    what of it is on the disk (https://wiki.postgresql.org/wiki/Fsync_Errors).
    """

    def __init__(
        self, root: Path, *, max_bytes: int, report: Report, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        self._root = root
        self._max_bytes = max_bytes
        self._segment_bytes = segment_bytes
        self._report = report
        self._own = root / f"{time.time_ns():020}-{secrets.token_hex(4)}"
        self._locks: dict[Path, int] = {}
        self._segments: deque[_Segment] = deque()
        self._file: int | None = None  # of the last segment, while it is written
        self._number = 0
        self._writing = trio.Lock()
        self._held = False
        self._appending = 0
        self._filled = trio.Event()
        self._trouble = False

    async def open(self) -> None:
        """Lock a directory, and take over those that nobody has. Raises SpoolUnavailable."""
        try:
            self._segments.extend(await _in_thread(self._open))
        except SpoolUnavailable as error:
            fix = "give another --data-dir, or set limits.spool_max_bytes to 0"
            raise SpoolUnavailable(f"{error}; {fix}") from error
        if self._segments:
            self._filled.set()

    def _open(self) -> list[_Segment]:
        for directory in (self._root.parent, self._root):  # mode is that of the last one made only
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        adopted: list[_Segment] = []
        # One process at a time looks for directories, or makes or removes its own.
        with _only_one(self._root):
            for left in sorted(path for path in self._root.iterdir() if _DIRECTORY.fullmatch(path.name)):
                if self._lock(left):
                    adopted += _segments_of(left)
            self._own.mkdir(mode=0o700)
            if not self._lock(self._own):
                raise OSError(f"{self._own} is locked by somebody else")
        for directory in (self._root, self._root.parent):
            _sync_directory(directory)
        return adopted

    def _lock(self, directory: Path) -> bool:
        lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            return False
        self._locks[directory] = lock
        return True

    def close(self) -> None:
        """Give the directories up: what is in them is adopted by the next process that starts."""
        self._stop_writing()
        if self._locks:
            with suppress(OSError), _only_one(self._root):
                for directory in self._locks:
                    _remove_if_empty(directory)
        for lock in self._locks.values():
            os.close(lock)
        self._locks.clear()

    @property
    def is_empty(self) -> bool:
        return not self._segments and not self._appending

    @property
    def size(self) -> int:
        """Bytes that wait."""
        return sum(segment.size - segment.offset for segment in self._segments)

    # Writing

    async def append(self, deliveries: Sequence[Delivery], *, only_behind: bool = False) -> bool:
        self._appending += 1
        try:
            async with self._writing:
                if only_behind and not self._segments:
                    return False
                await self._append(deliveries)
            self._trouble = False
            self._filled.set()
            return True
        except SpoolUnavailable:
            self._trouble = True
            raise
        finally:
            self._appending -= 1

    async def _append(self, deliveries: Sequence[Delivery]) -> None:
        if self.size + sum(len(one.body) for one in deliveries) > self._max_bytes:
            raise SpoolUnavailable(f"the spool has no room in its {self._max_bytes} bytes")
        try:
            if self._file is None or self._segments[-1].size >= self._segment_bytes:
                await self._begin_segment()
            segment, file = self._segments[-1], self._file
            assert file is not None
            data = bytearray()
            for one in deliveries:
                self._number += 1
                body = Spooled(one.app, one.body, one.correlation_id, one.traceparent)
                data += encode(segment.key, self._number, body)
            await _in_thread(lambda: _write_and_sync(file, data))
        except SpoolUnavailable:
            await self._give_up_file()
            raise
        segment.size += len(data)

    async def _begin_segment(self) -> None:
        self._stop_writing()
        key = secrets.token_bytes(KEY_BYTES)
        path = self._own / file_name(self._number + 1, key)
        self._file = await _in_thread(lambda: _create(path))
        self._segments.append(_Segment(path, key))

    async def _give_up_file(self) -> None:
        """Never write it again; what counts in it stays."""
        if self._file is not None:
            self._stop_writing()
            if not self._segments[-1].size:
                empty = self._segments.pop()
                with suppress(SpoolUnavailable):
                    await _in_thread(partial(empty.path.unlink, missing_ok=True))

    def _stop_writing(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    # Reading

    async def filled(self) -> None:
        await self._filled.wait()

    async def hold(self) -> None:
        await self._writing.acquire()
        self._held = True

    def release(self) -> None:
        if self._held:
            self._held = False
            self._writing.release()

    async def read(self) -> list[Spooled]:
        while self._segments:
            segment = self._segments[0]
            if not segment.ready and segment.scanned < segment.size:
                await _in_thread(partial(self._scan, segment))
            if segment.ready:
                return [
                    record.spooled for record, _ in zip(segment.ready, range(_BODIES_AT_ONCE), strict=False)
                ]
            if self._held:
                await self._remove(segment)
                continue
            async with self._writing:
                # Still the first, and nothing was written to it: an append may have been under way.
                if self._segments and self._segments[0] is segment and segment.scanned >= segment.size:
                    await self._remove(segment)
        self._filled = trio.Event()
        return []

    def _scan(self, segment: _Segment) -> None:
        start, size = segment.scanned, segment.size
        try:
            with segment.path.open("rb") as file:
                file.seek(start)
                data = file.read(size - start)
        except OSError as error:
            # Those behind it must not wait for a disk that cannot read: a person has to look at this one.
            self._report(
                "a spool file cannot be read and is left", {"file": str(segment.path), "error": str(error)}
            )
            segment.scanned, segment.unreadable = size, True
            return
        for found in scan(data, segment.key, segment.last):
            if isinstance(found, Damage):
                self._set_aside(segment, data, found)
            else:
                segment.ready.append(found)
                segment.last = found.number
        segment.scanned = size

    def _set_aside(self, segment: _Segment, data: bytes, damage: Damage) -> None:
        """Bytes that are no record are kept for a person to look at, also those at the end of a file: what
        was being written when its process was killed had been answered to nobody, but a last record that went
        bad looks the same."""
        name = f"{segment.path.stem}-{damage.start}"
        try:
            kept = self._keep("damaged", name, data[damage.start : damage.end])
        except OSError:
            kept, segment.unreadable = segment.path, True  # there is no room for a copy: the whole file stays
        event = "the end of a spool file was torn" if damage.torn else "a part of a spool file cannot be read"
        details = {"file": segment.path.name, "bytes": damage.end - damage.start, "kept": str(kept)}
        self._report(event, details)

    def _keep(self, folder: str, name: str, data: bytes) -> Path:
        place = self._root / folder
        place.mkdir(mode=0o700, exist_ok=True)
        path = place / name
        path.write_bytes(data)
        return path

    def done(self, count: int) -> None:
        segment = self._segments[0]
        for _ in range(count):
            segment.offset += segment.ready.popleft().size

    async def refused(self) -> None:
        segment = self._segments[0]
        record = segment.ready[0]
        name = f"{segment.path.stem}-{record.number}.json"
        kept = await _in_thread(lambda: self._keep("refused", name, record.spooled.body))
        details: dict[str, object] = {"correlation_id": record.spooled.correlation_id, "kept": str(kept)}
        self._report("the journal refuses a spooled body", details)
        self.done(1)

    async def _remove(self, segment: _Segment) -> None:
        if segment is self._segments[-1]:
            self._stop_writing()
        self._segments.popleft()
        if segment.unreadable:
            return
        await _in_thread(partial(segment.path.unlink, missing_ok=True))

    # Health

    async def probe(self) -> bool:
        """Whether it could take something now; tried out after something could not be written."""
        if self.size >= self._max_bytes:
            return False
        if not self._trouble:
            return True
        path = self._own / "probe"

        def try_to_write() -> None:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                _write_and_sync(file, bytes(4_096))
            finally:
                os.close(file)
                path.unlink(missing_ok=True)

        try:
            await _in_thread(try_to_write)
        except SpoolUnavailable:
            return False
        return True


async def _in_thread(work: Callable[[], T]) -> T:
    try:
        return await trio.to_thread.run_sync(work)
    except OSError as error:
        raise SpoolUnavailable(f"the spool: {error}") from error


def _segments_of(directory: Path) -> list[_Segment]:
    found = []
    for path in sorted(directory.iterdir()):
        key = key_of(path.name)
        if key is not None:
            found.append(_Segment(path, key, path.stat().st_size))
    return found


def _create(path: Path) -> int:
    """The new file, whose name is on the disk."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        _sync_directory(path.parent)
    except OSError:
        os.close(file)
        raise
    return file


def _write_and_sync(file: int, data: bytes | bytearray) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]
    os.fdatasync(file)


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _only_one(root: Path) -> Iterator[None]:
    handle = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _remove_if_empty(directory: Path) -> None:
    """A directory that nobody needs any more, unless somebody left something else in it."""
    with suppress(OSError):
        if not any(key_of(path.name) for path in directory.iterdir()):
            (directory / _LOCK).unlink(missing_ok=True)
            directory.rmdir()
