"""What lies in the spools of a data directory, whoever has them: bodies that wait for the journal, and what
was set aside. Reads only, and blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from router.spool.records import Damage, key_of, scan

_SET_ASIDE = ("damaged", "refused")


def waiting(root: Path, concerns: Callable[[bytes], bool]) -> list[Path]:
    """Files with a body that is of concern, or bytes that are no body and are."""
    return [path for path in sorted(root.glob("*/*.spool")) if any(map(concerns, _bodies(path)))]


def set_aside(root: Path, concerns: Callable[[bytes], bool]) -> list[Path]:
    """Files that were kept for a person to look at, likewise."""
    kept = [path for folder in _SET_ASIDE for path in sorted((root / folder).glob("*"))]
    return [path for path in kept if path.is_file() and concerns(_read(path))]


def _bodies(path: Path) -> Iterator[bytes]:
    data, key = _read(path), key_of(path.name)
    if key is None:
        yield data
        return
    for found in scan(data, key):
        yield data[found.start : found.end] if isinstance(found, Damage) else found.spooled.body


def _read(path: Path) -> bytes:
    with suppress(FileNotFoundError):  # it was emptied and removed a moment ago
        return path.read_bytes()
    return b""
