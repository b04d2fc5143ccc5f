"""Reads the configuration: command line, environment, postroom.toml, defaults, in that order of precedence.

Reading never stops at the first error. What cannot be read is reported, left at its default, and the rules of
router.config_rules are applied to all the rest, so that one run shows everything there is to fix.
"""

from __future__ import annotations

import base64
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from router.config import (
    DEFAULT_APP,
    DEFAULT_TIMEOUT_MS,
    AppConfig,
    Config,
    ConfigError,
    DeliveryConfig,
    LimitsConfig,
    Problem,
    RoutingConfig,
    SenderConfig,
    ServiceConfig,
)
from router.config_file import (
    FILE_NAME,
    AppTable,
    FileTable,
    RoutingTable,
    SenderTable,
    WordLists,
    read_file,
    unknown_setting,
)
from router.config_rules import GRAPH_API, dotted, find_problems, missing_secret
from router.domains import EXIT, HOME, KEYWORDS, MENU, canonical_domain, chosen_words

_INTEGERS: Final = {
    "SESSION_TTL_HOURS": "session_ttl_hours",
    "WA_ROUTER_TIMEOUT_MS": "router_timeout_ms",
    "WA_CORE_P95_SLO_MS": "core_p95_slo_ms",
    "WA_CORE_COLD_START_SLO_MS": "core_cold_start_slo_ms",
}
_PLAIN: Final = (
    "host", "port", "admin_host", "admin_port", "services_host", "services_port", *_INTEGERS.values()
)  # fmt: skip
_ENV_NAME = re.compile(r"[A-Z][A-Z0-9_]{0,127}", re.ASCII)
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}", re.ASCII)
_PLACEHOLDER: Final = "not-configured"  # fit for a header, so that nothing else is reported of it


def generate_token() -> str:
    """32 random hexadecimal digits, as long as Meta's own app secrets."""
    return secrets.token_hex(16)


def load_config(
    *,
    file: Path | None,
    environ: Mapping[str, str],
    overrides: Mapping[str, object],
    directory: Path = Path("."),
    need_secrets: bool = True,
    token: Callable[[], str] = generate_token,
) -> Config:
    """The configuration, read and checked.

    `file` None means postroom.toml in `directory`, if there is one. `overrides` are the fields of Config
    that the command line gave (host, port, data_dir, database_url, dev ...); one that is None was not
    given. Commands that check no signature pass `need_secrets=False`: an app without its secret is then
    left out, a service without its secret is not signed for. With `dev` in `overrides`, secrets that are
    missing are made by `token`.

    Raises ConfigError with every problem found, and nothing else, whatever the file and the environment
    contain.
    """
    reader = _Reader(environ, dev=overrides.get("dev") is True, need_secrets=need_secrets, token=token)
    table = read_file(file or directory / FILE_NAME, reader.problems.append, required=file is not None)
    plain = reader.plain_values(table, overrides)
    timeout_ms = plain.get("router_timeout_ms", DEFAULT_TIMEOUT_MS)
    plain.setdefault("host", "127.0.0.1" if reader.dev else "0.0.0.0")
    data_dir = overrides.get("data_dir") or table.data_dir or ".postroom"
    config = Config(
        apps=reader.apps(table.apps),
        services=reader.services(table, timeout_ms),
        routing=reader.routing(table.routing),
        limits=reader.limits(table.limits),
        delivery=DeliveryConfig(
            enabled=table.delivery.enabled,
            dead_letter_max_age_hours=table.delivery.dead_letter_max_age_hours,
        ),
        sender=reader.sender(table.sender),
        data_dir=directory / str(data_dir),
        archive=_place(directory, table.archive),
        database_url=reader.database_url(overrides),
        schema=_text(overrides.get("schema")) or table.schema_,
        admin_token=reader.admin_token(),
        dev=reader.dev,
        generated=reader.generated,
        **plain,
    )
    reported = {problem.name for problem in reader.problems}
    problems = [*reader.problems, *(found for found in find_problems(config) if found.name not in reported)]
    if problems:
        raise ConfigError(problems)
    return config


def _text(given: object) -> str | None:
    return given if isinstance(given, str) else None


def _place(directory: Path, written: str | None) -> str | None:
    return written if written is None or "://" in written else str(directory / written)


class _Reader:
    """Collects problems while it turns tables and variables into values."""

    def __init__(
        self, environ: Mapping[str, str], *, dev: bool, need_secrets: bool, token: Callable[[], str]
    ) -> None:
        self.dev = dev
        self.problems: list[Problem] = []
        self.generated: dict[str, str] = {}
        self._environ = environ
        self._need_secrets = need_secrets
        self._token = token

    def report(self, name: str, message: str, fix: str) -> None:
        self.problems.append(Problem(name, message, fix))

    def admin_token(self) -> str | None:
        """Empty is as good as unset: whoever sends none must not be let in."""
        given = self._environ.get("POSTROOM_ADMIN_TOKEN", "").strip()
        return given or None

    def plain_values(self, table: FileTable, overrides: Mapping[str, object]) -> dict[str, Any]:
        values = {name: value for name in _PLAIN if (value := getattr(table, name)) is not None}
        for variable, name in _INTEGERS.items():
            text = self._environ.get(variable, "").strip()
            if text and _INTEGER.fullmatch(text):
                values[name] = int(text)
            elif text:
                self.report(variable, "is not a whole number", f"write digits only, or unset it ({name})")
        given = {name: value for name, value in overrides.items() if value is not None}
        return values | {name: value for name, value in given.items() if name in _PLAIN}

    def database_url(self, overrides: Mapping[str, object]) -> str | None:
        given = overrides.get("database_url")
        return str(given) if given is not None else self._environ.get("DATABASE_URL", "").strip() or None

    def apps(self, tables: Mapping[str, AppTable]) -> tuple[AppConfig, ...]:
        named = dict(tables)
        variables = ("WHATSAPP_APP_SECRET", "WHATSAPP_VERIFY_TOKEN")
        if DEFAULT_APP not in named and (not named or any(self._environ.get(name) for name in variables)):
            named = {DEFAULT_APP: AppTable(), **named}
        return tuple(app for name, table in named.items() if (app := self._app(name, table)) is not None)

    def _app(self, name: str, table: AppTable) -> AppConfig | None:
        own = name == DEFAULT_APP
        secret = self._secret(name, "secret", table.secret_env or ("WHATSAPP_APP_SECRET" if own else None))
        verify_token = self._secret(
            name, "verify_token", table.verify_token_env or ("WHATSAPP_VERIFY_TOKEN" if own else None)
        )
        if secret is None or verify_token is None:
            return None
        previous = table.secret_previous_env
        if previous is not None and _ENV_NAME.fullmatch(previous) and previous not in self._environ:
            if self._need_secrets and not self.dev:
                self.problems.append(missing_secret(previous, "secret_previous"))
        elif previous is None and own:
            previous = "WHATSAPP_APP_SECRET_PREVIOUS"
        return AppConfig(
            name=name,
            secret=secret,
            secret_previous=self._named(previous, dotted("apps", name, "secret_previous_env")) or None,
            verify_token=verify_token,
            numbers=tuple(table.numbers),
        )

    def _secret(self, app: str, part: str, variable: str | None) -> str | None:
        """An app's secret. A missing one is reported, made (dev), or None (where a command needs none)."""
        setting = dotted("apps", app, f"{part}_env")
        if variable is None:
            self.report(setting, "is missing", "name the environment variable that has it")
            return _PLACEHOLDER
        if not _ENV_NAME.fullmatch(variable):
            self._named(variable, setting)
            return _PLACEHOLDER
        if value := self._environ.get(variable, ""):
            return self._without_white_space(variable, value)
        if self.dev:
            return self.generated.setdefault(variable, self._token())
        if not self._need_secrets:
            return None
        reason = "is empty" if variable in self._environ else "is not set"
        self.problems.append(missing_secret(variable, part, reason=reason))
        return _PLACEHOLDER

    def _without_white_space(self, variable: str, value: str) -> str:
        """`value`; white space around it is reported under the variable's own name and cut off."""
        if value != value.strip() or not value.strip():
            self.report(
                variable, "has white space around it, or nothing else", "remove it, also a line break"
            )
        return value.strip() or _PLACEHOLDER

    def _named(self, variable: str | None, setting: str) -> str | None:
        """The value of the environment variable that `setting` names, None when unset. A wrong name is not
        repeated in the error: it may be the secret itself.
        """
        if variable is None:
            return None
        if not _ENV_NAME.fullmatch(variable):
            self.report(
                setting,
                "is not the name of an environment variable",
                "write its name here (A-Z, 0-9 and _), never the secret itself",
            )
            return None
        value = self._environ.get(variable)
        return self._without_white_space(variable, value) if value else value

    def services(self, table: FileTable, timeout_ms: int) -> dict[str, ServiceConfig]:
        services: dict[str, ServiceConfig] = {}
        languages = table.routing.languages
        for written, found in table.services.items():
            name = canonical_domain(written)
            if name in services:
                self.report(
                    dotted("services", written), f"is another name of {name}", f"keep [services.{name}] only"
                )
                continue
            self._check_languages(found.keywords, languages, "services", written, "keywords")
            services[name] = ServiceConfig(
                name=name,
                url=found.url,
                timeout_ms=timeout_ms if found.timeout_ms is None else found.timeout_ms,
                deadline_ms=found.deadline_ms,
                lanes=found.lanes,
                lanes_min=found.lanes_min,
                secret=self._service_secret(written, found.secret_env),
                token=self._service_token(written, found.token_env),
                allow_private=found.allow_private,
                state=found.state,
                canary_url=found.canary_url,
                canary_share=found.canary_share,
                shadow_url=found.shadow_url,
                shadow_share=found.shadow_share,
                statuses=found.statuses,
                dead_letters=found.dead_letters,
                order=found.order,
                breaker_failures=found.breaker_failures,
                breaker_failure_ratio=found.breaker_failure_ratio,
                breaker_slow_ms=found.breaker_slow_ms,
                breaker_slow_ratio=found.breaker_slow_ratio,
                keywords=chosen_words(KEYWORDS.get(name, {}), found.keywords, languages),
            )
        for name, words in KEYWORDS.items():
            services.setdefault(
                name,
                ServiceConfig(name=name, timeout_ms=timeout_ms, keywords=chosen_words(words, {}, languages)),
            )
        return services

    def _service_secret(self, service: str, variable: str | None) -> str | None:
        setting = dotted("services", service, "secret_env")
        value = self._named(variable, setting)
        if variable is None or value or not _ENV_NAME.fullmatch(variable):
            return value
        if self.dev:
            made = "whsec_" + base64.b64encode(self._token().encode()).decode()
            return self.generated.setdefault(variable, made)
        if self._need_secrets:
            reason = "is not set" if value is None else "is empty"
            self.report(
                variable,
                f"{reason}, and {setting} names it",
                f"set it to the whsec_ secret that {service} verifies with, or leave secret_env out",
            )
        return None

    def _service_token(self, service: str, variable: str | None) -> str | None:
        """None: it does not attach, or the token is not there, and who asks needs none."""
        if variable is None:
            return None
        value = self._named(variable, dotted("services", service, "token_env"))
        if value or not _ENV_NAME.fullmatch(variable):
            return value or _PLACEHOLDER
        if self.dev:
            return self.generated.setdefault(variable, self._token())
        if self._need_secrets:
            self.report(
                variable,
                f"is {'not set' if value is None else 'empty'}, and services.{service}.token_env names it",
                f"set it to the token that {service} shows when it attaches",
            )
        return None

    def sender(self, table: SenderTable | None) -> SenderConfig | None:
        if table is None:
            return None
        if table.url is None:
            self.report("sender.url", "is missing", f"write it like {GRAPH_API}, or take [sender] out")
        token = self._sender_token(table.token_env)
        if token is None:
            return None
        return SenderConfig(
            url=table.url or GRAPH_API,
            token=token,
            lanes=table.lanes,
            timeout_ms=table.timeout_ms,
            max_age_hours=table.max_age_hours,
        )

    def _sender_token(self, variable: str | None) -> str | None:
        """None: it is not there, and who asks needs none."""
        if variable is None:
            self.report("sender.token_env", "is missing", "name the environment variable that has the token")
            return _PLACEHOLDER
        value = self._named(variable, "sender.token_env")
        if value or not _ENV_NAME.fullmatch(variable):
            return value or _PLACEHOLDER
        if not self._need_secrets:
            return None
        self.report(
            variable,
            "is not set" if value is None else "is empty",
            "set it to the access token of the WhatsApp app (sender.token_env names it)",
        )
        return _PLACEHOLDER

    def routing(self, table: RoutingTable) -> RoutingConfig:
        for action, given in (("menu", table.menu), ("home", table.home), ("exit", table.exit)):
            self._check_languages(given, table.languages, "routing", action)
        return RoutingConfig(
            fallback=canonical_domain(table.fallback),
            languages=tuple(dict.fromkeys(table.languages)),
            menu=chosen_words(MENU, table.menu, table.languages),
            home=chosen_words(HOME, table.home, table.languages),
            exit=chosen_words(EXIT, table.exit, table.languages),
            buttons={button: canonical_domain(target) for button, target in table.buttons.items()},
        )

    def _check_languages(self, words: WordLists, languages: list[str], *keys: str) -> None:
        for language in words:
            if language not in languages:
                self.report(
                    dotted(*keys, language),
                    "is not one of routing.languages",
                    f"add it there, or use one of: {', '.join(languages)}",
                )

    def limits(self, table: Mapping[str, int]) -> LimitsConfig:
        known = [limit.name for limit in fields(LimitsConfig)]
        for name in table:
            if name not in known:
                self.problems.append(unknown_setting(("limits", name), known))
        return LimitsConfig(**{name: value for name, value in table.items() if name in known})
