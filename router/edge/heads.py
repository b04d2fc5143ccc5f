"""Heads of requests that were read before. A sender says the same head again and again, but for a length
and a signature; one that is the same everywhere else needs no second reading. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple, Self

# What varies: a run of letters and digits, as long as the one before it. No such run ends a line, a field or
# a head, so the parser would find the same lines and fields around it.
_VARIES = re.compile(
    rb"\r\n(content-length|x-hub-signature(?:-256)?):[ \t]*((?:sha1=|sha256=)?([0-9A-Za-z]+))\r\n",
    re.IGNORECASE,
)
_LENGTH = b"content-length"
_MAX_SIZE = 2_048  # several times what a webhook has; each connection keeps one


class Head(NamedTuple):
    """A head with a Content-Length that the parser took, as the bytes around what varies in it."""

    size: int
    parts: tuple[tuple[int, bytes], ...]  # what does not vary, and where it begins
    runs: tuple[slice, ...]
    length: slice
    fields: tuple[tuple[bytes, slice], ...]  # of those that anybody reads, the ones that vary
    same: Mapping[bytes, bytes]  # the others

    @classmethod
    def of(cls, data: bytes, headers: Mapping[bytes, bytes]) -> Self | None:
        """The head at the start of `data`, of which the parser read `headers`; None when it is not of the
        kind that is worth knowing.
        """
        size = data.find(b"\r\n\r\n", 0, _MAX_SIZE) + 4
        parts, runs, fields = [], [], []
        length = None
        at = 0
        position = 0
        while (found := _VARIES.search(data, position, size)) is not None:
            name, run = found[1].lower(), slice(*found.span(3))
            if name == _LENGTH:
                length = run
            if name in headers:
                fields.append((name, slice(*found.span(2))))
            parts.append((at, data[at : run.start]))
            runs.append(run)
            at = run.stop
            position = found.end() - 2  # its end is the beginning of the next
        if length is None:
            return None
        parts.append((at, data[at:size]))
        varying = dict(fields)
        same = {name: value for name, value in headers.items() if name not in varying}
        return cls(size, tuple(parts), tuple(runs), length, tuple(fields), same)

    def headers(self, data: bytes) -> dict[bytes, bytes] | None:
        """The fields of a request of which the whole is `data`, when it is this head again and its body; else
        None, which says nothing about it.
        """
        for at, part in self.parts:
            if not data.startswith(part, at):
                return None
        for run in self.runs:
            if not data[run].isalnum():
                return None
        length = data[self.length]
        if not length.isdigit() or self.size + int(length) != len(data):
            return None
        headers = dict(self.same)
        for name, value in self.fields:
            headers[name] = data[value]
        return headers
