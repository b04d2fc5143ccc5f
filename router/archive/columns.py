"""What a column of a table is in Parquet, and the digest by which rows are the same rows. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pyarrow as pa

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_ARROW: Mapping[str, pa.DataType] = {
    "bigint": pa.int64(),
    "integer": pa.int32(),
    "smallint": pa.int16(),
    "boolean": pa.bool_(),
    "text": pa.string(),
    '"char"': pa.string(),
    "jsonb": pa.string(),
    "bytea": pa.binary(),
    "timestamp with time zone": pa.timestamp("us", "UTC"),
}

Row = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Column:
    """A column and its type in Postgres, as format_type() writes it."""

    name: str
    type: str


def schema_of(columns: Sequence[Column]) -> pa.Schema:
    """Raises ValueError: a type that archives have no form for."""
    unknown = [f"{one.name} {one.type}" for one in columns if one.type not in _ARROW]
    if unknown:
        raise ValueError(f"no form in an archive for {', '.join(unknown)}")
    return pa.schema([(one.name, _ARROW[one.type]) for one in columns])


def batch_of(rows: Sequence[Row], columns: Sequence[Column]) -> pa.RecordBatch:
    """Rows as they come from asyncpg, by column. A `"char"` comes as a byte."""
    schema = schema_of(columns)
    by_column = zip(*rows, strict=True) if rows else ((),) * len(columns)
    arrays = [
        pa.array([_plain(value, column.type) for value in values], schema.field(column.name).type)
        for values, column in zip(by_column, columns, strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def rows_of(batch: pa.RecordBatch, columns: Sequence[Column]) -> list[Row]:
    """Rows as asyncpg takes them for these columns."""
    by_column = [
        [_stored(value, column.type) for value in values.to_pylist()]
        for values, column in zip(batch.columns, columns, strict=True)
    ]
    return list(zip(*by_column, strict=True))


def _plain(value: Any, type_name: str) -> Any:
    return value.decode() if type_name == '"char"' and value is not None else value


def _stored(value: Any, type_name: str) -> Any:
    return value.encode() if type_name == '"char"' and value is not None else value


class Digest:
    """SHA-256 over rows in their order, the same for rows from the database and from a file."""

    def __init__(self) -> None:
        self.rows = 0
        self._hash = hashlib.sha256()

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.rows += 1
            self._hash.update(orjson.dumps([_digestible(value) for value in row]) + b"\n")

    def hex(self) -> str:
        return self._hash.hexdigest()


def _digestible(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, datetime):
        return {"microseconds": (value - _EPOCH) // _MICROSECOND}
    return value
