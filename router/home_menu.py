"""The home menu: rows by country and language, as one interactive list message. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from actors.messages import Reply

_MAX_ROWS = 10  # of one list message in the WhatsApp Cloud API

# ITU-T E.164 country codes of where Postroom is used. A number of any other country gets the rows
# that name no country.
_CALLING_CODES: Mapping[str, str] = {
    "1": "US", "20": "EG", "27": "ZA", "33": "FR", "44": "GB", "49": "DE", "55": "BR", "91": "IN",
    "211": "SS", "212": "MA", "221": "SN", "225": "CI", "233": "GH", "234": "NG", "237": "CM",
    "243": "CD", "249": "SD", "250": "RW", "251": "ET", "252": "SO", "254": "KE", "255": "TZ",
    "256": "UG", "257": "BI", "258": "MZ", "260": "ZM", "263": "ZW", "265": "MW",
}  # fmt: skip

_WORDS: Mapping[str, tuple[str, str]] = {
    "en": ("What can we do for you?", "Menu"),
    "fr": ("Que pouvons-nous faire pour vous ?", "Menu"),
    "rw": ("Twabafasha iki?", "Menu"),
    "sw": ("Tukusaidie nini?", "Menyu"),
}


@dataclass(frozen=True, slots=True)
class MenuRow:
    """One row: `country` is an ISO 3166 code or None for every country without rows of its own."""

    country: str | None
    language: str
    domain: str
    title: str
    description: str | None = None


def country_of(wa_id: str | None) -> str | None:
    """The ISO 3166 code of a phone number in international form without +; None when unknown."""
    for length in (3, 2, 1):
        code = _CALLING_CODES.get((wa_id or "")[:length])
        if code is not None:
            return code
    return None


class HomeMenu:
    """Rows in the order in which they are shown."""

    def __init__(self, rows: Iterable[MenuRow]) -> None:
        self._rows: dict[tuple[str | None, str], list[MenuRow]] = {}
        for row in rows:
            self._rows.setdefault((row.country, row.language), []).append(row)

    def rows(self, country: str | None, language: str, closed: frozenset[str] = frozenset()) -> list[MenuRow]:
        """The rows for a country, else those for all; in that language, else in English. Without those of
        services that are `closed`."""
        for wanted in ((country, language), (None, language), (country, "en"), (None, "en")):
            if wanted in self._rows:
                return [row for row in self._rows[wanted] if row.domain not in closed][:_MAX_ROWS]
        return []

    def reply(self, country: str | None, language: str, closed: frozenset[str] = frozenset()) -> Reply:
        """The menu as a list message; a plain text when every row is switched off."""
        body, button = _WORDS.get(language, _WORDS["en"])
        rows = self.rows(country, language, closed)
        if not rows:
            return Reply(body)
        listed = [
            {"id": row.domain, "title": row.title}
            | ({"description": row.description} if row.description else {})
            for row in rows
        ]
        action = {"button": button, "sections": [{"rows": listed}]}
        interactive = {"type": "list", "body": {"text": body}, "action": action}
        return Reply(message={"type": "interactive", "interactive": interactive})
