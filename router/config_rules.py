"""What must hold within and between the values of a Config, however it was made: pure, and all findings at
once.

Where values come from, and what type they have, is the business of router.settings.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Final
from urllib.parse import parse_qsl, urlsplit

from router.config import (
    DEAD_LETTER_POLICIES,
    DEFAULT_APP,
    DEFAULT_DEADLINE_MS,
    ORDER_POLICIES,
    SERVICE_STATES,
    URL_FIELDS,
    AppConfig,
    Config,
    ConfigError,
    Problem,
    SenderConfig,
    ServiceConfig,
)
from router.domains import Words, canonical_domain, fold

ACTIONS: Final = ("menu", "home", "exit")
GRAPH_API: Final = "https://graph.facebook.com/v23.0"
POOLER_PORT: Final = "6543"  # the port of transaction poolers: Supabase's, and others after it

_DOMAIN_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}", re.ASCII)
_APP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", re.ASCII)
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
_BEARER_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{1,4096}=*", re.ASCII)  # RFC 6750, section 2.1
ARCHIVE_SCHEMES = ("file", "s3", "gs", "abfs")  # that pyarrow.fs.FileSystem.from_uri takes
_SCHEMA = re.compile(r"(?!pg_)[a-z_][a-z0-9_]{0,62}", re.ASCII)
_ADMIN_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{16,512}", re.ASCII)  # RFC 6750, section 2.1
_NUMBER = re.compile(r"[0-9]{1,32}", re.ASCII)
_INT32_MAX: Final = 2**31 - 1
_TEN_YEARS_IN_HOURS: Final = 87_600
_UNSET_OR_ZERO: Final = frozenset({"backlog_limit", "spool_max_bytes"})  # 0: a plain limiter, no spool

_APP_SECRET_FIX: Final = "set it to the App Secret of the Meta app (App settings, Basic)"
_VERIFY_TOKEN_FIX: Final = "set it to the word that you type as Verify token in Meta's webhook form"


def find_problems(config: Config) -> tuple[Problem, ...]:
    """Everything that is wrong with `config`, in the order of its parts; empty when it can be used."""
    return (
        *_apps(config),
        *_services(config),
        *_sender(config.sender),
        *_keywords(config),
        *_routing(config),
        *_limits(config),
        *_addresses(config),
        *_times(config),
        *_database(config.database_url),
        *_schema(config.schema),
    )


def checked(config: Config) -> Config:
    """`config` itself; ConfigError when anything is wrong with it."""
    if problems := find_problems(config):
        raise ConfigError(problems)
    return config


def secret_name(app: str, part: str) -> str:
    """What an error calls an app's "secret", "secret_previous" or "verify_token"."""
    if app != DEFAULT_APP:
        return dotted("apps", app, part)
    return "WHATSAPP_VERIFY_TOKEN" if part == "verify_token" else f"WHATSAPP_APP_{part.upper()}"


def missing_secret(name: str, part: str, *, reason: str = "is not set") -> Problem:
    """The error for an app's secret or verify token that is not there."""
    fix = _VERIFY_TOKEN_FIX if part == "verify_token" else _APP_SECRET_FIX
    if part == "secret_previous":
        return Problem(name, reason, "set it to the secret before the rotation, or take it out")
    return Problem(name, reason, f"{fix}; to try things out without one: postroom serve --dev")


def _apps(config: Config) -> Iterator[Problem]:
    names: set[str] = set()
    claimed: dict[str, str] = {}
    for app in config.apps:
        if not _APP_NAME.fullmatch(app.name):
            yield Problem(
                dotted("apps", app.name),
                "the name is part of a URL",
                "use up to 63 letters, digits, - and _, a letter or digit first",
            )
        if app.name in names:
            yield Problem(dotted("apps", app.name), "is there twice", "give each app its own name")
        names.add(app.name)
        yield from _app_secrets(app)
        for number in app.numbers:
            if not _NUMBER.fullmatch(number):
                yield Problem(
                    dotted("apps", app.name, "numbers"),
                    f"{_quoted(number)} is not a phone_number_id",
                    "write the id that Meta shows beside the number, digits only",
                )
            elif (owner := claimed.setdefault(number, app.name)) != app.name:
                yield Problem(
                    dotted("apps", app.name, "numbers"),
                    f"{number} is also claimed by {dotted('apps', owner)}",
                    "leave it with the app whose secret signs for it",
                )


def _app_secrets(app: AppConfig) -> Iterator[Problem]:
    for part, value in (
        ("secret", app.secret),
        ("secret_previous", app.secret_previous),
        ("verify_token", app.verify_token),
    ):
        if value is None:
            continue
        name = secret_name(app.name, part)
        if not value.strip():
            yield missing_secret(name, part, reason="is empty")
        elif value != value.strip():
            yield Problem(name, "has white space around it", "remove it, also a line break at the end")
        elif not _is_text(value):
            yield Problem(name, "is not valid UTF-8", "copy it again")


def _services(config: Config) -> Iterator[Problem]:
    timeout_is_inherited = []
    owners: dict[str, str] = {}  # of tokens
    for key, service in config.services.items():
        at = dotted("services", key)
        if not _DOMAIN_NAME.fullmatch(key) or key in ACTIONS or key != canonical_domain(service.name):
            yield Problem(
                at,
                "cannot be the name of a domain",
                "use up to 63 of a-z, 0-9 and _, a letter first, and not menu, home or exit",
            )
        yield from _service_urls(at, service)
        if service.state not in SERVICE_STATES:
            yield Problem(f"{at}.state", "is not a state", f"use one of: {', '.join(SERVICE_STATES)}")
        if service.dead_letters not in DEAD_LETTER_POLICIES:
            yield Problem(
                f"{at}.dead_letters",
                "is not a policy",
                f"use one of: {', '.join(DEAD_LETTER_POLICIES)}",
            )
        if service.order not in ORDER_POLICIES:
            yield Problem(f"{at}.order", "is not a policy", f"use one of: {', '.join(ORDER_POLICIES)}")
        if service.token is not None and not _BEARER_TOKEN.fullmatch(service.token):
            yield Problem(
                f"{at}.token_env",
                "has characters that no token has",
                "use letters, digits and . _ ~ + / - only, as `openssl rand -hex 32` prints",
            )
        credential = service.credential
        if credential is not None and (owner := owners.setdefault(credential, key)) != key:
            yield Problem(
                f"{at}.token_env", f"is the token of {owner}, too", "give each service a token of its own"
            )
        if not 1 <= service.breaker_failures <= 1_000_000:
            yield Problem(
                f"{at}.breaker_failures",
                f"{service.breaker_failures} is not between 1 and 1000000",
                "5 suits most services",
            )
        for name, ratio in (
            ("breaker_failure_ratio", service.breaker_failure_ratio),
            ("breaker_slow_ratio", service.breaker_slow_ratio),
            ("canary_share", service.canary_share),
            ("shadow_share", service.shadow_share),
        ):
            if not 0 < ratio <= 1:
                yield Problem(
                    f"{at}.{name}", f"{ratio} is not a share above 0, at most 1", "0.5 is half of them"
                )
        if service.breaker_slow_ms is not None and not 1 <= service.breaker_slow_ms < service.timeout_ms:
            yield Problem(
                f"{at}.breaker_slow_ms",
                f"{service.breaker_slow_ms} is not between 1 and timeout_ms ({service.timeout_ms})",
                "an attempt that takes longer than timeout_ms has failed anyway; lower it, or leave it out",
            )
        if service.secret is not None and not _is_standard_webhooks_secret(service.secret):
            yield Problem(
                f"{at}.secret_env",
                "is not a Standard Webhooks secret",
                "make one with: printf 'whsec_%s\\n' \"$(openssl rand -base64 32)\"",
            )
        if not 1 <= service.lanes <= 1024:
            yield Problem(
                f"{at}.lanes", f"{service.lanes} is not between 1 and 1024", "8 suits most services"
            )
        elif not 1 <= service.lanes_min <= service.lanes:
            yield Problem(
                f"{at}.lanes_min",
                f"{service.lanes_min} is not between 1 and lanes ({service.lanes})",
                "1 lets a service that times out be asked one at a time",
            )
        if service.timeout_ms == config.router_timeout_ms > service.deadline_ms == DEFAULT_DEADLINE_MS:
            timeout_is_inherited.append(key)
        else:
            yield from _service_times(at, service)
    if timeout_is_inherited:
        yield Problem(
            "WA_ROUTER_TIMEOUT_MS",
            f"{config.router_timeout_ms} ms for one attempt is longer than the deadline for all attempts of "
            + ", ".join(timeout_is_inherited),
            "lower it, or raise deadline_ms of these services",
        )


def _service_urls(at: str, service: ServiceConfig) -> Iterator[Problem]:
    for name in URL_FIELDS:
        url: str | None = getattr(service, name)
        if url is None:
            continue
        if (found := url_problem(url)) is not None:
            yield Problem(f"{at}.{name}", *found)
        elif name != "url" and service.url is None:
            yield Problem(f"{at}.{name}", "stands without url", "give the service a url, or take it out")


def _sender(sender: SenderConfig | None) -> Iterator[Problem]:
    if sender is None:
        return
    if (found := url_problem(sender.url, example=GRAPH_API)) is not None:
        yield Problem("sender.url", *found)
    elif "?" in sender.url:
        yield Problem("sender.url", "has a ?query", f"write it like {GRAPH_API}")
    if not _BEARER_TOKEN.fullmatch(sender.token):
        yield Problem("sender.token_env", "has characters that no token has", "copy the access token again")
    for name, value, most, usual in (
        ("lanes", sender.lanes, 1024, 8),
        ("timeout_ms", sender.timeout_ms, _INT32_MAX, 10_000),
        ("max_age_hours", sender.max_age_hours, _TEN_YEARS_IN_HOURS, 24),
    ):
        if not 1 <= value <= most:
            yield Problem(f"sender.{name}", f"{value} is not between 1 and {most}", f"{usual} is usual")


def _service_times(at: str, service: ServiceConfig) -> Iterator[Problem]:
    for name, value in (("timeout_ms", service.timeout_ms), ("deadline_ms", service.deadline_ms)):
        if not 1 <= value <= _INT32_MAX:
            yield Problem(f"{at}.{name}", f"{value} is not a possible time", "give milliseconds, 1 or more")
    if service.timeout_ms > service.deadline_ms:
        yield Problem(
            f"{at}.timeout_ms",
            f"{service.timeout_ms} ms for one attempt exceeds deadline_ms ({service.deadline_ms}) for all",
            "lower timeout_ms or raise deadline_ms",
        )


def url_problem(url: str, *, example: str = "https://rides.example.com/messages") -> tuple[str, str] | None:
    """What is wrong with the URL of a service, and the fix."""
    example = f"write it like {example}"
    if not url.isascii() or any(char <= " " or char == "\x7f" for char in url):
        return (
            "has spaces, control or non-ASCII characters",
            "percent-encode the path, write the host as xn--...",
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "is not a URL", example
    if parts.scheme not in ("http", "https"):
        return "is not http:// or https://", example
    if "@" in parts.netloc:
        return (
            "has a user or password in it",
            "remove it: secrets stand in the variables that secret_env and token_env name",
        )
    if not parts.hostname or port == 0:
        return "has no host, or port 0", example
    if parts.fragment:
        return "has a #fragment, which is never sent", "remove it"
    return None


def secret_problem(secret: str) -> str | None:
    """What is wrong with the secret of a service."""
    if not secret:
        return "is not set"
    return (
        None
        if _is_standard_webhooks_secret(secret)
        else "is not a Standard Webhooks secret (whsec_ and base64)"
    )


def _is_standard_webhooks_secret(secret: str) -> bool:
    prefix, _, encoded = secret.partition("_")
    if prefix != "whsec" or not encoded:
        return False
    try:
        return bool(base64.b64decode(encoded, validate=True))
    except (binascii.Error, ValueError):
        return False


def _keywords(config: Config) -> Iterator[Problem]:
    actions: dict[str, str] = {}
    for action, words in _action_words(config):
        for language, word, folded in _each_word(words):
            name = dotted("routing", action, language)
            if not folded:
                yield _not_a_word(name, word)
            elif (other := actions.setdefault(folded, action)) != action:
                yield Problem(
                    name, f"{_quoted(word)} already means {other}", f"keep it in routing.{other} or here"
                )
        if not any(words.values()):
            yield Problem(
                f"routing.{action}", "has no words in any language", "give at least one: it always works"
            )
    claimed: dict[tuple[str, str], str] = {}
    for domain, service in config.services.items():
        for language, word, folded in _each_word(service.keywords):
            name = dotted("services", domain, "keywords", language)
            if not folded:
                yield _not_a_word(name, word)
            elif folded in actions:
                yield Problem(
                    name,
                    f"{_quoted(word)} means {actions[folded]} and never reaches {domain}",
                    f"remove it here or from routing.{actions[folded]}",
                )
            elif (other := claimed.setdefault((language, folded), domain)) != domain:
                yield Problem(
                    name,
                    f"{_quoted(word)} is claimed by {other} and by {domain}",
                    f"remove it from one; keywords = {{{language} = [...]}} replaces default words",
                )


def _not_a_word(name: str, word: str) -> Problem:
    return Problem(name, f"{_quoted(word)} has no letter or digit", "remove it: no text could match it")


def _action_words(config: Config) -> tuple[tuple[str, Words], ...]:
    routing = config.routing
    return (("menu", routing.menu), ("home", routing.home), ("exit", routing.exit))


def _each_word(words: Words) -> Iterator[tuple[str, str, str]]:
    for language, given in words.items():
        for word in given:
            yield language, word, fold(word)


def _routing(config: Config) -> Iterator[Problem]:
    routing = config.routing
    known = ", ".join(config.services)
    if routing.fallback != "menu" and routing.fallback not in config.services:
        yield Problem(
            "routing.fallback",
            f"{_quoted(routing.fallback)} is not a domain",
            f'use "menu" or one of: {known}',
        )
    for button, target in routing.buttons.items():
        if target not in ACTIONS and target not in config.services:
            yield Problem(
                dotted("routing", "buttons", button),
                f"{_quoted(target)} is not a domain",
                f"use menu, home, exit or one of: {known}",
            )
    if not routing.languages:
        yield Problem("routing.languages", "is empty", 'name at least one, for example ["en"]')


def _limits(config: Config) -> Iterator[Problem]:
    limits = config.limits
    for limit in fields(limits):
        value: int = getattr(limits, limit.name)
        least = 0 if limit.name in _UNSET_OR_ZERO else 1
        if not least <= value <= _INT32_MAX:
            yield Problem(
                f"limits.{limit.name}",
                f"{value} is not between {least} and {_INT32_MAX}",
                f"the default is {limit.default}",
            )
    if limits.body_bytes_in_flight < limits.body_max_bytes:
        yield Problem(
            "limits.body_bytes_in_flight",
            f"{limits.body_bytes_in_flight} cannot hold one body of body_max_bytes ({limits.body_max_bytes})",
            "raise it, or lower body_max_bytes",
        )


def _addresses(config: Config) -> Iterator[Problem]:
    attaches = any(service.credential is not None for service in config.services.values())
    ports = {"port": config.port, "admin_port": config.admin_port, "services_port": config.services_port}
    for name, port in ports.items():
        if not 0 <= port <= 65_535:
            yield Problem(name, f"{port} is not a port", "use 1 to 65535, or 0 for any free one")
    if config.port == config.admin_port != 0:
        yield Problem(
            "admin_port", f"{config.admin_port} is the webhook port too", "give --admin-port another one"
        )
    if attaches and config.services_port != 0 and config.services_port in (config.port, config.admin_port):
        yield Problem(
            "services_port", f"{config.services_port} is another port's number too", "give it one of its own"
        )
    hosts = (
        ("host", config.host), ("admin_host", config.admin_host), ("services_host", config.services_host)
    )  # fmt: skip
    for name, host in hosts:
        if not host or any(char.isspace() or not char.isprintable() for char in host):
            yield Problem(name, "is not a host", "give a name or an address, for example 127.0.0.1")
        elif config.dev and not _is_loopback(host):
            yield Problem(
                name,
                f"{host} can be reached from outside, and --dev made its secrets up",
                f"use --{name.replace('_', '-')} 127.0.0.1, or leave --dev out and set the secrets",
            )
    if not str(config.data_dir) or "\0" in str(config.data_dir):
        yield Problem("data_dir", "is not a path", "give a directory, for example --data-dir .postroom")
    if config.archive is not None:
        scheme, separator, _ = config.archive.partition("://")
        if separator and scheme not in ARCHIVE_SCHEMES:
            known = ", ".join(f"{one}://" for one in ARCHIVE_SCHEMES)
            yield Problem("archive", f"{scheme}:// is not known", f"give a directory, or one of {known}")
        elif not config.archive or not config.archive.isprintable():
            yield Problem("archive", "is not a path", "give a directory, or leave it out: data_dir/archive")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _times(config: Config) -> Iterator[Problem]:
    if config.admin_token is not None and not _ADMIN_TOKEN.fullmatch(config.admin_token):
        yield Problem(
            "POSTROOM_ADMIN_TOKEN",
            "is shorter than 16 characters, or has some that no header carries",
            "make one with: openssl rand -hex 32",
        )
    if not 1 <= config.delivery.dead_letter_max_age_hours <= _TEN_YEARS_IN_HOURS:
        yield Problem(
            "delivery.dead_letter_max_age_hours",
            f"{config.delivery.dead_letter_max_age_hours} is not a possible number of hours",
            "give the longest that a dead letter may wait, 48 as a rule",
        )
    if not 1 <= config.session_ttl_hours <= _TEN_YEARS_IN_HOURS:
        yield Problem(
            "SESSION_TTL_HOURS",
            f"{config.session_ttl_hours} is not a possible number of hours",
            f"use 1 to {_TEN_YEARS_IN_HOURS}; the default is 24",
        )
    for name, value in (
        ("WA_ROUTER_TIMEOUT_MS", config.router_timeout_ms),
        ("WA_CORE_P95_SLO_MS", config.core_p95_slo_ms),
        ("WA_CORE_COLD_START_SLO_MS", config.core_cold_start_slo_ms),
    ):
        if not 1 <= value <= _INT32_MAX:
            yield Problem(name, f"{value} is not a possible time", "give milliseconds, 1 or more")


def _database(url: str | None) -> Iterator[Problem]:
    """A DATABASE_URL that cannot be one, or that asks for transaction pooling, where a session setting is
    lost.
    """
    if url is None:
        return
    name, session_fix = "DATABASE_URL", "use the session port (usually 5432) or connect to Postgres itself"
    example = (
        "write it like postgresql://user:password@host:5432/database, or leave it out for the embedded one"
    )
    try:
        parts = urlsplit(url)
        query = {key.lower(): value.lower() for key, value in parse_qsl(parts.query, keep_blank_values=True)}
    except ValueError:
        yield Problem(name, "is not a URL", example)
        return
    if parts.scheme not in ("postgresql", "postgres") or "://" not in url or not _is_text(url):
        yield Problem(name, "is not a postgresql:// URL", example)
        return
    places = [_host_and_port(place) for place in parts.netloc.rpartition("@")[2].split(",")]
    ports = {port for _, port in places} | set(query.get("port", "").split(","))
    if any(
        port and not (port.isascii() and port.isdigit() and 0 < int(port[:6]) <= 65_535) for port in ports
    ):
        yield Problem(name, "has a port that is none", example)
    elif any(port.lstrip("0") == POOLER_PORT for port in ports):
        yield Problem(name, f"port {POOLER_PORT} is a transaction pooler", session_fix)
    elif query.get("pgbouncer", "").strip() in ("true", "1", "yes", "on"):
        yield Problem(name, "pgbouncer=true asks for transaction pooling", session_fix)
    elif query.get("pool_mode", "").strip() in ("transaction", "statement"):
        yield Problem(name, f"pool_mode={query['pool_mode']} asks for transaction pooling", session_fix)
    elif any(host.partition(".")[0].endswith("-pooler") for host, _ in places):
        yield Problem(name, "its host is a transaction pooler (-pooler)", "use the host without -pooler")


def _schema(name: str | None) -> Iterator[Problem]:
    if name is not None and not _SCHEMA.fullmatch(name):
        yield Problem("schema", "is not the name of a schema", "use a-z, 0-9 and _, not pg_..., at most 63")


def _host_and_port(place: str) -> tuple[str, str]:
    host, colon, port = place.rpartition(":")
    return (host, port) if colon and "]" not in port else (place, "")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def dotted(*keys: str) -> str:
    """A setting's name as TOML writes it: keys joined by dots, those with other characters in quotes."""
    return ".".join(key if _BARE_KEY.fullmatch(key) else '"' + ascii(key[:60])[1:-1] + '"' for key in keys)


def _quoted(value: str) -> str:
    return ascii(value[:60] + "..." if len(value) > 60 else value)
