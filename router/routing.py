"""Where a message goes: the six rules, in order. Pure; `postroom explain` and the router call the same
function.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from actors.messages import Item, JsonObject, Reply, Session
from actors.ports import Route
from router.config import RoutingConfig, ServiceConfig
from router.domains import ALIASES, Words, fold
from router.home_menu import HomeMenu, country_of

_ACTIONS = ("menu", "home", "exit")
# Nobody wrote a word that could be answered with a menu: the phone only reports something.
_WITHOUT_WORDS = frozenset({"reaction", "system", "unsupported", "edit", "revoke"})
_MAX_SEARCHED = 2_000  # characters of a text in which keywords are looked for

_GOODBYE: Mapping[str, str] = {
    "en": "Goodbye! Write menu whenever you need us.",
    "fr": "Au revoir ! Écrivez menu quand vous avez besoin de nous.",
    "rw": "Murabeho! Andika menu igihe mudukeneye.",
    "sw": "Kwaheri! Andika menyu ukituhitaji.",
}


@dataclass(frozen=True, slots=True)
class _Word:
    """What one word or phrase means: a domain or an action, and in which language it was said."""

    target: str
    language: str
    said: str


class Routes:
    """The rules over one configuration. Build anew when it changes; `menu` may be replaced in place.

    To a service that is draining only the conversations go that are with it. One whose active service is gone
    is with nobody. The menu offers neither.
    """

    def __init__(
        self,
        routing: RoutingConfig,
        services: Mapping[str, ServiceConfig],
        menu: HomeMenu | None = None,
        *,
        removed: Iterable[str] = (),
    ) -> None:
        self.menu = menu if menu is not None else HomeMenu(())
        self._fallback = routing.fallback
        self._language = routing.languages[0] if routing.languages else "en"
        self._buttons = dict(routing.buttons)
        self._domains = frozenset(services)
        draining = (name for name, service in services.items() if service.state == "draining")
        self._closed = frozenset((*removed, *draining))
        self._open = frozenset(name for name, service in services.items() if service.state != "draining")
        self._actions = _index((("menu", routing.menu), ("home", routing.home), ("exit", routing.exit)))
        self._keywords = _index((name, services[name].keywords) for name in services if name in self._open)
        self._order = {name: rank for rank, name in enumerate(services)}
        self._first_words: dict[str, list[str]] = {}
        for phrase in self._keywords:
            self._first_words.setdefault(phrase.split(" ", 1)[0], []).append(phrase)

    def decide(self, item: Item, session: Session) -> Route:
        """The rule that claims this message, and where it sends it."""
        message = item.message
        text = fold(_said(message)[:_MAX_SEARCHED])
        country = country_of(item.wa_id)
        if text and (action := self._actions.get(text)):
            return self._action(
                action.target, action.target, f"the whole text is {action.said!r}", action, country
            )
        button = _pressed(message)
        if button is not None and (target := self._button_target(button)) is not None:
            reason = f"the pressed id {button!r} stands for {target}"
            if target in _ACTIONS:
                return self._action("button", target, reason, None, country)
            return Route("button", target, reason)
        active = session.active_service if session.active_service in self._domains else None
        keyword = self._keywords.get(text)
        if keyword is not None and keyword.target != active:
            return Route("keyword", keyword.target, f"the whole text is {keyword.said!r}, a keyword")
        if active is not None:
            return Route("active_service", active, f"the conversation is with {active}")
        keyword = self._first_keyword(text)
        if keyword is not None:
            return Route("keyword", keyword.target, f"the text has {keyword.said!r}, its first keyword")
        return self._fall_back(message, country)

    def _fall_back(self, message: JsonObject, country: str | None) -> Route:
        if self._fallback in self._open:
            return Route("fallback", self._fallback, "nothing claims the message")
        kind = message.get("type")
        if isinstance(kind, str) and kind in _WITHOUT_WORDS:
            return Route("fallback", None, "nothing claims the message, and it asks for no answer")
        reply = self.menu.reply(country, self._language, self._closed)
        return Route("fallback", None, "nothing claims the message: home menu", (reply,))

    def _action(self, rule: str, action: str, reason: str, word: _Word | None, country: str | None) -> Route:
        language = word.language if word is not None else self._language
        if action == "exit":
            reply = Reply(_GOODBYE.get(language, _GOODBYE["en"]))
        else:
            reply = self.menu.reply(country, language, self._closed)
        return Route(rule, None, reason, (reply,), leave=True)

    def _button_target(self, button: str) -> str | None:
        target = self._buttons.get(button)
        if target is not None:
            return target if target in self._open or target in _ACTIONS else None
        for candidate in (button, button.partition(":")[0], button.partition(".")[0]):
            name = ALIASES.get(candidate, candidate)
            if name in self._open:
                return name
        return button if button in _ACTIONS else None

    def _first_keyword(self, text: str) -> _Word | None:
        words = text.split(" ")
        for position, word in enumerate(words):
            found = [
                self._keywords[phrase]
                for phrase in self._first_words.get(word, ())
                if words[position : position + phrase.count(" ") + 1] == phrase.split(" ")
            ]
            if found:
                return min(found, key=lambda word: self._order[word.target])
        return None


def _index(named: Iterable[tuple[str, Words]]) -> dict[str, _Word]:
    """Folded word -> what it means; who is configured first keeps it."""
    index: dict[str, _Word] = {}
    for target, words in named:
        for language, listed in words.items():
            for word in listed:
                index.setdefault(fold(word), _Word(target, language, word))
    index.pop("", None)
    return index


def _said(message: JsonObject) -> str:
    """The words of a message: its text, a caption, or the text of a quick-reply button."""
    kind = message.get("type")
    content = message.get(kind) if isinstance(kind, str) else None
    if not isinstance(content, Mapping):
        content = message.get("text")
        if not isinstance(content, Mapping):
            return ""
    for key in ("body", "caption", "text"):
        words = content.get(key)
        if isinstance(words, str):
            return words
    return ""


def _pressed(message: JsonObject) -> str | None:
    """The id of a pressed button or chosen list row."""
    interactive = message.get("interactive")
    if isinstance(interactive, Mapping):
        for kind in ("button_reply", "list_reply"):
            reply = interactive.get(kind)
            if isinstance(reply, Mapping) and isinstance(reply.get("id"), str):
                return str(reply["id"])
    button = message.get("button")
    if isinstance(button, Mapping) and isinstance(button.get("payload"), str):
        return str(button["payload"])
    return None
