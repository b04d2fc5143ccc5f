"""What the ports may raise. Foreign exceptions are translated into these once, in the adapter."""


class JournalUnavailable(Exception):
    """The database cannot be reached or refuses writes; nothing of this call was stored."""


class JournalRefused(JournalUnavailable):
    """The database is there and refuses what this call holds; nothing of it was stored. A part of it alone
    may be taken."""


class SpoolUnavailable(Exception):
    """The spool cannot take this, or cannot be read: disk full, an I/O error, its bound. Nothing of this call
    counts."""


class LeaseLost(Exception):
    """Another process delivers now (or this one's epoch is over); nothing of this call was stored."""


class NotOwner(Exception):
    """No attempt was started: the lease is not known to be held at this moment."""
