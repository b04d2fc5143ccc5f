"""The configuration: where values come from, every error with its name and fix, and no secret in any text."""

from __future__ import annotations

import base64
import contextlib
import string
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tables import each
from texts import texts

from router.config import (
    AppConfig,
    Config,
    ConfigError,
    LimitsConfig,
    RoutingConfig,
    SenderConfig,
    ServiceConfig,
)
from router.config_rules import checked, find_problems
from router.domains import ALIASES, KEYWORDS, LANGUAGES, fold
from router.settings import load_config

EXAMPLE = Path(__file__).parents[2] / "router" / "postroom.example.toml"
WHSEC = "whsec_" + base64.b64encode(bytes(range(32))).decode()
ENV = {"WHATSAPP_APP_SECRET": "0f" * 16, "WHATSAPP_VERIFY_TOKEN": "hello-meta"}


def load(
    directory: Path, toml: str | bytes = "", environ: dict[str, str] | None = None, **overrides: Any
) -> Config:
    raw = toml if isinstance(toml, bytes) else toml.encode()
    (directory / "postroom.toml").write_bytes(raw)
    return load_config(
        file=None, environ=ENV if environ is None else environ, overrides=overrides, directory=directory
    )


def errors(
    directory: Path, toml: str | bytes = "", environ: dict[str, str] | None = None, **overrides: Any
) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(directory, toml, environ, **overrides)
    assert str(caught.value).split("\n") == [str(problem) for problem in caught.value.problems]
    assert all(problem.name and problem.message and problem.fix for problem in caught.value.problems)
    return str(caught.value).split("\n")


def test_environment_alone_is_enough(tmp_path: Path) -> None:
    config = load_config(file=None, environ=ENV, overrides={}, directory=tmp_path)
    (app,) = config.apps
    assert (app.name, app.path, app.live_secrets) == ("default", "/webhooks/whatsapp", ("0f" * 16,))
    assert tuple(config.services) == tuple(KEYWORDS)
    assert (config.host, config.port, config.admin_host) == ("0.0.0.0", 8080, "127.0.0.1")
    assert config.data_dir == tmp_path / ".postroom"
    assert config.database_url is None


def test_command_line_wins_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    toml = "session_ttl_hours = 5\nport = 1000\nrouter_timeout_ms = 3000"
    config = load(tmp_path, toml, {**ENV, "SESSION_TTL_HOURS": "6"}, port=2000, admin_port=None)
    assert (config.session_ttl_hours, config.port, config.admin_port) == (6, 2000, 8081)
    assert config.services["jobs"].timeout_ms == config.router_timeout_ms == 3000
    given = load(tmp_path, "", {**ENV, "DATABASE_URL": "postgresql://a/b"}, database_url="postgresql://c/d")
    assert given.database_url == "postgresql://c/d"


def test_a_service_section_keeps_what_it_does_not_name(tmp_path: Path) -> None:
    toml = """
        [services.tickets]
        url = "https://tickets.example.com/in"
        keywords = { en = ["ticket"] }
        [services.mobility]
        url = "http://[::1]:9001/in"
        timeout_ms = 100
        secret_env = "RIDES_SECRET"
        keywords = { fr = ["course"] }
    """
    config = load(tmp_path, toml, {**ENV, "RIDES_SECRET": WHSEC, "WA_ROUTER_TIMEOUT_MS": "200"})
    assert list(config.services)[:3] == ["tickets", "rides", "insurance"]
    rides = config.services["rides"]
    assert (rides.name, rides.timeout_ms, rides.deadline_ms, rides.secret) == ("rides", 100, 15_000, WHSEC)
    assert rides.keywords == {**KEYWORDS["rides"], "fr": ("course",)}
    assert config.services["tickets"].timeout_ms == 200


def test_named_apps_replace_the_default_one_unless_its_variables_are_set(tmp_path: Path) -> None:
    toml = '[apps.kigali]\nsecret_env = "A"\nverify_token_env = "B"\nnumbers = ["1"]'
    named = {"A": "a" * 32, "B": "b"}
    (app,) = load(tmp_path, toml, named).apps
    assert (app.name, app.path, app.numbers) == ("kigali", "/webhooks/whatsapp/kigali", ("1",))
    assert [app.name for app in load(tmp_path, toml, {**ENV, **named}).apps] == ["default", "kigali"]
    (line,) = errors(tmp_path, toml, {**named, "WHATSAPP_APP_SECRET": "x"})
    assert line.startswith("WHATSAPP_VERIFY_TOKEN: is not set; fix: ")


def test_both_secrets_are_live_during_a_rotation(tmp_path: Path) -> None:
    (app,) = load(tmp_path, "", {**ENV, "WHATSAPP_APP_SECRET_PREVIOUS": "old"}).apps
    assert app.live_secrets == ("0f" * 16, "old")
    (app,) = load(tmp_path, "", {**ENV, "WHATSAPP_APP_SECRET_PREVIOUS": ""}).apps
    assert app.secret_previous is None


def test_dev_makes_the_secrets_that_are_missing(tmp_path: Path) -> None:
    (tmp_path / "postroom.toml").write_text('[services.rides]\nsecret_env = "RIDES_SECRET"')
    tokens = iter(["first", "second", "third"])
    config = load_config(
        file=None,
        environ={},
        overrides={"dev": True},
        directory=tmp_path,
        token=lambda: next(tokens),
    )
    assert (config.host, config.dev) == ("127.0.0.1", True)
    assert config.generated == {
        "WHATSAPP_APP_SECRET": "first",
        "WHATSAPP_VERIFY_TOKEN": "second",
        "RIDES_SECRET": "whsec_" + base64.b64encode(b"third").decode(),
    }
    assert config.apps[0].secret == "first"
    assert "first" not in repr(config)
    assert load(tmp_path, "", ENV, dev=True).generated == {}
    assert load(tmp_path, "", {}, dev=True).apps != load(tmp_path, "", {}, dev=True).apps


def test_dev_listens_on_loopback_only(tmp_path: Path) -> None:
    host, admin_host = errors(tmp_path, 'host = "0.0.0.0"', {}, dev=True, admin_host="example.com")
    assert host.startswith("host: 0.0.0.0 can be reached from outside")
    assert "use --host 127.0.0.1" in host
    assert admin_host.startswith("admin_host: ")
    assert "use --admin-host 127.0.0.1" in admin_host
    assert load(tmp_path, "", {}, dev=True, host="127.9.9.9", admin_host="localhost").dev


def test_commands_without_webhooks_need_no_secrets(tmp_path: Path) -> None:
    (tmp_path / "postroom.toml").write_text('[services.rides]\nsecret_env = "RIDES_SECRET"')
    config = load_config(file=None, environ={}, overrides={}, directory=tmp_path, need_secrets=False)
    assert (config.apps, config.services["rides"].secret) == ((), None)


BAD_FILES = [
    ("[service.rides]", "service: is not a setting; fix: did you mean services?"),
    (
        "[services.rides]\ntimout_ms = 1",
        "services.rides.timout_ms: is not a setting; fix: did you mean timeout_ms?",
    ),
    (
        "[routing]\nzzzz = 1",
        "routing.zzzz: is not a setting; fix: remove it; known here: buttons, exit, fall",
    ),
    ("[limits]\nbody_max = 1", "limits.body_max: is not a setting; fix: did you mean body_max_bytes?"),
    ("[delivery]\nenable = true", "delivery.enable: is not a setting; fix: did you mean enabled?"),
    ("[services.rides]\nurl = 7", "services.rides.url: is not a string; fix: write it in quotes"),
    ("[services.rides]\nlanes = '8'", "services.rides.lanes: is not a whole number; fix: write digits"),
    ("[services.rides]\nlanes = true", "services.rides.lanes: is not a whole number"),
    ("[services.rides]\nlanes = 0", "services.rides.lanes: 0 is not between 1 and 1024; fix: "),
    ("[services]\nrides = 3", "services.rides: is not a table; fix: write it as a [section]"),
    ("services = 3", "services: is not a table; fix: "),
    (
        "[services.rides]\nkeywords = ['taxi']",
        "services.rides.keywords: is not a table; fix: write it like {en",
    ),
    (
        "[services.rides]\nkeywords = {en = 'taxi'}",
        "services.rides.keywords.en: is not a list; fix: write it",
    ),
    ("[services.rides]\nkeywords = {en = [1]}", "services.rides.keywords.en.0: is not a string"),
    (
        "[services.rides]\nkeywords = {en = ['!']}",
        "services.rides.keywords.en: '!' has no letter or digit; fix",
    ),
    (
        "[services.rides]\nkeywords = {de = ['Taxi']}",
        "services.rides.keywords.de: is not one of routing.languages",
    ),
    (
        "[services.rides]\nsecret = 'whsec_topsecret'",
        "services.rides.secret: does not belong into a file; fix: name",
    ),
    (
        "[services.rides]\nsecret_env = 'NOWHERE'",
        "NOWHERE: is not set, and services.rides.secret_env names it; fix",
    ),
    (
        "[services.rides]\nsecret_env = 'whsec_topsecret'",
        "services.rides.secret_env: is not the name of an env",
    ),
    (
        "[services.rides]\nsecret_env = 'PLAIN'",
        "services.rides.secret_env: is not a Standard Webhooks secret; fix: ",
    ),
    (
        "[services.rides]\nsecret_env = 'EMPTY'",
        "EMPTY: is empty, and services.rides.secret_env names it; fix: set",
    ),
    (
        "[services.rides]\nurl = 'rides.example.com'",
        "services.rides.url: is not http:// or https://; fix: write",
    ),
    ("[services.rides]\nurl = 'ftp://rides'", "services.rides.url: is not http:// or https://"),
    (
        "[services.rides]\nurl = 'http://me:topsecret@rides'",
        "services.rides.url: has a user or password in it; fix",
    ),
    ("[services.rides]\nurl = 'http:///path'", "services.rides.url: has no host"),
    ("[services.rides]\nurl = 'http://rides:99999/'", "services.rides.url: is not a URL"),
    ("[services.rides]\nurl = 'http://[::1/'", "services.rides.url: is not a URL"),
    ("[services.rides]\nurl = 'http://rides/a b'", "services.rides.url: has spaces, control or non-ASCII"),
    ("[services.rides]\nurl = 'http://rides/#top'", "services.rides.url: has a #fragment"),
    ("[services.rides]\nurl = ''", "services.rides.url: is not http:// or https://"),
    (
        "[services.rides]\ntimeout_ms = 9\ndeadline_ms = 8",
        "services.rides.timeout_ms: 9 ms for one attempt exceeds",
    ),
    (
        "[services.rides]\ndeadline_ms = 80",
        "services.rides.timeout_ms: 4000 ms for one attempt exceeds deadline_ms",
    ),
    (
        "[services.rides]\ntimeout_ms = 0",
        "services.rides.timeout_ms: 0 is not a possible time; fix: give millisec",
    ),
    ("[services.rides]\nstate = 'off'", "services.rides.state: is not a state; fix: use one of: active, p"),
    ("[services.rides]\nlanes_min = 9", "services.rides.lanes_min: 9 is not between 1 and lanes (8)"),
    (
        "[services.rides]\ncanary_url = 'http://a/'",
        "services.rides.canary_url: stands without url; fix: give the service a url",
    ),
    (
        "[services.rides]\nurl = 'http://a/'\nshadow_url = 'ftp://a/'",
        "services.rides.shadow_url: is not http:// or https://",
    ),
    ("[services.rides]\ncanary_share = 1.5", "services.rides.canary_share: 1.5 is not a share above 0"),
    ("[services.Rides]", "services.Rides: cannot be the name of a domain; fix: use up to 63 of a-z"),
    ("[services.menu]", "services.menu: cannot be the name of a domain"),
    ("[services.'a b']", 'services."a b": cannot be the name of a domain'),
    ("[services.rides]\n[services.mobility]", "services.mobility: is another name of rides; fix: keep"),
    (
        "[services.fun]\nkeywords = {en = ['TAXI']}",
        "services.rides.keywords.en: 'taxi' is claimed by fun and by rides",
    ),
    (
        "[services.fun]\nkeywords = {en = ['Home']}",
        "services.fun.keywords.en: 'Home' means home and never reaches fun",
    ),
    ("[sender]", "sender.url: is missing; fix: write it like https://graph"),
    ("[sender]", "sender.token_env: is missing; fix: name the environment variable"),
    ("[sender]\ntoken_env = 'NONE'", "NONE: is not set; fix: set it to the access token"),
    ("[sender]\ntoken_env = 'EMPTY'", "EMPTY: is empty; fix: set it to the access token"),
    ("[sender]\ntoken_env = 'E A'", "sender.token_env: is not the name of an environment variable"),
    ("[sender]\ntoken_env = 'WHATSAPP_APP_SECRET'\nurl = 'graph'", "sender.url: is not http:// or https://"),
    ("[sender]\ntoken_env = 'SPACED'", "sender.token_env: has characters that no token has; fix: copy"),
    ("[sender]\nurl = 'http://g/?v=1'", "sender.url: has a ?query; fix: write it like https"),
    ("[sender]\ntoken = 'topsecret'", "sender.token: does not belong into a file; fix: name an env"),
    ("[sender]\nlanes = 0", "sender.lanes: 0 is not between 1 and 1024; fix: 8 is usual"),
    ("[sender]\nmax_age_hours = 0", "sender.max_age_hours: 0 is not between 1 and 87600"),
    ("[sender]\ntimeout_ms = 0", "sender.timeout_ms: 0 is not between 1 and 2147483647"),
    (
        "[routing]\nexit = {en = ['menu']}",
        "routing.exit.en: 'menu' already means menu; fix: keep it in routing.menu",
    ),
    ("[routing]\nlanguages = []", "routing.languages: is empty; fix: name at least one"),
    (
        "[routing]\nfallback = 'taxis'",
        "routing.fallback: 'taxis' is not a domain; fix: use \"menu\" or one of: rides,",
    ),
    (
        "[routing.buttons]\n'x y' = 'taxis'",
        "routing.buttons.\"x y\": 'taxis' is not a domain; fix: use menu, home",
    ),
    ("[apps.a]\nverify_token_env = 'B'", "apps.a.secret_env: is missing; fix: name the environment variable"),
    (
        "[apps.a]\nsecret_env = 'A'\nverify_token_env = 'NO'",
        "NO: is not set; fix: set it to the word that you type",
    ),
    (
        "[apps.'a/b']\nsecret_env = 'A'\nverify_token_env = 'A'",
        'apps."a/b": the name is part of a URL; fix: use',
    ),
    ("[apps.default]\nnumbers = [1]", "apps.default.numbers.0: is not a string; fix: write it in quotes"),
    (
        "[apps.default]\nnumbers = ['+250']",
        "apps.default.numbers: '+250' is not a phone_number_id; fix: write",
    ),
    (
        "[apps.default]\nsecret_previous_env = 'OLD'",
        "OLD: is not set; fix: set it to the secret before the rotation",
    ),
    (
        "[limits]\nsession_mailbox = 0",
        "limits.session_mailbox: 0 is not between 1 and 2147483647; fix: the default",
    ),
    ("[limits]\nbacklog_limit = -1", "limits.backlog_limit: -1 is not between 0"),
    (
        "[limits]\nbody_bytes_in_flight = 5",
        "limits.body_bytes_in_flight: 5 cannot hold one body of body_max_bytes",
    ),
    ("[delivery]\nenabled = 1", "delivery.enabled: is not true or false; fix: write true or false"),
    (
        "[delivery]\ndead_letter_max_age_hours = 0",
        "delivery.dead_letter_max_age_hours: 0 is not a possible number of hours; fix: give the longest",
    ),
    (
        "[services.rides]\norder = 'any'",
        "services.rides.order: is not a policy; fix: use one of: continue, strict",
    ),
    (
        "[services.rides]\nbreaker_failure_ratio = 0",
        "services.rides.breaker_failure_ratio: 0.0 is not a share above 0, at most 1; fix: 0.5 is half",
    ),
    (
        "[services.rides]\nbreaker_slow_ratio = 'x'",
        "services.rides.breaker_slow_ratio: is not a number; fix: write it like 0.5, without quotes",
    ),
    (
        "[services.rides]\nbreaker_slow_ms = 4000",
        "services.rides.breaker_slow_ms: 4000 is not between 1 and timeout_ms (4000); fix: an attempt that",
    ),
    (
        "[services.rides]\nbreaker_failures = 0",
        "services.rides.breaker_failures: 0 is not between 1 and 1000000; fix: 5 suits most services",
    ),
    (
        "[services.rides]\ndead_letters = 'never'",
        "services.rides.dead_letters: is not a policy; fix: use one of: standard, fast",
    ),
    ("port = 65536", "port: 65536 is not a port; fix: use 1 to 65535, or 0"),
    ("admin_port = 8080", "admin_port: 8080 is the webhook port too; fix: give --admin-port another one"),
    ("host = ''", "host: is not a host; fix: give a name or an address"),
    ("data_dir = 'a\\u0000b'", None),
    ('data_dir = "a\\u0000b"', "data_dir: is not a path; fix: give a directory"),
    ("session_ttl_hours = 0", "SESSION_TTL_HOURS: 0 is not a possible number of hours; fix: use 1 to"),
    (
        "router_timeout_ms = 20000",
        "WA_ROUTER_TIMEOUT_MS: 20000 ms for one attempt is longer than the deadline for all",
    ),
    (
        "database_url = 'postgresql://u:topsecret@h/d'",
        "database_url: does not belong into a file; fix: put it into",
    ),
    ("a = 1\nb = = 2", "postroom.toml: is not TOML: Invalid value (at line 2, column 5); fix: correct it"),
    (b"a = 1\n# \xff", "postroom.toml: is not UTF-8 (at line 2); fix: save it as UTF-8"),
    ("a = " + "[" * 20_000, "postroom.toml: is nested too deeply; fix: flatten it"),
    ("port = " + "9" * 5_000, "postroom.toml: is not TOML: "),
    ("#" * 1_048_577, "postroom.toml: is larger than 1048576 bytes; fix: "),
]


@each(("toml", "expected"), BAD_FILES)
def test_each_error_names_the_setting_and_the_fix(
    tmp_path: Path, toml: str | bytes, expected: str | None
) -> None:
    environ = {**ENV, "A": "a", "PLAIN": "topsecret", "EMPTY": "", "SPACED": "top secret"}
    if expected is None:
        assert load(tmp_path, toml, environ).data_dir == tmp_path / "a\\u0000b"
        return
    lines = errors(tmp_path, toml, environ)
    assert any(line.removeprefix(f"{tmp_path}/").startswith(expected) for line in lines), lines
    assert "topsecret" not in "\n".join(lines)


BAD_ENVIRONMENTS = [
    ({}, "WHATSAPP_APP_SECRET: is not set; fix: set it to the App Secret"),
    ({}, "WHATSAPP_VERIFY_TOKEN: is not set; fix: set it to the word"),
    ({"WHATSAPP_APP_SECRET": ""}, "WHATSAPP_APP_SECRET: is empty; fix: set it to"),
    (
        {"WHATSAPP_APP_SECRET": " "},
        "WHATSAPP_APP_SECRET: has white space around it, or nothing else; fix: remove",
    ),
    ({"WHATSAPP_APP_SECRET": "topsecret\n"}, "WHATSAPP_APP_SECRET: has white space around it"),
    (
        {"WHATSAPP_APP_SECRET": "topsecret\udcff"},
        "WHATSAPP_APP_SECRET: is not valid UTF-8; fix: copy it again",
    ),
    (
        {"WHATSAPP_APP_SECRET_PREVIOUS": " topsecret"},
        "WHATSAPP_APP_SECRET_PREVIOUS: has white space around it",
    ),
    ({"POSTROOM_ADMIN_TOKEN": "short"}, "POSTROOM_ADMIN_TOKEN: is shorter than 16 characters, or has some"),
    ({"SESSION_TTL_HOURS": "a day"}, "SESSION_TTL_HOURS: is not a whole number; fix: write digits only"),
    ({"WA_ROUTER_TIMEOUT_MS": "4s"}, "WA_ROUTER_TIMEOUT_MS: is not a whole number"),
    ({"WA_CORE_P95_SLO_MS": "1.5"}, "WA_CORE_P95_SLO_MS: is not a whole number"),
    ({"WA_CORE_COLD_START_SLO_MS": "-1"}, "WA_CORE_COLD_START_SLO_MS: -1 is not a possible time; fix: give"),
    (
        {"DATABASE_URL": "mysql://u:topsecret@h/d"},
        "DATABASE_URL: is not a postgresql:// URL; fix: write it like",
    ),
    ({"DATABASE_URL": "postgresql:topsecret"}, "DATABASE_URL: is not a postgresql:// URL"),
    ({"DATABASE_URL": "postgresql://u:topsecret@[h/d"}, "DATABASE_URL: is not a URL"),
    (
        {"DATABASE_URL": "postgresql://u:topsecret@h:99999/d"},
        "DATABASE_URL: has a port that is none; fix: write",
    ),
    (
        {"DATABASE_URL": "postgresql://u:topsecret@h:6543/d"},
        "DATABASE_URL: port 6543 is a transaction pooler; fix: use",
    ),
    ({"DATABASE_URL": "postgresql://a,b:6543/d"}, "DATABASE_URL: port 6543 is a transaction pooler"),
    ({"DATABASE_URL": "postgresql:///d?host=a&port=6543"}, "DATABASE_URL: port 6543 is a transaction pooler"),
    (
        {"DATABASE_URL": "postgresql://h/d?pgbouncer=true"},
        "DATABASE_URL: pgbouncer=true asks for transaction pooling",
    ),
    (
        {"DATABASE_URL": "postgresql://h/d?pool_mode=transaction"},
        "DATABASE_URL: pool_mode=transaction asks for",
    ),
    (
        {"DATABASE_URL": "postgresql://ep-x-pooler.eu.example/d"},
        "DATABASE_URL: its host is a transaction pooler",
    ),
]


@each(("environ", "expected"), BAD_ENVIRONMENTS)
def test_each_error_names_the_variable_and_the_fix(
    tmp_path: Path, environ: dict[str, str], expected: str
) -> None:
    lines = errors(tmp_path, "", {**ENV, **environ} if environ else {})
    assert any(line.startswith(expected) for line in lines), lines
    assert "topsecret" not in "\n".join(lines)


@each(
    "url",
    [
        "postgresql://u:p%40ss@db.example.com:5432/app?sslmode=require",
        "postgresql://a:1,b:2/app",
        "postgresql:///app?host=/run/postgresql",
        "postgres://[::1]:5432/app",
        "postgresql://h/d?pgbouncer=false",
    ],
)
def test_session_connections_are_accepted(tmp_path: Path, url: str) -> None:
    config = load(tmp_path, "", {**ENV, "DATABASE_URL": url})
    assert config.database_url == url
    assert url not in repr(config)


def test_all_errors_come_together(tmp_path: Path) -> None:
    toml = """
        port = "8080"
        [services.rides]
        url = "nowhere"
        timeout_ms = 20000
        stauses = true
        [services.taxis]
        keywords = { en = ["cab"] }
        [routing]
        fallback = "nobody"
        [limits]
        flush_max_rows = 0
    """
    names = {
        line.split(": ")[0]
        for line in errors(tmp_path, toml, {"SESSION_TTL_HOURS": "x", "DATABASE_URL": "file:x"})
    }
    assert names == {
        "port",
        "services.rides.url",
        "services.rides.timeout_ms",
        "services.rides.stauses",
        "services.taxis.keywords.en",
        "routing.fallback",
        "limits.flush_max_rows",
        "SESSION_TTL_HOURS",
        "DATABASE_URL",
        "WHATSAPP_APP_SECRET",
        "WHATSAPP_VERIFY_TOKEN",
    }


def test_one_number_belongs_to_one_app(tmp_path: Path) -> None:
    table = "secret_env = 'A'\nverify_token_env = 'A'\nnumbers = ['77']\n"
    (line,) = errors(tmp_path, f"[apps.a]\n{table}[apps.b]\n{table}", {"A": "a"})
    assert line.startswith("apps.b.numbers: 77 is also claimed by apps.a; fix: ")


def test_a_file_that_was_named_must_be_readable(tmp_path: Path) -> None:
    for path, expected in ((tmp_path / "none.toml", "does not exist"), (tmp_path, "cannot be read")):
        with pytest.raises(ConfigError, match=expected):
            load_config(file=path, environ=ENV, overrides={}, directory=tmp_path)


def test_the_shipped_example_is_complete_and_has_the_defaults(tmp_path: Path) -> None:
    environ = {
        **ENV,
        "KIGALI_APP_SECRET": "k",
        "KIGALI_VERIFY_TOKEN": "k",
        "RIDES_SECRET": WHSEC,
        "WHATSAPP_ACCESS_TOKEN": "EAAG",
        "JOBS_TOKEN": "b7c1f0",
    }
    config = load_config(file=EXAMPLE, environ=environ, overrides={}, directory=tmp_path)
    assert [app.name for app in config.apps] == ["default", "kigali"]
    assert config.limits == LimitsConfig()
    assert config.sender == SenderConfig(url="https://graph.facebook.com/v23.0", token="EAAG")
    assert config.routing == replace(RoutingConfig(), buttons={"BOOK_NOW": "rides", "BACK": "home"})
    plain = load_config(file=None, environ=ENV, overrides={}, directory=tmp_path)
    assert config.services["jobs"].token == "b7c1f0"
    plain_names = ("host", "port", "admin_host", "admin_port", "services_host", "services_port", "data_dir")
    for name in (*plain_names, "session_ttl_hours", "delivery"):
        assert getattr(config, name) == getattr(plain, name)
    written = tomllib.loads(EXAMPLE.read_text())
    assert set(written["limits"]) == {limit.name for limit in fields(LimitsConfig)}
    assert set(written["routing"]) == {part.name for part in fields(RoutingConfig)}


@each(
    ("file", "environ", "problem"),
    [
        ("token_env = 'JOBS_TOKEN'", {}, "JOBS_TOKEN: is not set, and services.jobs.token_env names it"),
        ("token_env = 'JOBS_TOKEN'", {"JOBS_TOKEN": ""}, "JOBS_TOKEN: is empty"),
        ("token_env = 'secret!'", {}, "services.jobs.token_env: is not the name of an environment variable"),
        (
            "token_env = 'JOBS_TOKEN'",
            {"JOBS_TOKEN": "a b"},
            "services.jobs.token_env: has characters that no token",
        ),
        (
            "token_env = 'JOBS_TOKEN'\n[services.rides]\ntoken_env = 'JOBS_TOKEN'",
            {"JOBS_TOKEN": "b7c1f0"},
            "services.rides.token_env: is the token of jobs, too; fix: give each service",
        ),
    ],
)
def test_the_token_of_a_service_is_there_and_fit_for_a_header(
    tmp_path: Path, file: str, environ: dict[str, str], problem: str
) -> None:
    found = errors(tmp_path, f"[services.jobs]\n{file}", {**ENV, **environ})
    assert any(line.startswith(problem) for line in found), found


def test_the_port_of_services_is_its_own_where_there_are_any(tmp_path: Path) -> None:
    attached = "services_port = 8081\n[services.jobs]\ntoken_env = 'JOBS_TOKEN'"
    lines = errors(tmp_path, attached, {**ENV, "JOBS_TOKEN": "t"})
    assert lines[0].startswith("services_port: 8081 is another port's number too"), lines
    assert errors(tmp_path, "services_port = 70000", ENV)[0].startswith("services_port: 70000 is not a port")


def test_the_words_out_of_the_box_do_not_collide() -> None:
    config = Config.for_embedding(app_secret="s", verify_token="t")
    assert find_problems(config) == ()
    assert all(tuple(words) == LANGUAGES for words in KEYWORDS.values())
    assert set(ALIASES.values()) <= set(KEYWORDS)


def test_embedding_takes_one_call() -> None:
    config = Config.for_embedding(
        app_secret="topsecret",
        verify_token="topsecret",
        services=[ServiceConfig(name="mobility", lanes=2), ServiceConfig(name="tickets")],
        data_dir="/tmp/x",
    )
    assert checked(config) is config
    assert config.services["rides"].keywords == KEYWORDS["rides"]
    assert list(config.services)[:2] == ["rides", "tickets"]
    assert "topsecret" not in repr(config) + str(config)
    with pytest.raises(ConfigError, match="WHATSAPP_APP_SECRET: is empty"):
        checked(Config(apps=(AppConfig(secret="", verify_token="t"),)))


@each(
    ("text", "folded"),
    [
        ("  MARCHÉ! ", "marche"),
        ("J'ai faim", "j ai faim"),
        ("Straße", "strasse"),
        ("\u210c", "h"),
        ("🚕", ""),
    ],
)
def test_words_are_compared_without_case_accents_and_punctuation(text: str, folded: str) -> None:
    assert fold(text) == folded
    assert fold(folded) == folded


KEYS = st.sampled_from(
    [
        "services",
        "apps",
        "routing",
        "limits",
        "delivery",
        "rides",
        "mobility",
        "url",
        "timeout_ms",
        "deadline_ms",
        "lanes",
        "secret_env",
        "statuses",
        "keywords",
        "en",
        "numbers",
        "verify_token_env",
        "fallback",
        "languages",
        "menu",
        "buttons",
        "enabled",
        "port",
        "data_dir",
        "default",
    ]
) | texts(max_size=8)
LEAVES = (
    st.integers()
    | st.booleans()
    | st.floats()
    | texts(max_size=20)
    | st.sampled_from(["rides", "menu", "A", "http://x", "http://[", "0", "\0"])
    | st.datetimes()
)
TABLES = st.dictionaries(
    KEYS,
    st.recursive(
        LEAVES,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
        max_leaves=20,
    ),
    max_size=6,
)
ENVIRONMENTS = st.dictionaries(
    st.sampled_from([*ENV, "A", "DATABASE_URL", "SESSION_TTL_HOURS", "WHATSAPP_APP_SECRET_PREVIOUS"]),
    texts(max_size=30) | st.text(string.printable, max_size=30).map("postgresql://".__add__),
)


def attempt(raw: bytes, directory: Path, environ: dict[str, str]) -> None:
    with contextlib.suppress(ConfigError):
        load(directory, raw, environ)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=TABLES, environ=ENVIRONMENTS)
def test_any_table_and_environment_is_read_or_refused(
    tmp_path: Path, table: dict[str, Any], environ: dict[str, str]
) -> None:
    attempt(as_toml(table).encode("utf-8", "ignore"), tmp_path, environ)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=200) | texts(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_are_read_or_refused(tmp_path: Path, raw: bytes) -> None:
    attempt(raw, tmp_path, ENV)


SECRETS = st.text(string.ascii_letters + string.digits, min_size=12, max_size=40).map("Zq9".__add__)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    secret=SECRETS, setting=st.sampled_from(["secret_env", "secret", "url", "keywords"]), space=st.booleans()
)
def test_no_secret_is_ever_shown(tmp_path: Path, secret: str, setting: str, space: bool) -> None:
    value = f"http://u:{secret}@h" if setting == "url" else secret
    environ = {
        "WHATSAPP_APP_SECRET": secret + "\n" * space,
        "WHATSAPP_APP_SECRET_PREVIOUS": secret,
        "WHATSAPP_VERIFY_TOKEN": secret,
        "DATABASE_URL": f"{'x' * space}postgresql://u:{secret}@h/d",
        "SESSION_TTL_HOURS": secret,
    }
    lines = errors(tmp_path, f"[services.rides]\n{setting} = {value!r}", environ)
    assert secret not in "\n".join(lines)
    del environ["SESSION_TTL_HOURS"]
    if not space:
        config = load(tmp_path, "", environ)
        assert secret not in repr(config) + str(config)


def as_toml(value: Any) -> str:
    """TOML for a table of any content; a value is written inline."""
    return "\n".join(f"{_string(key)} = {_inline(item)}" for key, item in value.items())


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_string(key)} = {_inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    return _string(value) if isinstance(value, str) else str(value.isoformat())


def _string(text: str) -> str:
    escaped = "".join(
        char if char.isprintable() and char not in '"\\' else f"\\U{ord(char):08x}" for char in text
    )
    return f'"{escaped}"'


@each("schema", ["Postroom", "pg_mine", "a-b", "a b", "", "x" * 64, "1a", "a;b"])
def test_a_schema_is_a_plain_name(tmp_path: Path, schema: str) -> None:
    if schema:
        [problem] = errors(tmp_path, f'schema = "{schema}"', ENV)
        assert problem.startswith("schema: ")
    assert load(tmp_path, 'schema = "mine"', ENV).schema == "mine"
    assert load(tmp_path, 'schema = "mine"', ENV, schema="yours").schema == "yours"


@each("archive", ["ftp://x/y", "http://x", "a\\u0000b"])
def test_archives_have_a_place_that_can_be_written(tmp_path: Path, archive: str) -> None:
    [problem] = errors(tmp_path, f'archive = "{archive}"', ENV)
    assert problem.startswith("archive: ")


def test_where_archives_are(tmp_path: Path) -> None:
    assert load(tmp_path, "", ENV).archive_location == str(load(tmp_path, "", ENV).data_dir / "archive")
    assert load(tmp_path, 'archive = "old"', ENV).archive_location == str(tmp_path / "old")
    assert load(tmp_path, 'archive = "s3://b/p"', ENV).archive_location == "s3://b/p"
