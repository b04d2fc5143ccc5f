"""The spool's directory, with real files: order, adoption, locks, and what cannot be written or read."""

# ruff: noqa: ASYNC240 - small files, and nothing else runs

from __future__ import annotations

import errno
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from doubles import delivery, incoming

from actors.errors import SpoolUnavailable
from actors.messages import Delivery
from router.spool import directory
from router.spool.directory import SpoolDirectory

Reports = list[tuple[str, dict[str, object]]]


class Spool(SpoolDirectory):
    """One that keeps its reports."""

    def __init__(self, root: Path, *, max_bytes: int = 1_000_000, segment_bytes: int = 1_000_000) -> None:
        self.reports: Reports = []
        super().__init__(
            root,
            max_bytes=max_bytes,
            segment_bytes=segment_bytes,
            report=lambda event, details: self.reports.append((event, details)),
        )

    async def put(self, *names: str) -> None:
        await self.append([said(name) for name in names])

    async def take(self) -> list[str]:
        """All that waits, and done with it."""
        taken = []
        while bodies := await self.read():
            taken += [one.body.decode() for one in bodies]
            self.done(len(bodies))
        return taken


def said(name: str) -> Delivery:
    one = delivery(incoming(name))
    one.body = name.encode()
    return one


@asynccontextmanager
async def opened(root: Path, **limits: int) -> AsyncIterator[Spool]:
    spool = Spool(root, **limits)
    await spool.open()
    try:
        yield spool
    finally:
        spool.close()


def segments(root: Path) -> list[Path]:
    return sorted(root.glob("*/*.spool"))


async def test_what_was_put_in_comes_out_in_order(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        assert spool.is_empty
        await spool.put("a", "b")
        await spool.put("c")
        assert not spool.is_empty
        first = await spool.read()
        assert [one.body for one in first] == [b"a", b"b", b"c"]
        assert (first[0].app, first[0].correlation_id) == ("app", "correlation")
        assert await spool.read() == first
        spool.done(2)
        await spool.put("d")
        assert await spool.take() == ["c", "d"]
        assert spool.is_empty
        assert spool.size == 0
        await spool.put("e")
        assert await spool.take() == ["e"]
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


async def test_a_full_segment_is_followed_by_another(tmp_path: Path) -> None:
    async with opened(tmp_path, segment_bytes=200) as spool:
        names = [f"message {number}" for number in range(20)]
        for name in names:
            await spool.put(name)
        assert len(segments(tmp_path)) > 3
        assert await spool.take() == names
        assert segments(tmp_path) == []


async def test_what_a_process_left_is_adopted_and_comes_first(tmp_path: Path) -> None:
    async with opened(tmp_path, segment_bytes=100) as first:
        await first.put("a", "b")
        await first.put("c")
    async with opened(tmp_path) as second:
        assert not second.is_empty
        await second.filled()
        await second.put("d")
        assert await second.take() == ["a", "b", "c", "d"]
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


async def test_what_another_process_has_is_left_alone(tmp_path: Path) -> None:
    async with opened(tmp_path) as first:
        await first.put("a")
        async with opened(tmp_path) as second:
            assert second.is_empty
            await second.put("b")
            assert await second.take() == ["b"]
        assert await first.take() == ["a"]


async def test_the_torn_end_of_a_file_is_reported_and_stops_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as first:
        await first.put("a")
        await first.put("b")
    [segment] = segments(tmp_path)
    os.truncate(segment, segment.stat().st_size - 1)
    async with opened(tmp_path) as second:
        assert await second.take() == ["a"]
        [(event, details)] = second.reports
    assert event == "the end of a spool file was torn"
    assert Path(str(details["kept"])).stat().st_size == details["bytes"]


async def test_what_cannot_be_read_is_set_aside_and_stops_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as first:
        for name in ("a" * 40, "b" * 40, "c" * 40):
            await first.put(name)
    [segment] = segments(tmp_path)
    data = segment.read_bytes()
    segment.write_bytes(data.replace(b"b" * 40, b"b" * 39 + b"x"))
    async with opened(tmp_path) as second:
        assert await second.take() == ["a" * 40, "c" * 40]
        [(event, details)] = second.reports
    assert event == "a part of a spool file cannot be read"
    assert b"b" * 39 in Path(str(details["kept"])).read_bytes()


async def test_damage_that_there_is_no_room_to_copy_leaves_the_file_and_stops_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as first:
        for name in ("a" * 40, "b" * 40, "c" * 40):
            await first.put(name)
    [segment] = segments(tmp_path)
    segment.write_bytes(segment.read_bytes().replace(b"b" * 40, b"b" * 39 + b"x"))
    (tmp_path / "damaged").write_text("in the way")
    async with opened(tmp_path) as second:
        assert await second.take() == ["a" * 40, "c" * 40]
        assert second.is_empty
        [(_, details)] = second.reports
    assert details["kept"] == str(segment)
    assert segment.exists()


async def test_what_the_journal_refuses_is_kept_for_a_person(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        await spool.put("a", "b")
        await spool.read()
        await spool.refused()
        assert await spool.take() == ["b"]
        [(_, details)] = spool.reports
    assert Path(str(details["kept"])).read_bytes() == b"a"


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
async def test_a_file_that_could_not_be_synced_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(file: int) -> None:
        raise OSError(code, os.strerror(code))

    async with opened(tmp_path) as spool:
        await spool.put("a")
        [before] = segments(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(directory.os, "fdatasync", fail)
            with pytest.raises(SpoolUnavailable, match=os.strerror(code)):
                await spool.put("b")
            assert not await spool.probe()
        size = before.stat().st_size
        assert await spool.probe()
        await spool.put("c")
        assert before.stat().st_size == size
        assert len(segments(tmp_path)) == 2
        assert await spool.take() == ["a", "c"]


async def test_a_first_file_that_could_not_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: int, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with opened(tmp_path) as spool:
        with monkeypatch.context() as patch:
            patch.setattr(directory.os, "write", fail)
            with pytest.raises(SpoolUnavailable, match="No space left"):
                await spool.put("a")
        assert spool.is_empty
        assert segments(tmp_path) == []


async def test_a_reader_that_waits_for_a_writer_that_fails_takes_nothing_else_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on = threading.Event(), threading.Event()

    def fail(file: int) -> None:
        began.set()
        go_on.wait(10)
        raise OSError(errno.EIO, "Input/output error")

    async with opened(tmp_path) as spool:
        with monkeypatch.context() as patch:
            patch.setattr(directory.os, "fdatasync", fail)
            async with trio.open_nursery() as nursery:

                async def write() -> None:
                    with pytest.raises(SpoolUnavailable):
                        await spool.put("a")

                nursery.start_soon(write)
                assert await trio.to_thread.run_sync(began.wait, 10)
                read: list[list[str]] = []

                async def take() -> None:
                    read.append(await spool.take())

                nursery.start_soon(take)
                await trio.testing.wait_all_tasks_blocked()
                go_on.set()
        assert read == [[]]
        assert spool.is_empty


async def test_it_has_a_bound(tmp_path: Path) -> None:
    async with opened(tmp_path, max_bytes=300) as spool:
        await spool.put("a" * 200)
        with pytest.raises(SpoolUnavailable, match="no room"):
            await spool.put("b" * 200)
        assert await spool.take() == ["a" * 200]
        await spool.put("b" * 200)
        assert await spool.take() == ["b" * 200]


async def test_a_directory_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SpoolUnavailable, match=r"File exists.*give another --data-dir"):
        await Spool(tmp_path / "file" / "spool").open()
