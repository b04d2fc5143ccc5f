"""Header fields of HTTP/1.1, read strictly: what the client's answers and the endpoint's requests share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def parsed_fields(lines: Iterable[str]) -> dict[str, str]:
    """Names in lowercase; of a repeated field the last one counts.

    Raises:
        ValueError: a line is no header field, or two Content-Lengths differ.
    """
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        if not colon or not name or name != name.strip():
            raise ValueError(f"not a header line: {line[:80]!r}")
        if name == "content-length" and fields.get(name, value) != value:
            raise ValueError("two different Content-Length headers")
        fields[name] = value
    return fields


def content_length(fields: Mapping[str, str], most: int) -> int | None:
    """The bytes of the body; None without a Content-Length.

    Raises:
        ValueError: there is a Transfer-Encoding, or the length is no number or more than `most`.
    """
    if "transfer-encoding" in fields:
        raise ValueError("a body with a Transfer-Encoding")
    value = fields.get("content-length")
    if value is None:
        return None
    if not is_digits(value) or int(value) > most:
        raise ValueError(f"Content-Length is {value[:80]!r}, at most {most} is taken")
    return int(value)


def is_digits(text: str) -> bool:
    return text.isascii() and text.isdigit()
