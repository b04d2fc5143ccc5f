"""Which services there are: those of the configuration file, and over them what operators said since. Pure.

Of each service the newest version counts that can be used: one that cannot, because somebody wrote it by hand
or a later change made it impossible, is reported, and the one before it goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Final

from router.config import URL_FIELDS, Config, Problem, ServiceConfig
from router.config_rules import dotted, find_problems, secret_problem
from router.domains import KEYWORDS, canonical_domain, chosen_words
from router.json_text import parse

if TYPE_CHECKING:
    from router.config_file import Report

REMOVED: Final = "removed"
_CLOSED: Final = (REMOVED, "draining")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceVersion:
    """What an operator said of a service: `state` is one of ServiceConfig's, or "removed"; `definition` has
    settings as in [services.NAME] of postroom.toml.
    """

    service: str
    version: int
    state: str
    definition: object
    created_at: datetime = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What is known of a service beside its versions."""

    secret: str | None = None
    token_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Unusable:
    """A version that cannot be used, and all that is wrong with it; 0: the service's secret or token."""

    service: str
    version: int
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class Closed:
    """A service that is draining or was removed, as it would be otherwise, and since when: a message that was
    accepted before goes where it would have gone.
    """

    service: ServiceConfig
    since: datetime


@dataclass(frozen=True, slots=True)
class Registry:
    """The services by name, in the order that breaks ties; the version that each has, none for one that is as
    the file has it; those that were closed since; and the versions that are newer and unusable.
    """

    services: Mapping[str, ServiceConfig]
    versions: Mapping[str, int]
    closed: Mapping[str, Closed]
    unusable: tuple[Unusable, ...]


def version_of(row: Mapping[str, Any]) -> ServiceVersion:
    """Of a row of service_versions, whose definition is text."""
    try:
        definition = parse(row["definition"].encode())
    except ValueError:
        definition = None
    return ServiceVersion(
        service=row["service"],
        version=row["version"],
        state=row["state"],
        definition=definition,
        created_at=row["created_at"],
    )


def credentials_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, Credentials]:
    """Of rows of service_secrets, by service."""
    return {row["service"]: Credentials(row["secret"], row["token_sha256"]) for row in rows}


def registry_of(
    config: Config, versions: Iterable[ServiceVersion], credentials: Mapping[str, Credentials]
) -> Registry:
    """`versions` newest first for each service; the services of `config` are those of the file. The newest
    versions of all services are looked at together: each was made beside the others.
    """
    unusable: list[Unusable] = []
    credentials = {name: _checked(name, given, unusable) for name, given in credentials.items()}
    history: dict[str, list[ServiceVersion]] = {}
    for version in versions:
        history.setdefault(version.service, []).append(version)
    known = set(find_problems(config))
    while True:
        services = _services_of(config, history, credentials, known, unusable)
        problems = _problems_of(config, services, known)
        newest_first = sorted(
            (versions[0] for versions in history.values() if versions),
            key=lambda one: (one.created_at, one.service),
            reverse=True,
        )
        if not problems or not (newest_first or credentials):
            used = {name: versions[0] for name, versions in history.items() if versions}
            closed = {
                name: Closed(_opened(config, version, credentials.get(name)), _closed_since(history[name]))
                for name, version in used.items()
                if version.state in _CLOSED
            }
            numbers = {name: version.version for name, version in used.items()}
            return Registry(services, numbers, closed, tuple(unusable))
        # Nobody can say whose fault it is. Passed over is the version, or the secret, without which the
        # fewest problems are left; of several versions the one that was made last, as the others were fine
        # before it.
        left: dict[tuple[str, int], int] = {}
        for version in newest_first:
            rest = {name: versions[name == version.service :] for name, versions in history.items()}
            services = _services_of(config, rest, credentials, known, [])
            left[version.service, version.version] = len(_problems_of(config, services, known))
        for name in credentials:
            kept = {other: given for other, given in credentials.items() if other != name}
            copies = {other: list(versions) for other, versions in history.items()}
            services = _services_of(config, copies, kept, known, [])
            left[name, 0] = len(_problems_of(config, services, known))
        name, number = min(left, key=lambda one: left[one])
        unusable.append(Unusable(name, number, tuple(problems)))
        if number:
            history[name].pop(0)
        else:
            del credentials[name]


def _closed_since(versions: list[ServiceVersion]) -> datetime:
    """When the first of the newest versions was made that are all closed."""
    return min(one.created_at for one in takewhile(lambda one: one.state in _CLOSED, versions))


def _opened(config: Config, version: ServiceVersion, credentials: Credentials | None) -> ServiceConfig:
    return _layered(config, replace(version, state="active"), credentials, lambda problem: None)


def _services_of(
    config: Config,
    history: dict[str, list[ServiceVersion]],
    credentials: Mapping[str, Credentials],
    known: set[Problem],
    unusable: list[Unusable],
) -> dict[str, ServiceConfig]:
    """The services with the newest version of each that can be read; those before it are taken out of
    `history`.
    """
    services = {
        name: _with_credentials(service, credentials.get(name)) for name, service in config.services.items()
    }
    for name, versions in history.items():
        while versions:
            problems: list[Problem] = []
            changed = _changed(config, services, versions[0], credentials.get(name), problems.append)
            if not problems:
                services = changed
                break
            problems += _problems_of(config, changed, {*known, *problems})
            unusable.append(Unusable(name, versions.pop(0).version, tuple(problems)))
    return services


def _problems_of(config: Config, services: Mapping[str, ServiceConfig], known: set[Problem]) -> list[Problem]:
    return [one for one in find_problems(replace(config, services=services)) if one not in known]


def _checked(name: str, given: Credentials, unusable: list[Unusable]) -> Credentials:
    wrong = None if given.secret is None else secret_problem(given.secret)
    if wrong is None:
        return given
    problem = Problem(dotted("services", name, "secret"), wrong, "make one with: postroom services secret")
    unusable.append(Unusable(name, 0, (problem,)))
    return replace(given, secret=None)


def with_version(
    config: Config,
    services: Mapping[str, ServiceConfig],
    version: ServiceVersion,
    credentials: Credentials | None,
) -> dict[str, ServiceConfig] | Unusable:
    """`services` with this version of one, or why it cannot be used."""
    problems: list[Problem] = []
    changed = _changed(config, services, version, credentials, problems.append)
    known = {*problems, *find_problems(replace(config, services=services))}
    problems += _problems_of(config, changed, known)
    return Unusable(version.service, version.version, tuple(problems)) if problems else changed


def _changed(
    config: Config,
    services: Mapping[str, ServiceConfig],
    version: ServiceVersion,
    credentials: Credentials | None,
    report: Report,
) -> dict[str, ServiceConfig]:
    name = version.service
    changed = dict(services)
    if name != canonical_domain(name):
        fix = f"change {canonical_domain(name)} instead"
        report(Problem(dotted("services", name), f"is another name of {canonical_domain(name)}", fix))
    elif version.state == REMOVED:
        changed.pop(name, None)
    else:
        changed[name] = _layered(config, version, credentials, report)
    return changed


def _layered(
    config: Config, version: ServiceVersion, credentials: Credentials | None, report: Report
) -> ServiceConfig:
    """The file's service with everything that the definition names. A URL from the database has to be public,
    unless the database says that it need not.
    """
    # Imported here: what reads settings takes long to import, and mostly there is no version.
    from router.config_file import read_service

    name = version.service
    base = config.services.get(name)
    if base is None:
        words = chosen_words(KEYWORDS.get(name, {}), {}, config.routing.languages)
        base = ServiceConfig(name=name, timeout_ms=config.router_timeout_ms, keywords=words)
    given = {}
    if isinstance(version.definition, Mapping):
        given = read_service(name, version.definition, report)
    else:
        fix = "write it as a JSON object of settings"
        report(Problem(dotted("services", name), "has a definition that cannot be read", fix))
    keywords = given.pop("keywords", {})
    for language in keywords:
        if language not in config.routing.languages:
            setting = dotted("services", name, "keywords", language)
            known = ", ".join(config.routing.languages)
            report(Problem(setting, "is not one of routing.languages", f"use one of: {known}"))
    if "allow_private" not in given:
        given["public_only"] = base.public_only | (given.keys() & set(URL_FIELDS))
    service = replace(
        base,
        **given,
        state=version.state,
        keywords=chosen_words(base.keywords, keywords, config.routing.languages),
    )
    return _with_credentials(service, credentials)


def _with_credentials(service: ServiceConfig, credentials: Credentials | None) -> ServiceConfig:
    if credentials is None:
        return service
    if credentials.secret is not None:
        service = replace(service, secret=credentials.secret)
    if credentials.token_sha256 is not None:
        service = replace(service, token=None, token_sha256=credentials.token_sha256)
    return service
