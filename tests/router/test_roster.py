"""The services of this moment: what stays as it is when others change, and what goes to a closed one."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any

import pytest
import trio

from actors.messages import Ack, Envelope, Item, Session
from router.config import Config, ServiceConfig
from router.domains import KEYWORDS
from router.registry import Credentials, ServiceVersion
from router.retry import Backoff
from router.roster import Roster

START = datetime(2030, 1, 1, tzinfo=UTC)
RIDES, JOBS = "https://rides.example.com/", "https://jobs.example.com/"


class Place:
    """A roster, and the URLs to which it had lanes made."""

    def __init__(self, handlers: tuple[str, ...] = ()) -> None:
        self.now = START
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.config = Config.for_embedding(
            app_secret="s",
            verify_token="t",
            services=[ServiceConfig(name="rides", url=RIDES), ServiceConfig(name="jobs", url=JOBS)],
        )
        self.roster = Roster(
            self.config,
            dict.fromkeys(handlers, echo),
            open_http_lane=self._open_http_lane,
            retry=Backoff(lambda: 1.0),
            clock=lambda: self.now,
            on_breaker=lambda name, breaker: None,
        )
        self.versions: list[ServiceVersion] = []

    def _open_http_lane(self, url: str, secret: str | None, **said: Any) -> Any:
        said.pop("known_domain")
        self.asked.append((url, {"secret": secret, **said}))
        return object()

    def change(self, name: str, state: str = "active", **definition: Any) -> bool:
        self.write(name, state, **definition)
        return self.roster.use(self.versions, {})

    def write(self, name: str, state: str = "active", **definition: Any) -> None:
        """An hour later."""
        self.now += timedelta(hours=1)
        number = 1 + sum(one.service == name for one in self.versions)
        version = ServiceVersion(
            service=name, version=number, state=state, definition=definition, created_at=self.now
        )
        self.versions.insert(0, version)

    def specs(self) -> dict[str, Any]:
        return {spec.name: spec for spec in self.roster.specs()}

    def goes_to(self, text: str, *, received: datetime, active: str | None = None) -> str | None:
        item = Item(
            seq=1,
            key="msg_1",
            message_id=None,
            session_key="1:2",
            phone_number_id="1",
            wa_id="2",
            user_id=None,
            received_at=received,
            correlation_id="c",
            traceparent=None,
            message={"type": "text", "text": {"body": text}},
            contact=None,
        )
        return self.roster.decide(item, Session(key="1:2", phone_number_id="1", active_service=active)).domain


async def echo(envelope: Envelope) -> Ack:
    return Ack()


def test_what_did_not_change_is_the_same_object() -> None:
    place = Place()
    before = place.specs()
    assert place.change("rides", url="https://rides-2.example.com/")
    after = place.specs()
    assert after["jobs"] is before["jobs"]
    assert after["rides"] is not before["rides"]
    assert place.asked[-1] == (
        "https://rides-2.example.com/", {"secret": None, "allow_private": False, "shadow": False}
    )  # fmt: skip
    assert not place.roster.use(place.versions, {})
    assert place.specs()["rides"] is after["rides"]


def test_a_url_that_an_operator_gives_goes_before_a_handler_and_one_of_the_file_does_not() -> None:
    place = Place(handlers=("rides", "wallet"))
    assert [url for url, _ in place.asked] == [JOBS]
    place.change("wallet", url="https://wallet.example.com/")
    assert [url for url, _ in place.asked] == [JOBS, "https://wallet.example.com/"]
    place.change("wallet")
    assert {"rides", "wallet"} <= place.specs().keys()
    assert len(place.asked) == 2


def test_canary_and_shadow_have_lanes_of_their_own_and_the_shadow_is_told() -> None:
    place = Place()
    place.asked.clear()
    place.change(
        "rides",
        allow_private=True,
        canary_url="http://10.0.0.2/",
        shadow_url="http://10.0.0.3/",
    )
    assert [(url, said["shadow"], said["allow_private"]) for url, said in place.asked] == [
        (RIDES, False, True),
        ("http://10.0.0.2/", False, True),
        ("http://10.0.0.3/", True, True),
    ]


@pytest.mark.parametrize("state", ["removed", "draining"])
def test_what_was_accepted_before_a_service_was_closed_goes_to_it(state: str) -> None:
    place = Place()
    place.change("chess", keywords={"en": ["chess"]}, url="https://chess.example.com/")
    assert place.change("chess", state, keywords={"en": ["chess"]}, url="https://chess.example.com/")
    before, after = place.now - timedelta(seconds=1), place.now
    assert place.goes_to("chess", received=before) == "chess"
    assert place.goes_to("hello", received=before, active="chess") == "chess"
    assert place.goes_to("chess", received=after) is None
    kept = "chess" if state == "draining" else None
    assert place.goes_to("hello", received=after, active="chess") == kept
    assert place.goes_to("taxi", received=before) == "rides"


def test_so_it_does_after_a_restart() -> None:
    place = Place()
    place.change("chess", keywords={"en": ["chess"]})
    place.change("chess", "removed", keywords={"en": ["chess"]})
    again = Place()
    again.roster.use(place.versions, {})
    assert again.goes_to("chess", received=place.now - timedelta(seconds=1)) == "chess"
    assert again.goes_to("chess", received=place.now) is None


def test_a_service_that_the_file_has_no_more_is_closed_from_then_on() -> None:
    place = Place()
    place.now += timedelta(hours=1)
    services = {name: one for name, one in place.config.services.items() if name != "rides"}
    assert place.roster.reload(replace(place.config, services=services))
    assert "rides" not in place.specs()
    assert place.goes_to("taxi", received=place.now - timedelta(seconds=1)) == "rides"
    assert place.goes_to("taxi", received=place.now) is None
    assert place.roster.reload(place.config)
    assert place.goes_to("taxi", received=place.now) == "rides"


def test_words_of_the_file_are_read_again() -> None:
    place = Place()
    rides = replace(place.config.services["rides"], keywords={**KEYWORDS["rides"], "en": ("gari",)})
    assert place.roster.reload(replace(place.config, services={**place.config.services, "rides": rides}))
    assert place.goes_to("gari", received=START) == "rides"
    assert place.goes_to("cab", received=START) is None


async def test_connections_stay_while_the_token_is_the_same() -> None:
    place = Place()
    first, second = (sha256(token).hexdigest() for token in (b"first", b"second"))

    def use(token: str | None) -> None:
        credentials = {} if token is None else {"wallet": Credentials(token_sha256=token)}
        place.roster.use(place.versions, credentials)

    use(first)
    attached = place.roster.attached["wallet"]
    assert attached.is_authorized("first")
    assert place.roster.credentials == {first: "wallet"}
    place.write("wallet", lanes=3)
    before = place.specs()["wallet"]
    use(first)
    assert place.specs()["wallet"] is not before
    assert place.roster.attached["wallet"] is attached
    assert not attached.ended.is_set()
    port_has = place.roster.attached
    use(second)
    assert not place.roster.attached["wallet"].is_authorized("first")
    assert attached.ended.is_set()
    use(None)
    assert place.roster.attached == {}
    assert place.roster.attached is port_has
    with trio.fail_after(1):
        await attached.ended.wait()
