"""The actor kernel: mailbox, actor, supervisor, family. It knows nothing of messages, HTTP or Postgres."""

from .actor import Actor, Address, Promise
from .errors import ActorDied, MailboxClosed, MailboxFull, RestartIntensityExceeded
from .family import Family, FamilyStatistics
from .mailbox import Mailbox, MailboxStatistics
from .supervisor import ChildSpec, Strategy, Supervisor

__all__ = [
    "Actor",
    "ActorDied",
    "Address",
    "ChildSpec",
    "Family",
    "FamilyStatistics",
    "Mailbox",
    "MailboxClosed",
    "MailboxFull",
    "MailboxStatistics",
    "Promise",
    "RestartIntensityExceeded",
    "Strategy",
    "Supervisor",
]
