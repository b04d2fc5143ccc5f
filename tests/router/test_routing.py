"""The six rules and their order, what counts as a word, and the home menu that answers the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import each
from texts import texts

from actors.messages import Item, Session
from actors.ports import Route
from router.config import RoutingConfig, ServiceConfig, default_services
from router.domains import EXIT, HOME, KEYWORDS, MENU, fold
from router.home_menu import HomeMenu, MenuRow, country_of
from router.routing import Routes

SERVICES = default_services()
ROWS = (
    MenuRow(None, "en", "rides", "Rides"),
    MenuRow(None, "en", "jobs", "Jobs", "Work near you"),
    MenuRow(None, "fr", "rides", "Trajets"),
    MenuRow("RW", "en", "wallet", "Wallet"),
    MenuRow("RW", "rw", "wallet", "Ikofi"),
)
ROUTES = Routes(RoutingConfig(), SERVICES, HomeMenu(ROWS))


def decide(
    message: dict[str, Any] | str,
    active: str | None = None,
    *,
    routes: Routes = ROUTES,
    wa_id: str | None = "41790000000",
) -> Route:
    if isinstance(message, str):
        message = {"type": "text", "text": {"body": message}}
    item = Item(
        seq=1,
        key="msg_" + "0" * 32,
        message_id="wamid.1",
        session_key="1:2",
        phone_number_id="1",
        wa_id=wa_id,
        user_id=None,
        received_at=datetime(2026, 1, 1, tzinfo=UTC),
        correlation_id="c",
        traceparent=None,
        message=message,
        contact=None,
    )
    return routes.decide(item, Session(key="1:2", phone_number_id="1", active_service=active))


def button(payload: object, text: str = "Yes please") -> dict[str, Any]:
    return {"type": "button", "button": {"payload": payload, "text": text}}


def pressed(id: object, kind: str = "button_reply", title: str = "Go") -> dict[str, Any]:
    return {"type": "interactive", "interactive": {"type": kind, kind: {"id": id, "title": title}}}


def titles(route: Route) -> list[str]:
    (reply,) = route.replies
    message = reply.as_message()
    return [row["title"] for row in message["interactive"]["action"]["sections"][0]["rows"]]


def where(route: Route) -> tuple[str, str | None]:
    return route.rule, route.domain


class TestOrder:
    """Each rule against the next one: the message satisfies both."""

    def test_1_a_whole_action_word_is_before_a_pressed_id(self) -> None:
        assert where(decide(button("rides", text="Menu"))) == ("menu", None)

    def test_2_a_pressed_id_is_before_a_whole_keyword(self) -> None:
        assert where(decide(button("rides", text="jobs"))) == ("button", "rides")

    def test_2_a_pressed_id_is_before_the_active_service(self) -> None:
        assert where(decide(pressed("rides"), "wallet")) == ("button", "rides")

    def test_3_a_whole_keyword_of_another_domain_is_before_the_active_service(self) -> None:
        assert where(decide("taxi", "wallet")) == ("keyword", "rides")

    def test_4_the_active_service_keeps_its_own_keyword_and_every_sentence(self) -> None:
        assert where(decide("taxi", "rides")) == ("active_service", "rides")
        assert where(decide("a taxi to the market", "wallet")) == ("active_service", "wallet")
        assert where(decide("hello", "wallet")) == ("active_service", "wallet")
        assert where(decide("show me the menu please", "wallet")) == ("active_service", "wallet")

    def test_5_a_keyword_anywhere_is_before_the_fallback(self) -> None:
        assert where(decide("I need a taxi now")) == ("keyword", "rides")

    def test_6_the_rest_falls_back(self) -> None:
        route = decide("hello there")
        assert where(route) == ("fallback", None)
        assert not route.leave
        assert titles(route) == ["Rides", "Jobs"]

    def test_an_unknown_pressed_id_is_no_button(self) -> None:
        assert where(decide(button("yes_42", text="taxi"))) == ("keyword", "rides")
        assert where(decide(pressed("yes_42"), "wallet")) == ("active_service", "wallet")


class TestActions:
    @each(("action", "words"), [("menu", MENU), ("home", HOME), ("exit", EXIT)])
    @each("active", [None, "wallet"])
    def test_every_word_works_also_while_a_service_has_the_conversation(
        self, action: str, words: Mapping[str, Sequence[str]], active: str | None
    ) -> None:
        for word in chain.from_iterable(words.values()):
            route = decide(f"  {word.upper()} !", active)
            assert where(route) == (action, None), word
            assert route.leave
            assert len(route.replies) == 1

    @each(
        ("word", "start"),
        [("exit", "Goodbye"), ("sortir", "Au revoir"), ("sohoka", "Murabeho"), ("toka", "Kwaheri")],
    )
    def test_exit_says_goodbye_in_the_language_of_the_word(self, word: str, start: str) -> None:
        (reply,) = decide(word).replies
        assert reply.text is not None
        assert reply.text.startswith(start)

    def test_the_menu_speaks_the_language_of_the_word(self) -> None:
        assert titles(decide("accueil")) == ["Trajets"]
        assert titles(decide("home")) == ["Rides", "Jobs"]

    def test_a_word_within_a_sentence_is_no_action(self) -> None:
        assert where(decide("please exit now")) == ("fallback", None)

    @pytest.mark.parametrize("action", ["menu", "home", "exit"])
    def test_a_pressed_id_may_be_an_action(self, action: str) -> None:
        route = decide(pressed(action), "wallet")
        assert where(route) == ("button", None)
        assert route.leave
        assert len(route.replies) == 1


class TestButtons:
    @each("id", ["rides", "mobility", "rides:book", "rides.book.now", "mobility:1"])
    @each("kind", ["button_reply", "list_reply"])
    def test_an_id_names_a_domain(self, id: str, kind: str) -> None:
        assert where(decide(pressed(id, kind))) == ("button", "rides")
        assert where(decide(button(id))) == ("button", "rides")

    @each("id", ["ridesharing", "Rides", "book:rides", "", 5, None, ["rides"], "menu:1"])
    def test_anything_else_does_not(self, id: object) -> None:
        assert where(decide(pressed(id), "wallet")) == ("active_service", "wallet")
        assert where(decide(button(id), "wallet")) == ("active_service", "wallet")

    def test_configured_ids_come_first(self) -> None:
        buttons = {"yes_42": "jobs", "rides": "wallet", "start": "menu"}
        routes = Routes(RoutingConfig(buttons=buttons), SERVICES, HomeMenu(ROWS))
        assert where(decide(pressed("yes_42"), routes=routes)) == ("button", "jobs")
        assert where(decide(pressed("rides"), routes=routes)) == ("button", "wallet")
        assert where(decide(pressed("start"), "wallet", routes=routes)) == ("button", None)

    def test_the_answer_of_a_flow_presses_nothing(self) -> None:
        flow = {"type": "nfm_reply", "nfm_reply": {"id": "rides", "response_json": "{}"}}
        assert where(decide({"type": "interactive", "interactive": flow}, "jobs")) == (
            "active_service",
            "jobs",
        )


class TestWords:
    @each("domain", KEYWORDS)
    def test_every_keyword_routes_in_any_case_alone_and_in_a_sentence(self, domain: str) -> None:
        for word in chain.from_iterable(KEYWORDS[domain].values()):
            assert where(decide(word.upper())) == ("keyword", domain), word
            assert where(decide(f"xx, {word.title()}? xx")) == ("keyword", domain), word

    @each("text", ["marche", "MARCHÉ", "marche\u0301", "le Marché,", "(marché)", "marché\n"])
    def test_accents_and_punctuation_do_not_matter(self, text: str) -> None:
        assert decide(text).domain == "marketplace"

    @each("text", ["taxis", "taxidermy", "taxi1", "xtaxi", "prejob", "payback"])
    def test_only_whole_words_count(self, text: str) -> None:
        assert where(decide(text)) == ("fallback", None)
        assert where(decide(f"a {text} b")) == ("fallback", None)

    def test_the_earliest_word_wins(self) -> None:
        assert decide("the job is to drive a taxi").domain == "jobs"
        assert decide("a taxi to the job").domain == "rides"

    def test_the_domain_that_is_configured_first_wins_a_tie(self) -> None:
        ours = {"en": ("moving day", "van")}
        first = ServiceConfig(name="first", keywords={"en": ("moving", "van")})
        second = ServiceConfig(name="second", keywords=ours)
        for order in ((first, second), (second, first)):
            routes = Routes(RoutingConfig(), {service.name: service for service in order})
            assert decide("van", routes=routes).domain == order[0].name
            assert decide("my moving day", routes=routes).domain == order[0].name
            assert decide("moving out", routes=routes).domain == "first"

    def test_a_phrase_is_found_as_a_whole(self) -> None:
        services = {"a": ServiceConfig(name="a", keywords={"en": ("Real Estate",)})}
        routes = Routes(RoutingConfig(), services)
        assert decide("some real  estate!", routes=routes).domain == "a"
        assert decide("real-estate", routes=routes).rule == "keyword"
        assert decide("real big estate", routes=routes).domain is None
        assert decide("so real", routes=routes).domain is None

    @pytest.mark.parametrize("kind", ["image", "video", "document"])
    def test_a_caption_has_words(self, kind: str) -> None:
        assert decide({"type": kind, kind: {"id": "1", "caption": "my taxi"}}).domain == "rides"

    @each("text", ["", " ", "!?", "\u200b", "🙂"])
    def test_a_text_without_words_claims_nothing(self, text: str) -> None:
        services = {"a": ServiceConfig(name="a", keywords={"en": ("!!", "taxi")})}
        assert where(decide(text, routes=Routes(RoutingConfig(menu={"en": ("?",)}), services))) == (
            "fallback",
            None,
        )

    def test_of_a_long_text_only_the_start_is_searched(self) -> None:
        assert decide("x " * 900 + "taxi").domain == "rides"
        assert decide("x " * 1000 + "taxi").domain is None


class TestFallback:
    def test_a_domain(self) -> None:
        routes = Routes(RoutingConfig(fallback="ai_agents"), SERVICES)
        assert where(decide("hello", routes=routes)) == ("fallback", "ai_agents")
        assert where(decide({"type": "reaction"}, routes=routes)) == ("fallback", "ai_agents")

    @each("kind", ["reaction", "system", "unsupported", "edit", "revoke"])
    def test_what_asks_nothing_is_answered_with_nothing(self, kind: str) -> None:
        message = {"type": kind, kind: {"emoji": "👍"}}
        assert where(decide(message)) == ("fallback", None)
        assert decide(message).replies == ()
        assert decide(message, "wallet").domain == "wallet"

    @each("kind", ["text", "image", "audio", "location", "hologram", "request_welcome", None, []])
    def test_what_else_there_is_gets_the_menu(self, kind: object) -> None:
        assert len(decide({"type": kind, "image": {"id": "1"}}).replies) == 1

    def test_the_language_of_the_menu_is_the_first_one_configured(self) -> None:
        routes = Routes(RoutingConfig(languages=("fr", "en")), SERVICES, HomeMenu(ROWS))
        assert titles(decide("hello", routes=routes)) == ["Trajets"]


def with_states(states: Mapping[str, str], routing: RoutingConfig | None = None) -> Routes:
    """Routes over the usual services, some of them in another state."""
    services = {
        name: replace(service, state=states.get(name, "active")) for name, service in SERVICES.items()
    }
    return Routes(routing if routing is not None else RoutingConfig(), services, HomeMenu(ROWS))


class TestDraining:
    routes = with_states({"rides": "draining"})

    @each("text", ["taxi", "I need a taxi now", "TAGISI"])
    def test_its_words_lead_nobody_to_it(self, text: str) -> None:
        assert where(decide(text)) == ("keyword", "rides")
        assert where(decide(text, routes=self.routes)) == ("fallback", None)
        assert where(decide(text, "wallet", routes=self.routes)) == ("active_service", "wallet")

    def test_words_of_others_in_the_same_text_do(self) -> None:
        assert where(decide("a taxi to the job", routes=self.routes)) == ("keyword", "jobs")

    @each("id", ["rides", "mobility", "rides:book", "start"])
    def test_no_button_leads_to_it(self, id: str) -> None:
        buttons = RoutingConfig(buttons={"start": "rides"})
        assert where(decide(pressed(id), routes=with_states({}, buttons))) == ("button", "rides")
        routes = with_states({"rides": "draining"}, buttons)
        for message in (pressed(id), pressed(id, "list_reply"), button(id)):
            assert where(decide(message, routes=routes)) == ("fallback", None)
            assert where(decide(message, "wallet", routes=routes)) == ("active_service", "wallet")

    def test_nothing_falls_back_to_it(self) -> None:
        routing = RoutingConfig(fallback="ai_agents")
        assert where(decide("hello", routes=with_states({}, routing))) == ("fallback", "ai_agents")
        route = decide("hello", routes=with_states({"ai_agents": "draining"}, routing))
        assert where(route) == ("fallback", None)
        assert titles(route) == ["Rides", "Jobs"]

    @each("message", ["hello", "taxi", "a taxi please", pressed("rides:book"), button("rides")])
    def test_the_conversation_that_is_with_it_goes_on(self, message: dict[str, Any] | str) -> None:
        assert where(decide(message, "rides", routes=self.routes)) == ("active_service", "rides")

    def test_the_conversation_that_is_with_it_may_leave(self) -> None:
        assert where(decide("exit", "rides", routes=self.routes)) == ("exit", None)
        assert where(decide("job", "rides", routes=self.routes)) == ("keyword", "jobs")
        assert where(decide(pressed("jobs"), "rides", routes=self.routes)) == ("button", "jobs")

    @each("message", ["taxi", "a taxi", pressed("rides")])
    def test_to_one_that_is_paused_everything_leads(self, message: dict[str, Any] | str) -> None:
        routes = with_states({"rides": "paused"})
        assert decide(message, routes=routes).domain == "rides"
        assert where(decide("hello", "rides", routes=routes)) == ("active_service", "rides")


class TestGone:
    routes = Routes(
        RoutingConfig(), {name: one for name, one in SERVICES.items() if name != "rides"}, HomeMenu(ROWS)
    )

    @each("message", ["hello", "taxi", "a taxi", pressed("rides"), {"type": "image", "image": {"id": "1"}}])
    def test_a_conversation_whose_service_is_gone_is_with_nobody(self, message: dict[str, Any] | str) -> None:
        route = decide(message, "rides", routes=self.routes)
        assert where(route) == ("fallback", None)
        assert len(route.replies) == 1
        assert not route.leave

    def test_words_and_buttons_lead_it_to_another(self) -> None:
        assert where(decide("a job please", "rides", routes=self.routes)) == ("keyword", "jobs")
        assert where(decide("job", "rides", routes=self.routes)) == ("keyword", "jobs")
        assert where(decide(pressed("jobs"), "rides", routes=self.routes)) == ("button", "jobs")


class TestHomeMenu:
    menu = HomeMenu(ROWS)

    @each(
        ("country", "language", "expected"),
        [
            (None, "en", ["Rides", "Jobs"]),
            ("KE", "en", ["Rides", "Jobs"]),
            ("RW", "en", ["Wallet"]),
            ("RW", "rw", ["Ikofi"]),
            ("RW", "fr", ["Trajets"]),
            ("RW", "sw", ["Wallet"]),
            (None, "sw", ["Rides", "Jobs"]),
        ],
    )
    def test_rows_are_those_of_the_country_then_of_all_then_english(
        self, country: str | None, language: str, expected: list[str]
    ) -> None:
        assert [row.title for row in self.menu.rows(country, language)] == expected

    @each(
        ("wa_id", "country"),
        [
            ("250788000001", "RW"),
            ("254700000000", "KE"),
            ("15550783881", "US"),
            ("12507770000", "US"),
            ("33600000000", "FR"),
            ("201000000000", "EG"),
            ("41790000000", None),
            ("US.1349", None),
            ("", None),
            (None, None),
        ],
    )
    def test_the_country_is_that_of_the_number(self, wa_id: str | None, country: str | None) -> None:
        assert country_of(wa_id) == country

    def test_the_country_of_the_sender_chooses_the_rows(self) -> None:
        assert titles(decide("menu", wa_id="250788000001")) == ["Wallet"]
        assert titles(decide("urutonde", wa_id="250788000001")) == ["Ikofi"]
        assert titles(decide("hello", wa_id="250788000001")) == ["Wallet"]

    def test_the_message_is_a_list_as_the_api_wants_it(self) -> None:
        message = self.menu.reply(None, "en").as_message()
        assert message["type"] == "interactive"
        assert message["interactive"]["type"] == "list"
        assert message["interactive"]["body"]["text"]
        assert 1 <= len(message["interactive"]["action"]["button"]) <= 20
        assert message["interactive"]["action"]["sections"] == [
            {
                "rows": [
                    {"id": "rides", "title": "Rides"},
                    {"id": "jobs", "title": "Jobs", "description": "Work near you"},
                ]
            }
        ]

    def test_every_row_routes_when_it_is_chosen(self) -> None:
        for row in ROWS:
            assert where(decide(pressed(row.domain, "list_reply"))) == ("button", row.domain)

    def test_there_are_ten_rows_at_most_and_a_text_when_there_is_none(self) -> None:
        many = HomeMenu(MenuRow(None, "en", "rides", str(number)) for number in range(20))
        assert [row.title for row in many.rows("RW", "fr")] == [str(number) for number in range(10)]
        assert HomeMenu(()).reply("RW", "en").text

    def test_the_menu_may_be_replaced_in_place(self) -> None:
        routes = Routes(RoutingConfig(), SERVICES)
        assert decide("menu", routes=routes).replies[0].text
        routes.menu = HomeMenu(ROWS)
        assert titles(decide("menu", routes=routes)) == ["Rides", "Jobs"]


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(texts(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
PARTS = st.dictionaries(
    st.sampled_from(["body", "caption", "text", "payload", "id", "button_reply", "list_reply"]),
    JSON,
    max_size=3,
)
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "type": st.one_of(st.sampled_from(["text", "image", "button", "interactive", "reaction", "x"]), JSON),
        **{name: st.one_of(PARTS, JSON) for name in ("text", "image", "button", "x", "reaction")},
        "interactive": st.one_of(
            st.fixed_dictionaries({}, optional={"button_reply": st.one_of(PARTS, JSON), "list_reply": PARTS}),
            JSON,
        ),
    },
)
ACTIVE = st.one_of(st.none(), st.sampled_from(list(SERVICES)))
ACTION_WORDS = [word for words in (MENU, HOME, EXIT) for listed in words.values() for word in listed]


class TestAnything:
    @given(MESSAGES, ACTIVE, st.sampled_from(["menu", "ai_agents"]), st.one_of(st.none(), texts(max_size=4)))
    def test_every_message_is_decided_for_a_configured_domain(
        self, message: dict[str, Any], active: str | None, fallback: str, wa_id: str | None
    ) -> None:
        routes = Routes(RoutingConfig(fallback=fallback), SERVICES, HomeMenu(ROWS))
        route = decide(message, active, routes=routes, wa_id=wa_id)
        assert route.domain is None or route.domain in SERVICES
        assert route.rule in {"menu", "home", "exit", "button", "keyword", "active_service", "fallback"}
        assert route.reason
        assert route.domain is None or (route.replies == () and not route.leave)

    @given(texts(max_size=60), ACTIVE)
    def test_every_text_too(self, text: str, active: str | None) -> None:
        route = decide(text, active)
        assert route.domain is None or route.domain in SERVICES

    @given(
        st.sampled_from(ACTION_WORDS),
        st.text(alphabet=" \t\n!?.,;:-", max_size=6),
        st.text(alphabet=" \t\n!?.,;:-", max_size=6),
        st.booleans(),
        ACTIVE,
    )
    def test_an_action_word_always_wins(
        self, word: str, before: str, after: str, upper: bool, active: str | None
    ) -> None:
        route = decide(before + (word.upper() if upper else word) + after, active)
        assert route.rule in {"menu", "home", "exit"}
        assert route.leave

    @given(texts(max_size=40))
    def test_folding_twice_changes_nothing(self, text: str) -> None:
        assert fold(fold(text)) == fold(text)

    @given(
        st.sampled_from([w for words in KEYWORDS.values() for listed in words.values() for w in listed]),
        ACTIVE,
    )
    def test_an_active_service_keeps_or_yields_to_another_domains_word(
        self, word: str, active: str | None
    ) -> None:
        alone, among = decide(word, active), decide(f"xx {word} xx", active)
        assert alone.rule == ("active_service" if alone.domain == active else "keyword")
        assert (among.rule, among.domain) == (
            ("active_service", active) if active else ("keyword", alone.domain)
        )


def test_words_of_two_languages_may_be_the_same() -> None:
    rides = replace(SERVICES["rides"], keywords={"en": ("taxi",), "fr": ("taxi", "Taxi")})
    assert decide("taxi", routes=Routes(RoutingConfig(), {"rides": rides})).domain == "rides"
