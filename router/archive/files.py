"""The place of archives: a directory of this machine, or an object store. One folder for each archive, one
Parquet file for each of its tables, and a manifest that is written last: without it there is no archive. No
file is ever written twice: one that stood still while others went on must not write into what they have read.

Everything here blocks; call it in a thread.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from .columns import Column, Digest, Row, batch_of, rows_of, schema_of

FORMAT = 1
_MANIFEST = "manifest.json"
_GROUP_ROWS = 50_000
_GROUP_BYTES = 16 * 1024 * 1024


class ArchiveError(Exception):
    """An archive cannot be read or written, or is not what its manifest says."""


@dataclass(frozen=True, slots=True)
class WrittenTable:
    """One table of an archive: its columns, and the number and digest of its rows."""

    file: str
    columns: tuple[Column, ...]
    rows: int
    digest: str
    bytes: int

    def as_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "columns": [[one.name, one.type] for one in self.columns],
            "rows": self.rows,
            "digest": self.digest,
            "bytes": self.bytes,
        }

    @classmethod
    def of(cls, said: Any) -> WrittenTable:
        columns = tuple(Column(name, kind) for name, kind in said["columns"])
        file = str(said["file"])
        if "/" in file:
            raise ValueError(file)
        return cls(file, columns, int(said["rows"]), str(said["digest"]), int(said["bytes"]))


class TableWriter:
    """Takes the rows of one table in the order of their key."""

    def __init__(self, file: str, stream: pa.NativeFile, columns: Sequence[Column]) -> None:
        self.file = file
        self._stream = stream
        self._writer = pq.ParquetWriter(stream, schema_of(columns), compression="zstd")
        self._columns = tuple(columns)
        self._digest = Digest()
        self._pending: list[pa.RecordBatch] = []
        self._rows = self._bytes = 0  # pending

    def add(self, rows: Sequence[Row]) -> None:
        self._digest.add(rows)
        batch = batch_of(rows, self._columns)
        self._pending.append(batch)
        self._rows += batch.num_rows
        self._bytes += batch.nbytes
        if self._rows >= _GROUP_ROWS or self._bytes >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(pa.Table.from_batches(self._pending))
            self._pending = []
            self._rows = self._bytes = 0

    def end(self) -> tuple[int, str]:
        """The number of rows that were added, and their digest."""
        self._flush()
        self._writer.close()
        self._stream.close()
        return self._digest.rows, self._digest.hex()

    def close(self) -> None:
        """Let go of the file as it is; harmless after `end`."""
        with contextlib.suppress(OSError, pa.ArrowException):
            self._writer.close()
            self._stream.close()


class ArchiveFiles:
    """All archives of one router. `location`: a directory, or a URI that pyarrow has a file system for."""

    def __init__(self, location: str) -> None:
        self.location = location if "://" in location else str(Path(location).absolute())
        self._local = "://" not in location or location.startswith("file://")
        self._opened: tuple[pafs.FileSystem, str] | None = None

    def _place(self, *parts: str) -> tuple[pafs.FileSystem, str]:
        if self._opened is None:
            try:
                if "://" in self.location:
                    self._opened = pafs.FileSystem.from_uri(self.location)
                else:
                    self._opened = (pafs.LocalFileSystem(), self.location)
            except (OSError, ValueError, NotImplementedError) as error:
                raise ArchiveError(f"archives cannot be kept at {self.location}: {error}") from error
        system, root = self._opened
        return system, "/".join((root.rstrip("/"), *parts))

    def names(self) -> list[str]:
        """Archives that are whole, oldest first."""
        with _explained(f"the archives at {self.location} cannot be listed"):
            system, root = self._place()
            found = system.get_file_info(pafs.FileSelector(root, recursive=True, allow_not_found=True))
        return sorted(Path(one.path).parent.name for one in found if Path(one.path).name == _MANIFEST)

    def open_table(self, name: str, table: str, columns: Sequence[Column]) -> TableWriter:
        """Begin to write one table of an archive, in a file that nobody else writes."""
        file = f"{table}-{secrets.token_hex(8)}.parquet"
        with _explained(f"archive {name} cannot be written at {self.location}"):
            system, path = self._place(name, file)
            system.create_dir(self._place(name)[1], recursive=True)
            return TableWriter(file, system.open_output_stream(path), columns)

    def end_table(self, name: str, columns: Sequence[Column], writer: TableWriter) -> WrittenTable:
        """Make it durable. What was written counts when it has been read back."""
        with _explained(f"archive {name} cannot be written at {self.location}"):
            rows, digest = writer.end()
            system, path = self._place(name, writer.file)
            self._sync(path)
            return WrittenTable(writer.file, tuple(columns), rows, digest, system.get_file_info(path).size)

    def abandon_table(self, name: str, writer: TableWriter) -> None:
        """It will never be read: its file goes, as far as it can."""
        writer.close()
        with contextlib.suppress(OSError, pa.ArrowException):
            system, path = self._place(name, writer.file)
            system.delete_file(path)

    def tidy(self, name: str) -> None:
        """Remove what interrupted attempts have left beside an archive that is whole."""
        kept = {_MANIFEST, *(told.file for told in self.tables(name).values())}
        with _explained(f"archive {name} cannot be tidied at {self.location}"):
            system, folder = self._place(name)
            for one in system.get_file_info(pafs.FileSelector(folder)):
                if one.base_name not in kept:
                    system.delete_file(one.path)

    def write_manifest(self, name: str, manifest: dict[str, Any]) -> None:
        """The archive is whole from here on. What was said before is replaced at once, never in part: one
        that is late may be killed in here when the rows are long gone.
        """
        written = orjson.dumps({"format": FORMAT, **manifest}, option=orjson.OPT_INDENT_2)
        with _explained(f"archive {name} cannot be written at {self.location}"):
            system, path = self._place(name, _MANIFEST)
            # An object store shows an object when it is complete.
            first = self._place(name, f"manifest-{secrets.token_hex(8)}.json")[1] if self._local else path
            with system.open_output_stream(first) as stream:
                stream.write(written)
            if self._local:
                self._sync(first)
                system.move(first, path)
                self._sync(path)

    def manifest(self, name: str) -> dict[str, Any]:
        """What an archive says of itself.

        Raises:
            ArchiveError: there is none of that name, or it cannot be read.
        """
        if name in ("", ".", "..") or "/" in name:
            raise ArchiveError(f"{name!r} is not the name of an archive")
        with _explained(f"there is no archive {name} at {self.location}, or it cannot be read"):
            system, path = self._place(name, _MANIFEST)
            with system.open_input_stream(path) as stream:
                found = orjson.loads(stream.read())
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ArchiveError(
                f"archive {name} has a form that this Postroom does not read; install a newer one"
            )
        return found

    def tables(self, name: str) -> dict[str, WrittenTable]:
        """The tables of an archive. Raises ArchiveError."""
        said = self.manifest(name).get("tables")
        try:
            return {table: WrittenTable.of(one) for table, one in said.items()}  # type: ignore[union-attr]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArchiveError(f"the manifest of archive {name} is damaged: {error!r}") from error

    def rows(self, name: str, table: str, told: WrittenTable) -> Generator[list[Row], None, None]:
        """All rows of a table, in their order.

        Raises:
            ArchiveError: at the end: they were not as many as told, or others.
        """
        digest = Digest()
        for batch in self._batches(name, told.file, None):
            rows = rows_of(batch, told.columns)
            digest.add(rows)
            yield rows
        if (digest.rows, digest.hex()) != (told.rows, told.digest):
            raise ArchiveError(
                f"archive {name} is damaged: {table} has {digest.rows} rows of digest {digest.hex()}, "
                f"not {told.rows} of {told.digest}"
            )

    def find(self, name: str, table: str, column: str, values: Sequence[Any]) -> list[dict[str, Any]]:
        """The rows whose column has one of the values. Raises ArchiveError."""
        found: list[dict[str, Any]] = []
        told = self.tables(name)[table]
        for batch in self._batches(name, told.file, pc.field(column).isin(list(values))):
            found.extend(batch.to_pylist())
        return found

    def _batches(self, name: str, file: str, condition: pc.Expression | None) -> Iterator[pa.RecordBatch]:
        with _explained(f"archive {name} cannot be read: {file}"):
            system, path = self._place(name, file)
            if condition is None:
                with system.open_input_file(path) as stream:
                    yield from pq.ParquetFile(stream).iter_batches(batch_size=2_000)
            else:
                yield from pq.read_table(path, filesystem=system, filters=condition).to_batches()

    def _sync(self, path: str) -> None:
        """A file of this machine is there after a power cut, too; an object store answers when it is."""
        if self._local:
            for each in (path, *map(str, Path(path).parents[:2])):
                descriptor = os.open(each, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException, orjson.JSONDecodeError) as error:
        raise ArchiveError(f"{what}: {error}") from error


def next_page(pages: Iterator[list[Row]]) -> list[Row] | None:
    """The next rows of a table, None at the end: for who reads them in a thread, a page at a time."""
    return next(pages, None)
