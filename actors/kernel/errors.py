"""What the kernel raises. Errors of the domain stand in actors/errors.py."""


class MailboxFull(Exception):
    """`put_nowait` found no room; the sender decides whether to wait, park or refuse."""


class MailboxClosed(Exception):
    """The mailbox takes nothing more; a reader sees this once everything left has been drained."""


class ActorDied(Exception):
    """The actor that was asked crashed or was stopped before it answered."""


class RestartIntensityExceeded(Exception):
    """A child crashed more often than its supervisor allows; the supervisor gives up."""
