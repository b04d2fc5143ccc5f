"""Statuses of one outbound message: in which bodies they come, and which of them must stand at last."""

from __future__ import annotations

from collections.abc import Mapping

RANK: Mapping[str, int] = {"sent": 1, "delivered": 2, "failed": 2, "read": 3}
"""A status replaces one of lower rank only. Delivered and failed exclude each other: the first one stands."""

SCRIPTS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("sent",), ("delivered",), ("read",)),
    (("sent", "delivered"), ("read",)),
    (("sent", "delivered", "sent"),),
    (("read",), ("delivered",), ("sent",)),
    (("delivered",), ("sent",), ("sent",)),
    (("delivered",), ("read", "read"), ("delivered",)),
    (("sent",), ("delivered", "failed")),
    (("failed", "delivered"), ("sent",)),
    (("sent",), ("failed",)),
    (("sent",), ("failed",), ("read",)),
)
"""Each is a message's statuses, body by body. Bodies overtake each other, what is in one of them does not:
where the order of two statuses matters, they share a body or a higher one comes.
"""


def further(known: str | None, name: str) -> str:
    """Which of the two stands when `name` comes after `known`."""
    if known is None or RANK.get(name, 0) > RANK.get(known, 0):
        return name
    return known
