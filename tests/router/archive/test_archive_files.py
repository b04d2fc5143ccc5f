"""Archive files: what is written comes back, what is damaged is refused, a manifest makes an archive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import each
from texts import texts

from router.archive.columns import Column, Digest, batch_of, rows_of, schema_of
from router.archive.files import ArchiveError, ArchiveFiles, WrittenTable

COLUMNS = (
    Column("seq", "bigint"),
    Column("n", "integer"),
    Column("rank", "smallint"),
    Column("kind", '"char"'),
    Column("text", "text"),
    Column("payload", "jsonb"),
    Column("body", "bytea"),
    Column("partial", "boolean"),
    Column("received_at", "timestamp with time zone"),
)
NOW = datetime(2026, 3, 4, 12, 30, 15, 123456, tzinfo=UTC)


def row(seq: int) -> tuple[Any, ...]:
    return (seq, 7, 1, b"m", "h\u00e9llo \U0001f697", '{"a": 1}', bytes(range(256)), True, NOW)


ROWS = [row(1), row(2), (3, *(None for _ in COLUMNS[1:]))]


def write(files: ArchiveFiles, rows: Sequence[tuple[Any, ...]], name: str = "one") -> WrittenTable:
    writer = files.open_table(name, "items", COLUMNS)
    for start in range(0, len(rows), 2):
        writer.add(rows[start : start + 2])
    written = files.end_table(name, COLUMNS, writer)
    files.write_manifest(name, {"name": name, "tables": {"items": written.as_json()}})
    return written


@pytest.fixture
def files(tmp_path: Path) -> ArchiveFiles:
    return ArchiveFiles(str(tmp_path / "archives"))


def read(files: ArchiveFiles, name: str = "one") -> list[tuple[Any, ...]]:
    told = files.tables(name)["items"]
    return [one for page in files.rows(name, "items", told) for one in page]


@each("rows", [ROWS, [], [row(n) for n in range(5_000)]])
def test_what_is_written_comes_back(tmp_path: Path, rows: list[tuple[Any, ...]]) -> None:
    files = ArchiveFiles(str(tmp_path / f"{len(rows)}"))
    written = write(files, rows)
    assert read(files) == rows
    assert written.rows == len(rows)
    assert files.names() == ["one"]
    assert files.find("one", "items", "seq", [2, 99_999]) == [
        {**dict(zip([one.name for one in COLUMNS], row(2), strict=True)), "kind": "m"}
    ] * (len(rows) > 0)


def test_a_uri_names_the_same_place(tmp_path: Path) -> None:
    write(ArchiveFiles(str(tmp_path)), ROWS)
    assert read(ArchiveFiles(f"file://{tmp_path}")) == ROWS


def test_without_a_manifest_there_is_no_archive(files: ArchiveFiles) -> None:
    assert files.names() == []
    writer = files.open_table("one", "items", COLUMNS)
    writer.add(ROWS)
    files.abandon_table("one", writer)
    files.abandon_table("one", writer)
    assert files.names() == []
    with pytest.raises(ArchiveError, match="there is no archive one"):
        files.manifest("one")
    write(files, ROWS)  # in its place
    assert read(files) == ROWS


@each("name", ["", ".", "..", "../one", "a/b", "none"])
def test_a_name_is_no_path(files: ArchiveFiles, name: str) -> None:
    with pytest.raises(ArchiveError):
        files.manifest(name)


def test_damage_is_found(files: ArchiveFiles, tmp_path: Path) -> None:
    write(files, ROWS)
    [table] = (tmp_path / "archives/one").glob("items-*.parquet")
    whole = table.read_bytes()
    for damaged in (whole[:-40], b"", whole[:60] + bytes(20) + whole[80:]):
        table.write_bytes(damaged)
        with pytest.raises(ArchiveError):
            read(files)
    table.unlink()
    with pytest.raises(ArchiveError):
        read(files)


def test_rows_that_are_others_are_found(files: ArchiveFiles) -> None:
    told = write(files, ROWS)
    others = write(files, [row(1), row(2), row(3)], "two")
    with pytest.raises(ArchiveError, match="archive two is damaged: items has 3 rows"):
        for _ in files.rows("two", "items", replace(told, file=others.file)):
            pass


def test_one_that_stood_still_writes_into_nobodys_file(files: ArchiveFiles) -> None:
    """It had begun to write the same table, and ends when another one has long written and read it."""
    stands_still = files.open_table("one", "items", COLUMNS)
    stands_still.add(ROWS)
    written = write(files, [row(n) for n in range(100)])
    stands_still.end()
    assert len(read(files)) == written.rows
    files.tidy("one")
    assert len(read(files)) == written.rows
    assert sorted(one.name for one in Path(files.location, "one").iterdir()) == sorted(
        [written.file, "manifest.json"]
    )


@each(
    "manifest",
    [b"", b"{", b"[]", b'{"format": 99}', b'{"format": 1}', b'{"format": 1, "tables": {"items": {}}}',
     b'{"format": 1, "tables": {"items": {"columns": [1], "rows": 1, "digest": "x", "bytes": 1}}}'],
)  # fmt: skip
def test_a_manifest_that_cannot_be_read_is_refused(
    files: ArchiveFiles, tmp_path: Path, manifest: bytes
) -> None:
    write(files, ROWS)
    (tmp_path / "archives/one/manifest.json").write_bytes(manifest)
    with pytest.raises(ArchiveError):
        files.tables("one")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(ArchiveError, match="cannot be written"):
        ArchiveFiles(str(tmp_path / "file")).open_table("one", "items", COLUMNS)
    with pytest.raises(ArchiveError, match="archives cannot be kept at"):
        ArchiveFiles("ftp://nobody/x").names()


def test_a_type_without_a_form_is_refused() -> None:
    with pytest.raises(ValueError, match="no form in an archive for shape polygon"):
        schema_of([Column("shape", "polygon")])


moments = st.datetimes(min_value=datetime(1900, 1, 1), max_value=datetime(2200, 1, 1), timezones=st.just(UTC))
rows_strategy = st.lists(
    st.tuples(
        st.integers(-(2**63), 2**63 - 1),
        st.integers(-(2**31), 2**31 - 1) | st.none(),
        st.integers(-(2**15), 2**15 - 1) | st.none(),
        st.sampled_from([b"m", b"s", None]),
        texts() | st.none(),
        st.sampled_from(["{}", "null", None]),
        st.binary(max_size=50) | st.none(),
        st.booleans() | st.none(),
        moments | st.none(),
    ),
    max_size=10,
)


@given(rows_strategy)
def test_rows_survive_the_way_there_and_back(rows: list[tuple[Any, ...]]) -> None:
    back = rows_of(batch_of(rows, COLUMNS), COLUMNS)
    assert back == rows
    first, second = Digest(), Digest()
    first.add(rows)
    second.add(back)
    assert (first.rows, first.hex()) == (second.rows, second.hex())


@given(rows_strategy.filter(bool), st.integers(0, 8))
def test_a_digest_tells_rows_apart(rows: list[tuple[Any, ...]], column: int) -> None:
    other = list(rows[0])
    other[column] = {0: 5, 1: 5, 2: 5, 3: b"e", 4: "other", 5: "[]", 6: b"other", 7: rows[0][7] is None,
                     8: NOW + timedelta(microseconds=1)}[column]  # fmt: skip
    if tuple(other) == rows[0]:
        return
    first, second = Digest(), Digest()
    first.add(rows)
    second.add([tuple(other), *rows[1:]])
    assert first.hex() != second.hex()


def test_a_manifest_that_could_not_be_written_leaves_the_one_before(
    files: ArchiveFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(files, ROWS)

    def full(path: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_sync", full)
    with pytest.raises(ArchiveError, match="No space left"):
        files.write_manifest("one", {"name": "one", "tables": {}})
    assert read(files) == ROWS
    files.tidy("one")
    assert len(list((tmp_path / "archives/one").iterdir())) == 2
