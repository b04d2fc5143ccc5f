"""What the rest of the router is told: frozen values with their defaults, and the error about them.

Reading them from a file and the environment is in router.settings; what must hold between them in
router.config_rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from router.credentials import digest_of
from router.domains import EXIT, HOME, KEYWORDS, LANGUAGES, MENU, Words, canonical_domain

DEFAULT_APP: Final = "default"
WEBHOOK_PATH: Final = "/webhooks/whatsapp"
DEFAULT_TIMEOUT_MS: Final = 4_000
DEFAULT_DEADLINE_MS: Final = 15_000
DEAD_LETTER_POLICIES: Final = ("standard", "fast")
ORDER_POLICIES: Final = ("continue", "strict")
SERVICE_STATES: Final = ("active", "paused", "draining")
URL_FIELDS: Final = ("url", "canary_url", "shadow_url")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: the setting's name, what is wrong, what to do about it. Shows no secret."""

    name: str
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.name}: {self.message}; fix: {self.fix}"


class ConfigError(Exception):
    """The configuration cannot be used; `problems` has all that is wrong with it, not only the first."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


@dataclass(frozen=True, slots=True, kw_only=True)
class AppConfig:
    """A Meta app: the secrets that sign its webhooks and the phone_number_ids that it may sign for.

    Without `numbers` an app speaks for every number that no other app claims.
    """

    name: str = DEFAULT_APP
    secret: str = field(repr=False)
    secret_previous: str | None = field(default=None, repr=False)
    verify_token: str = field(repr=False)
    numbers: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """Where Meta posts to: /webhooks/whatsapp, or /webhooks/whatsapp/NAME for an app that is not the
        default.
        """
        return WEBHOOK_PATH if self.name == DEFAULT_APP else f"{WEBHOOK_PATH}/{self.name}"

    @property
    def live_secrets(self) -> tuple[str, ...]:
        """The secrets that a signature may be made with: the current one and, during a rotation, the
        previous one.
        """
        return (self.secret,) if self.secret_previous is None else (self.secret, self.secret_previous)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """A domain, and the service behind it. With `url` it is posted to; without, and with a token, it attaches
    to us; with neither it is reached in process, or not at all. `token` is what it shows when it comes to us,
    to attach or to send a message; `token_sha256` is known instead where only the digest is.

    `timeout_ms` bounds one attempt, `deadline_ms` all attempts of one delivery. Between `lanes_min` and
    `lanes` attempts run at once: fewer after timeouts, more again while latency is flat. `secret` is `whsec_`
    and base64, as Standard Webhooks writes it; without one deliveries are not signed. `dead_letters` names
    the policy after which they are retried: "standard" or "fast" (router.retry). `order` says what a
    conversation does while it has one: "continue" with this service, or "strict", wait behind it. Without
    `allow_private` its URL must resolve to public addresses; cloud metadata is never reached. The router
    leaves the service alone for a while after `breaker_failures` attempts in a row that failed, or when of
    the last 50 attempts a share of `breaker_failure_ratio` failed, or of `breaker_slow_ratio` took
    `breaker_slow_ms` or longer (None: none is slow).

    `state`: "active"; "paused", what comes for it waits; "draining", conversations that are with it go on and
    no other gets to it. A share of `canary_share` of the conversations goes to `canary_url`, always the same
    ones; what that share of `shadow_share` says is copied to `shadow_url`, whose answers count for nothing.
    `public_only` names those of its URLs that must be public whatever `allow_private` says.
    """

    name: str
    url: str | None = None
    timeout_ms: int = DEFAULT_TIMEOUT_MS
    deadline_ms: int = DEFAULT_DEADLINE_MS
    lanes: int = 8
    lanes_min: int = 1
    secret: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    token_sha256: str | None = field(default=None, repr=False)
    allow_private: bool = True
    public_only: frozenset[str] = frozenset()
    state: str = SERVICE_STATES[0]
    canary_url: str | None = None
    canary_share: float = 0.1
    shadow_url: str | None = None
    shadow_share: float = 1.0
    statuses: bool = False
    dead_letters: str = DEAD_LETTER_POLICIES[0]
    order: str = ORDER_POLICIES[0]
    breaker_failures: int = 5
    breaker_failure_ratio: float = 0.5
    breaker_slow_ms: int | None = None
    breaker_slow_ratio: float = 0.8
    keywords: Words = field(default_factory=dict)

    @property
    def credential(self) -> str | None:
        """The SHA-256 of its token, in hexadecimal digits; None: it may not come to us."""
        if self.token is not None:
            return digest_of(self.token)
        return self.token_sha256

    @property
    def attaches(self) -> bool:
        """Whether it is reached over the connections that it opens."""
        return self.url is None and self.credential is not None

    def is_private_allowed(self, url_field: str) -> bool:
        return self.allow_private and url_field not in self.public_only


def default_services() -> dict[str, ServiceConfig]:
    """The domains out of the box, by name, in the order that breaks ties; none has a service yet."""
    return {name: ServiceConfig(name=name, keywords=dict(words)) for name, words in KEYWORDS.items()}


def _as_known(service: ServiceConfig) -> ServiceConfig:
    name = canonical_domain(service.name)
    return replace(service, name=name, keywords=service.keywords or dict(KEYWORDS.get(name, {})))


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingConfig:
    """What decides where a message goes, beside the keywords of the domains.

    `fallback` is "menu" or a domain. `buttons` maps the id of a button or list row to a domain, "menu",
    "home" or "exit". An id that is not in it still routes when it is a domain's name, alone or followed by
    ":" or "." and more.
    """

    fallback: str = "menu"
    languages: tuple[str, ...] = LANGUAGES
    menu: Words = field(default_factory=lambda: dict(MENU))
    home: Words = field(default_factory=lambda: dict(HOME))
    exit: Words = field(default_factory=lambda: dict(EXIT))
    buttons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig:
    """How much of everything is held at once. Every queue, buffer and wait in the router has its bound
    here.
    """

    body_max_bytes: int = 3_145_728  # Meta's own limit; more is answered 413
    header_max_bytes: int = 16_384
    max_connections: int = 2_048
    body_bytes_in_flight: int = 67_108_864
    read_timeout_ms: int = 30_000
    idle_timeout_ms: int = 75_000
    write_timeout_ms: int = 10_000
    flush_max_rows: int = 2_000
    flush_max_bytes: int = 8_388_608
    ingress_capacity: int = 4_096
    session_mailbox: int = 32
    max_live_sessions: int = 4_096
    backlog_limit: int = 1_000_000
    spool_max_bytes: int = (
        1_073_741_824  # what waits on this disk while the database is away; 0: nothing does
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryConfig:
    """With `enabled` false this process accepts and journals only; another one on the same database
    delivers. A dead letter that has waited for `dead_letter_max_age_hours` is given up.
    """

    enabled: bool = True
    dead_letter_max_age_hours: int = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class SenderConfig:
    """Where replies are sent: `url` is that of the Graph API with its version, https://graph.facebook.com/v23.0.

    `lanes` conversations are sent to at once, `timeout_ms` bounds one attempt; a reply that could not be sent
    within `max_age_hours` has failed (after 24, Meta takes templates only).
    """

    url: str
    token: str = field(repr=False)
    lanes: int = 8
    timeout_ms: int = 10_000
    max_age_hours: int = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything that a router is told. `database_url` None means the embedded Postgres in `data_dir`.
    `archive` is the directory or the URI of an object store where archives are kept; None: in `data_dir`.
    `schema` is the one of the database that our tables are in; None: the first of the login's search path.
    `services_host` and `services_port` are where services with a token attach and send; without such a
    service nobody listens there. Without `admin_token` whatever asks for one on the admin port is refused.
    Without `sender` replies are stored as `unsent`, and are never sent.

    `generated` has, by the name of its environment variable, each secret that `serve --dev` made up for
    itself.
    """

    apps: tuple[AppConfig, ...]
    services: Mapping[str, ServiceConfig] = field(default_factory=default_services)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    delivery: DeliveryConfig = field(default_factory=DeliveryConfig)
    sender: SenderConfig | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    admin_host: str = "127.0.0.1"
    admin_port: int = 8081
    services_host: str = "127.0.0.1"
    services_port: int = 8082
    data_dir: Path = Path(".postroom")
    archive: str | None = None
    database_url: str | None = field(default=None, repr=False)
    schema: str | None = None
    admin_token: str | None = field(default=None, repr=False)
    session_ttl_hours: int = 24
    router_timeout_ms: int = DEFAULT_TIMEOUT_MS
    core_p95_slo_ms: int = 1_200
    core_cold_start_slo_ms: int = 1_750
    dev: bool = False
    generated: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def archive_location(self) -> str:
        return self.archive if self.archive is not None else str(self.data_dir / "archive")

    @classmethod
    def for_embedding(
        cls,
        *,
        app_secret: str,
        verify_token: str,
        app_secret_previous: str | None = None,
        numbers: Iterable[str] = (),
        services: Iterable[ServiceConfig] = (),
        routing: RoutingConfig | None = None,
        limits: LimitsConfig | None = None,
        sender: SenderConfig | None = None,
        data_dir: str | Path = ".postroom",
        archive: str | None = None,
        database_url: str | None = None,
        schema: str | None = None,
        host: str = "127.0.0.1",
        port: int = 8080,
        admin_port: int = 8081,
        session_ttl_hours: int = 24,
    ) -> Config:
        """The configuration of a router inside another program: one app, and the domains out of the box.

        `services` replaces domains of the same name (without keywords they keep the domain's own) and adds
        the others. Use `Config(...)` for several apps, or to leave a domain out.
        """
        given = {service.name: service for service in map(_as_known, services)}
        app = AppConfig(
            secret=app_secret,
            secret_previous=app_secret_previous,
            verify_token=verify_token,
            numbers=tuple(numbers),
        )
        return cls(
            apps=(app,),
            services=given | {n: s for n, s in default_services().items() if n not in given},
            routing=routing if routing is not None else RoutingConfig(),
            limits=limits if limits is not None else LimitsConfig(),
            sender=sender,
            data_dir=Path(data_dir),
            archive=archive,
            database_url=database_url,
            schema=schema,
            host=host,
            port=port,
            admin_port=admin_port,
            session_ttl_hours=session_ttl_hours,
        )
