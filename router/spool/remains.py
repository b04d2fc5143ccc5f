"""What lies in the spools of a data directory, whoever has them: segments that wait, and what was set
aside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

_SET_ASIDE = ("damaged", "refused")


def waiting(root: Path, concerns: Callable[[bytes], bool]) -> list[Path]:
    """Files of bodies that wait for the journal, of which the bytes are of concern. Blocks."""
    return [path for path in root.glob("*/*.spool") if concerns(_read(path))]


def set_aside(root: Path, concerns: Callable[[bytes], bool]) -> list[Path]:
    """Files that were kept for a person to look at, likewise. Blocks."""
    return [path for path in _files(root) if concerns(_read(path))]


def _files(root: Path) -> Iterator[Path]:
    for folder in _SET_ASIDE:
        yield from sorted(path for path in (root / folder).glob("*") if path.is_file())


def _read(path: Path) -> bytes:
    with suppress(FileNotFoundError):  # it was emptied and removed a moment ago
        return path.read_bytes()
    return b""
