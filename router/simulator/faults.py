"""What goes wrong on the way from Meta to the webhook, and how often."""

from __future__ import annotations

from dataclasses import dataclass, fields
from random import Random

from router.simulator.deliveries import OTHER_BYTES, OTHER_SECRET, PLAIN, UNSIGNED, Manner

MOST_UPDATES = 1_000
"""The updates that Meta puts into one body at most (webhook reference, `messages`)."""

LONGEST_PAUSE = 0.02
"""Seconds between two pieces of a slow sender."""

_FORGERIES = (UNSIGNED, OTHER_SECRET, OTHER_BYTES)
_COUNTS = ("largest_batch", "history")


@dataclass(frozen=True)
class Faults:
    """Shares between 0 and 1, each drawn by itself.

    Of all deliveries, `forged` are bodies that Meta did not sign and `late` an earlier body of the whole run,
    of which at most `history` are remembered, each as likely as any other. Of the rest, `malformed` have
    messages without an id or a sender between the others, and `twins` are posted on two connections at the
    same moment. Of all attempts that are no twins, `hang_ups` do not wait for the answer, and `slow` send
    their body in pieces. A batch has at most `largest_batch` messages, 2 to 1,000, and its body with whatever
    stands beside them at most 1,000 updates.
    """

    forged: float = 0.0
    late: float = 0.0
    malformed: float = 0.0
    twins: float = 0.0
    hang_ups: float = 0.0
    slow: float = 0.0
    largest_batch: int = 20
    history: int = 1_000

    def __post_init__(self) -> None:
        shares = [getattr(self, one.name) for one in fields(self) if one.name not in _COUNTS]
        if not all(0.0 <= share <= 1.0 for share in shares):
            raise ValueError("a fault is a share between 0 and 1")
        if not 2 <= self.largest_batch <= MOST_UPDATES or self.history < 1:
            raise ValueError(f"a batch has 2 to {MOST_UPDATES} messages, and a history at least one body")

    @classmethod
    def everything(cls) -> Faults:
        """Every fault at once, each seldom enough that most bodies still arrive as they should."""
        return cls(
            forged=0.03,
            late=0.03,
            malformed=0.05,
            twins=0.04,
            hang_ups=0.03,
            slow=0.03,
            largest_batch=MOST_UPDATES,
        )

    def manner(self, rng: Random) -> Manner:
        """How one attempt at a genuine body is sent."""
        hang_up = strikes(self.hang_ups, rng)
        if not strikes(self.slow, rng):
            return Manner(hang_up=True) if hang_up else PLAIN
        return Manner(pieces=rng.randint(2, 5), pause=rng.uniform(0.0, LONGEST_PAUSE), hang_up=hang_up)


def strikes(share: float, rng: Random) -> bool:
    """True in `share` of all cases. A share of 0 draws nothing."""
    return share > 0.0 and rng.random() < share


def forgery(rng: Random) -> Manner:
    """How a body leaves that Meta did not sign."""
    return Manner(forgery=rng.choice(_FORGERIES))
