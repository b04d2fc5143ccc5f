"""Services as operators change them: layers over the file, versions that cannot be used, and what is said of
them.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import each
from texts import texts

from router.config import Config, ServiceConfig
from router.config_file import ServiceTable
from router.config_rules import find_problems
from router.domains import KEYWORDS
from router.registering import with_settings
from router.registry import (
    Credentials,
    Registry,
    ServiceVersion,
    credentials_of,
    registry_of,
    version_of,
)
from router.settings import load_config

ENV = {"WHATSAPP_APP_SECRET": "0f" * 16, "WHATSAPP_VERIFY_TOKEN": "hello-meta", "JOBS_TOKEN": "a-token"}
WHSEC = "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
FILE = """
    [services.rides]
    url = "http://10.0.0.1:9001/in"
    lanes = 16
    timeout_ms = 3000
    keywords = { fr = ["course"] }
    [services.jobs]
    token_env = "JOBS_TOKEN"
    [services.wallet]
    url = "https://wallet.example.com/in"
    state = "draining"
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return configured(tmp_path, FILE)


def configured(directory: Path, toml: str) -> Config:
    (directory / "postroom.toml").write_text(toml)
    return load_config(file=None, environ=ENV, overrides={}, directory=directory)


CREATED = datetime(2030, 1, 1, tzinfo=UTC)


def version(service: str, number: int, definition: object, state: str = "active") -> ServiceVersion:
    return ServiceVersion(
        service=service, version=number, state=state, definition=definition, created_at=CREATED
    )


def registry(
    config: Config, *versions: ServiceVersion, credentials: dict[str, Credentials] | None = None
) -> Registry:
    return registry_of(config, versions, credentials or {})


def problems(config: Config, *versions: ServiceVersion) -> list[str]:
    """What is wrong with the newest one, which is not used."""
    found = registry(config, *versions)
    [unusable] = found.unusable
    assert unusable.service == versions[0].service
    assert unusable.version == versions[0].version
    assert found.versions.get(versions[0].service) != versions[0].version
    return [str(problem) for problem in unusable.problems]


# Layers


def test_without_versions_the_services_are_the_files(config: Config) -> None:
    found = registry(config)
    assert found.services == config.services
    assert (found.versions, found.unusable) == ({}, ())


def test_only_what_is_named_changes(config: Config) -> None:
    definition = {"lanes": 32, "order": "strict", "keywords": {"sw": ["gari"]}}
    found = registry(config, version("rides", 3, definition))
    base = config.services["rides"]
    keywords = {**KEYWORDS["rides"], "fr": ("course",), "sw": ("gari",)}
    assert found.services["rides"] == replace(base, lanes=32, order="strict", keywords=keywords)
    assert list(found.services) == list(config.services)
    assert all(found.services[name] is config.services[name] for name in config.services if name != "rides")
    assert (found.versions, found.unusable) == ({"rides": 3}, ())


@each("state", ["active", "paused", "draining"])
def test_the_state_is_the_versions(config: Config, state: str) -> None:
    found = registry(config, version("wallet", 1, {}, state), version("rides", 1, {}, state))
    assert found.services["wallet"].state == found.services["rides"].state == state


def test_of_the_versions_the_newest_counts(config: Config) -> None:
    found = registry(
        config,
        version("jobs", 1, {"lanes": 3}),
        version("rides", 9, {"lanes": 9}),
        version("rides", 8, {"lanes": 8, "timeout_ms": 80}),
    )
    assert (found.services["rides"].lanes, found.services["rides"].timeout_ms) == (9, 3_000)
    assert found.services["jobs"].lanes == 3
    assert found.versions == {"jobs": 1, "rides": 9}


def test_a_service_that_the_file_does_not_have_comes_last_with_the_files_defaults(tmp_path: Path) -> None:
    config = configured(tmp_path, "router_timeout_ms = 2500")
    definition = {"url": "https://chess.example.com/in", "keywords": {"en": ["chess"]}}
    found = registry(config, version("chess", 1, definition))
    assert found.services["chess"] == ServiceConfig(
        name="chess",
        url="https://chess.example.com/in",
        timeout_ms=2_500,
        public_only=frozenset({"url"}),
        keywords={"en": ("chess",)},
    )
    assert list(found.services)[-1] == "chess"


def test_one_that_is_removed_is_gone_and_another_version_brings_it_back(config: Config) -> None:
    removed = version("rides", 2, {"lanes": 3}, "removed")
    found = registry(config, removed, version("rides", 1, {"lanes": 2}))
    assert "rides" not in found.services
    assert (found.versions, found.unusable) == ({"rides": 2}, ())
    assert registry(config, version("rides", 3, {"lanes": 4}), removed).services["rides"].lanes == 4


def test_one_that_was_never_there_may_be_removed(config: Config) -> None:
    found = registry(config, version("chess", 1, {}, "removed"))
    assert found.services == config.services
    assert found.versions == {"chess": 1}


# Versions that cannot be used


def test_the_version_before_a_bad_one_goes_on(config: Config) -> None:
    newer = (version("rides", 5, {"lanes": 0}), version("rides", 4, {"lanse": 1}))
    found = registry(config, *newer, version("rides", 3, {"lanes": 3}), version("rides", 2, {"lanes": 2}))
    assert found.services["rides"].lanes == 3
    assert found.versions == {"rides": 3}
    assert [(one.service, one.version) for one in found.unusable] == [("rides", 5), ("rides", 4)]


def test_without_a_version_that_can_be_used_it_is_as_the_file_has_it(config: Config) -> None:
    found = registry(config, version("rides", 1, {"lanes": 0}), version("chess", 1, {"url": "nowhere"}))
    assert found.services == config.services
    assert found.versions == {}


def test_everything_that_is_wrong_with_it_is_said(config: Config) -> None:
    definition = {
        "url": "ftp://a/",
        "lanes": "16",
        "lanse": 16,
        "timeout_ms": 0,
        "canary_url": 5,
        "canary_share": 1.5,
        "order": "random",
        "statuses": True,
        "keywords": {"en": ["!!"], "de": ["auto"]},
        "state": "paused",
        "secret_env": "RIDES_SECRET",
        "token": "t",
    }
    found = problems(config, version("rides", 1, definition))
    assert sorted(problem.partition("; fix: ")[0] for problem in found) == [
        "services.rides.canary_share: 1.5 is not a share above 0, at most 1",
        "services.rides.canary_url: is not a string",
        "services.rides.keywords.de: is not one of routing.languages",
        "services.rides.keywords.en: '!!' has no letter or digit",
        "services.rides.lanes: is not a whole number",
        "services.rides.lanse: is not a setting",
        "services.rides.order: is not a policy",
        "services.rides.secret_env: does not belong into a definition",
        "services.rides.state: does not belong into a definition",
        "services.rides.timeout_ms: 0 is not a possible time",
        "services.rides.token: does not belong into a file",
        "services.rides.url: is not http:// or https://",
    ]
    [unknown] = [problem for problem in found if "lanse" in problem]
    assert unknown.endswith("; fix: did you mean lanes?")


def test_what_is_unknown_is_answered_with_what_is_known_here(config: Config) -> None:
    [problem] = problems(config, version("rides", 1, {"xyzzy": 1}))
    assert "known here: allow_private, breaker_failure_ratio" in problem
    assert "secret_env" not in problem
    assert "token_env" not in problem


@each("definition", [None, [], "lanes", 5, True, [["lanes", 16]]])
def test_a_definition_that_is_no_object_is_refused(config: Config, definition: object) -> None:
    [problem] = problems(config, version("rides", 2, definition), version("rides", 1, {"lanes": 1}))
    assert problem.startswith("services.rides: has a definition that cannot be read; fix: ")


def test_text_that_is_no_json_is_no_definition() -> None:
    row = {"service": "rides", "version": 7, "state": "paused", "definition": "{", "created_at": CREATED}
    assert version_of(row) == version("rides", 7, None, "paused")
    assert version_of({**row, "definition": '{"lanes": 2}'}) == version("rides", 7, {"lanes": 2}, "paused")


@each("state", ["active", "removed"])
def test_another_name_of_a_domain_is_no_service(config: Config, state: str) -> None:
    [problem] = problems(config, version("mobility", 1, {"lanes": 1}, state))
    assert problem == "services.mobility: is another name of rides; fix: change rides instead"
    assert "mobility" not in registry(config, version("mobility", 1, {})).services


@each("name", ["menu", "home", "exit"])
def test_an_action_is_no_service(config: Config, name: str) -> None:
    [problem] = problems(config, version(name, 1, {"url": "https://a.example/"}))
    assert problem.startswith(f"services.{name}: cannot be the name of a domain")


def test_a_state_that_is_none_is_refused(config: Config) -> None:
    [problem] = problems(config, version("rides", 1, {}, "asleep"))
    assert problem.startswith("services.rides.state: is not a state")


def test_a_keyword_of_another_service_is_refused(config: Config) -> None:
    [problem] = problems(config, version("chess", 1, {"keywords": {"en": ["chess", "Taxi"]}}))
    assert problem.startswith("services.chess.keywords.en: 'Taxi' is claimed by rides and by chess")
    [problem] = problems(config, version("chess", 1, {"keywords": {"en": ["menu"]}}))
    assert problem.startswith("services.chess.keywords.en: 'menu' means menu")


def test_one_that_the_routing_leads_to_is_not_removed(tmp_path: Path) -> None:
    config = configured(tmp_path, "[routing]\nfallback = 'ai_agents'\nbuttons = { help = 'profile' }")
    [problem] = problems(config, version("ai_agents", 1, {}, "removed"))
    assert problem.startswith("routing.fallback: 'ai_agents' is not a domain")
    [problem] = problems(config, version("profile", 1, {}, "removed"))
    assert problem.startswith("routing.buttons.help: 'profile' is not a domain")
    assert registry(config, version("profile", 1, {}, "removed")).services == config.services


def test_what_is_wrong_with_the_file_is_not_held_against_a_version(config: Config) -> None:
    broken = replace(config, session_ttl_hours=0)
    found = registry(broken, version("rides", 1, {"lanes": 3}))
    assert found.services["rides"].lanes == 3
    assert found.unusable == ()


# Which addresses a URL may have


@each("field", ["url", "canary_url", "shadow_url"])
def test_a_url_from_the_database_is_public(config: Config, field: str) -> None:
    definition = {field: "https://new.example.com/in"}
    rides = registry(config, version("rides", 1, definition)).services["rides"]
    assert rides.allow_private
    assert rides.public_only == {field}
    assert [rides.is_private_allowed(name) for name in ("url", "canary_url", "shadow_url")] == [
        name != field for name in ("url", "canary_url", "shadow_url")
    ]


def test_other_settings_leave_the_files_url_as_it_is(config: Config) -> None:
    rides = registry(config, version("rides", 1, {"lanes": 3})).services["rides"]
    assert rides.url == "http://10.0.0.1:9001/in"
    assert rides.is_private_allowed("url")


@each("said", [True, False])
def test_unless_the_database_says_whether_it_has_to(config: Config, said: bool) -> None:
    definition = {"url": "http://10.0.0.2/in", "allow_private": said}
    rides = registry(config, version("rides", 1, definition)).services["rides"]
    assert rides.is_private_allowed("url") is said


# What is known beside the versions


def test_credentials_are_those_of_the_database_where_it_has_some(config: Config) -> None:
    credentials = {
        "rides": Credentials(secret=WHSEC),
        "jobs": Credentials(token_sha256="ab" * 32),
        "chess": Credentials(secret=WHSEC, token_sha256="cd" * 32),
    }
    found = registry(
        config,
        version("chess", 1, {"keywords": {"en": ["chess"]}}),
        version("jobs", 1, {"lanes": 3}),
        credentials=credentials,
    )
    assert found.services["rides"] == replace(config.services["rides"], secret=WHSEC)
    jobs = found.services["jobs"]
    assert (jobs.token, jobs.token_sha256, jobs.credential) == (None, "ab" * 32, "ab" * 32)
    assert (jobs.lanes, jobs.attaches) == (3, True)
    assert found.services["chess"].secret == WHSEC
    assert found.services["chess"].attaches
    assert found.services["wallet"] is config.services["wallet"]


def test_what_the_database_does_not_have_is_the_files(config: Config) -> None:
    before = config.services["jobs"]
    jobs = registry(config, credentials={"jobs": Credentials(secret=WHSEC)}).services["jobs"]
    assert jobs == replace(before, secret=WHSEC)
    assert jobs.token == "a-token"


def test_credentials_of_a_service_that_there_is_not_are_nothing(config: Config) -> None:
    rows = [{"service": "chess", "secret": WHSEC, "token_sha256": None}]
    assert credentials_of(rows) == {"chess": Credentials(WHSEC)}
    assert registry_of(config, (), credentials_of(rows)).services == config.services


def test_no_problem_shows_a_secret(config: Config) -> None:
    credentials = {"rides": Credentials(secret="whsec_secret!", token_sha256="ab" * 32)}
    found = registry(config, version("rides", 1, {"lanes": 0, "token": "tops3cret"}), credentials=credentials)
    assert "s3cret" not in repr(found)
    assert "whsec_secret!" not in repr(found)


def test_a_setting_that_is_null_is_no_reason_to_fall_over(config: Config) -> None:
    found = registry(config, version("rides", 2, {"timeout_ms": None}), version("rides", 1, {"lanes": 3}))
    assert found.services["rides"].timeout_ms == 3_000


@each("state", ["active", "removed"])
def test_a_keyword_may_move_to_a_service_whose_name_comes_first(config: Config, state: str) -> None:
    """`services set` looks at the first version beside the second, and takes it."""
    chess = version("chess", 1, {"keywords": {"en": ["job"]}})
    jobs = version("jobs", 1, {"keywords": {"en": ["vacancy"]}}, state)
    assert registry(config, jobs, chess).unusable == ()
    assert registry(config, chess, jobs).unusable == ()


def test_credentials_that_cannot_be_used_are_not_used(config: Config) -> None:
    found = registry(config, credentials={"rides": Credentials(secret="by hand")})
    assert find_problems(replace(config, services=found.services)) == ()


def test_the_first_setting_leaves_the_state_as_the_file_has_it(config: Config) -> None:
    before = ServiceVersion(service="wallet", version=0, state="active", definition={})
    changed = with_settings({"lanes": 16}, frozenset())(before, config.services["wallet"])
    found = registry(config, replace(changed, version=1))
    assert (found.services["wallet"].lanes, found.services["wallet"].state) == (16, "draining")


# Whatever a definition is

SCALARS = st.one_of(st.booleans(), st.integers(), st.floats(), texts(max_size=8))
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(texts(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
KEYS = st.one_of(st.sampled_from(sorted(ServiceTable.model_fields)), texts(max_size=8))
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "url": st.sampled_from(["https://a.example/", "http://10.0.0.1/", "http://a:0/"]),
    "timeout_ms": st.integers(-1, 20_000),
    "lanes": st.integers(0, 1_025),
    "lanes_min": st.integers(0, 20),
    "canary_share": st.floats(0, 1),
    "order": st.sampled_from(["strict", "continue"]),
    "keywords": st.dictionaries(
        st.sampled_from(["en", "fr", "de"]),
        st.lists(st.sampled_from(["taxi", "job", "menu", "chess", "!!"]), max_size=3),
        max_size=3,
    ),
}
DEFINITIONS = st.one_of(
    st.none(), JSON, st.dictionaries(KEYS, JSON, max_size=4), st.fixed_dictionaries({}, optional=LIKELY)
)
VERSIONS = st.lists(
    st.builds(
        version,
        st.sampled_from(["rides", "jobs", "chess", "mobility", "menu", "ai_agents"]),
        st.integers(1, 9),
        DEFINITIONS,
        st.sampled_from(["active", "paused", "draining", "removed", "asleep"]),
    ),
    max_size=6,
)


@given(versions=VERSIONS)
def test_whatever_the_versions_are_the_services_can_be_used(versions: list[ServiceVersion]) -> None:
    for config in (PLAIN, FALLS_BACK):
        found = registry_of(config, versions, {})
        assert find_problems(replace(config, services=found.services)) == ()
        assert all(one.problems for one in found.unusable)
        assert all(problem.fix for one in found.unusable for problem in one.problems)
        said = {(one.service, one.version) for one in versions}
        assert set(found.versions.items()) <= said


PLAIN = Config.for_embedding(app_secret="0f" * 16, verify_token="hello-meta")
FALLS_BACK = replace(PLAIN, routing=replace(PLAIN.routing, fallback="ai_agents"))


def test_a_token_that_makes_the_configuration_wrong_is_not_used(config: Config) -> None:
    """The port of services is the admin port's number, which is no matter while nobody has a token."""
    services = {name: replace(service, token=None) for name, service in config.services.items()}
    wrong = replace(config, services_port=config.admin_port, services=services)
    given = {"rides": Credentials(token_sha256="ab" * 32)}
    for versions in ((), (version("jobs", 1, {"lanes": 3}),)):
        found = registry(wrong, *versions, credentials=given)
        [unusable] = found.unusable
        assert (unusable.service, unusable.version) == ("rides", 0)
        assert found.services["rides"].credential is None
        assert found.versions == ({"jobs": 1} if versions else {})


def test_two_services_never_have_one_token(config: Config) -> None:
    given = {name: Credentials(token_sha256="ab" * 32) for name in ("rides", "jobs")}
    found = registry(config, credentials=given)
    assert len(found.unusable) == 1
    assert sum(service.credential is not None for service in found.services.values()) == 1


def test_a_service_is_closed_since_the_first_of_its_closed_versions(config: Config) -> None:
    times = [CREATED + timedelta(hours=hour) for hour in range(4)]
    states = ["draining", "active", "draining", "removed"]
    versions = [
        replace(version("chess", number, {}, state), created_at=at)
        for number, (state, at) in enumerate(zip(states, times, strict=True), 1)
    ]
    assert registry(config, *reversed(versions)).closed["chess"].since == times[2]
