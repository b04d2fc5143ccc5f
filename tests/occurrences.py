"""Where a text occurs in something that was written down, also behind hexadecimal and base64. Shares nothing
with what erases."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable
from pathlib import Path

import pyarrow.parquet as pq

_HEX = re.compile(rb"\\\\?x((?:[0-9a-f]{2})+)")
_BASE64 = re.compile(rb"[A-Za-z0-9+/]{16,}={0,2}")


def occurrences(written: bytes, texts: Iterable[str]) -> set[str]:
    """Those of the texts that are in there."""
    layers = [written]
    layers += [bytes.fromhex(found.decode()) for found in _HEX.findall(written)]
    layers += [decoded for layer in list(layers) for decoded in _decoded(layer)]
    return {text for text in texts if any(text.encode() in layer for layer in layers)}


def _decoded(layer: bytes) -> list[bytes]:
    found = []
    for run in _BASE64.findall(layer):
        for start in range(4):
            part = run[start:].rstrip(b"=")
            part = part[: len(part) - (len(part) % 4 == 1)]
            try:
                found.append(base64.b64decode(part + b"=" * (-len(part) % 4)))
            except binascii.Error:
                continue
    return found


def in_archives(directory: Path, texts: Iterable[str]) -> set[str]:
    """Those of them that are in a file of an archive, its name, or a column of its rows."""
    found: set[str] = set()
    for path in sorted(directory.rglob("*")):
        found |= {text for text in texts if text in path.name}
        if path.suffix == ".parquet":
            for column in pq.read_table(path).columns:
                for value in column.to_pylist():
                    written = value if isinstance(value, bytes) else str(value).encode()
                    found |= occurrences(written, texts)
        elif path.is_file():
            found |= occurrences(path.read_bytes(), texts)
    return found


def in_files(directory: Path, texts: Iterable[str]) -> set[str]:
    """Those of them that are in a file below the directory, byte for byte or encoded."""
    found: set[str] = set()
    for path in directory.rglob("*"):
        if path.is_file():
            found |= occurrences(path.read_bytes(), texts)
    return found
