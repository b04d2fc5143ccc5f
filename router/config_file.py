"""postroom.toml as it is written: its tables with their types, and a reading of it that reports and goes on.

What the values mean, and what else may supply them, is in router.settings.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from router.config import DEFAULT_DEADLINE_MS, Problem
from router.config_rules import dotted
from router.domains import LANGUAGES

FILE_NAME: Final = "postroom.toml"
FILE_MAX_BYTES: Final = 1_048_576

Report = Callable[[Problem], None]
WordLists = dict[str, list[str]]

_TYPE_FIXES: Final = {
    "string_type": ("is not a string", "write it in quotes"),
    "int_type": ("is not a whole number", "write digits, without quotes"),
    "float_type": ("is not a number", "write it like 0.5, without quotes"),
    "bool_type": ("is not true or false", "write true or false, without quotes"),
    "list_type": ("is not a list", 'write it like ["one", "two"]'),
    "dict_type": ("is not a table", "write it like {en = [...]}, or as a [section]"),
    "model_type": ("is not a table", "write it as a [section]"),
}
_NOT_IN_A_DEFINITION: Final = {
    "state": "use postroom services pause, drain, resume or remove",
    "secret_env": "use postroom services secret",
    "token_env": "use postroom services token",
}
_SECRET_FIXES: Final = {
    "secret": "name an environment variable in secret_env, and put the secret there",
    "secret_previous": "name an environment variable in secret_previous_env, and put the secret there",
    "verify_token": "name an environment variable in verify_token_env, and put the token there",
    "token": "name an environment variable in token_env, and put the token there",
    "app_secret": "put it into the environment variable WHATSAPP_APP_SECRET",
    "database_url": "put it into the environment variable DATABASE_URL, or give --database-url",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class ServiceTable(_Strict):
    url: str | None = None
    timeout_ms: int | None = None
    deadline_ms: int = DEFAULT_DEADLINE_MS
    lanes: int = 8
    lanes_min: int = 1
    secret_env: str | None = None
    token_env: str | None = None
    allow_private: bool = True
    state: str = "active"
    canary_url: str | None = None
    canary_share: float = 0.1
    shadow_url: str | None = None
    shadow_share: float = 1.0
    statuses: bool = False
    dead_letters: str = "standard"
    order: str = "continue"
    breaker_failures: int = 5
    breaker_failure_ratio: float = 0.5
    breaker_slow_ms: int | None = None
    breaker_slow_ratio: float = 0.8
    keywords: WordLists = {}


class AppTable(_Strict):
    secret_env: str | None = None
    secret_previous_env: str | None = None
    verify_token_env: str | None = None
    numbers: list[str] = []


class RoutingTable(_Strict):
    fallback: str = "menu"
    languages: list[str] = list(LANGUAGES)
    menu: WordLists = {}
    home: WordLists = {}
    exit: WordLists = {}
    buttons: dict[str, str] = {}


class DeliveryTable(_Strict):
    enabled: bool = True
    dead_letter_max_age_hours: int = 48


class SenderTable(_Strict):
    url: str | None = None
    token_env: str | None = None
    lanes: int = 8
    timeout_ms: int = 10_000
    max_age_hours: int = 24


class FileTable(_Strict):
    services: dict[str, ServiceTable] = {}
    apps: dict[str, AppTable] = {}
    routing: RoutingTable = RoutingTable()
    limits: dict[str, int] = {}
    delivery: DeliveryTable = DeliveryTable()
    sender: SenderTable | None = None
    host: str | None = None
    port: int | None = None
    admin_host: str | None = None
    admin_port: int | None = None
    services_host: str | None = None
    services_port: int | None = None
    data_dir: str | None = None
    archive: str | None = None
    schema_: str | None = Field(default=None, alias="schema")
    session_ttl_hours: int | None = None
    router_timeout_ms: int | None = None
    core_p95_slo_ms: int | None = None
    core_cold_start_slo_ms: int | None = None


_TABLES: Final[dict[str, type[BaseModel]]] = {
    "services": ServiceTable,
    "apps": AppTable,
    "routing": RoutingTable,
    "delivery": DeliveryTable,
    "sender": SenderTable,
}


def read_file(path: Path, report: Report, *, required: bool) -> FileTable:
    """What can be read of the file at `path`; each thing that cannot is reported and left at its default."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(FILE_MAX_BYTES + 1)
    except FileNotFoundError:
        if required:
            report(Problem(str(path), "does not exist", "give --config the path of a file that does"))
        return FileTable()
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "not a path"
        report(Problem(str(path), f"cannot be read: {reason}", "make it a file that this user can read"))
        return FileTable()
    if len(raw) > FILE_MAX_BYTES:
        report(Problem(str(path), f"is larger than {FILE_MAX_BYTES} bytes", "give a smaller --config file"))
        return FileTable()
    return _validated(_parsed(raw, str(path), report), report)


def read_service(name: str, definition: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """The settings of one service that `definition` names, as [services.NAME] has them; each that cannot be
    used is reported and left out. Its state and its secrets are said elsewhere.
    """
    given = dict(definition)
    for key, fix in _NOT_IN_A_DEFINITION.items():
        if given.pop(key, None) is not None:
            report(Problem(dotted("services", name, key), "does not belong into a definition", fix))
    while True:
        try:
            values = ServiceTable.model_validate(given).model_dump(include=set(given))
            if values.get("timeout_ms", 0) is None:
                del values["timeout_ms"]  # as if it were not named
            return values
        except ValidationError as error:
            for found in error.errors(include_input=False, include_url=False, include_context=False):
                keys = ("services", name, *(str(key) for key in found["loc"]))
                if found["type"] == "extra_forbidden":
                    known = sorted(ServiceTable.model_fields.keys() - _NOT_IN_A_DEFINITION)
                    report(unknown_setting(keys, known))
                else:
                    report(_wrong_value(found["type"], found["msg"], keys))
                given.pop(str(found["loc"][0]), None)


def unknown_setting(keys: tuple[str, ...], known: list[str]) -> Problem:
    """The error for a key that is none, with the one that was probably meant."""
    name, unknown = dotted(*keys), keys[-1]
    if unknown in _SECRET_FIXES:
        return Problem(name, "does not belong into a file", _SECRET_FIXES[unknown])
    if meant := difflib.get_close_matches(unknown[:60], known, n=1):
        return Problem(name, "is not a setting", f"did you mean {meant[0]}?")
    return Problem(name, "is not a setting", f"remove it; known here: {', '.join(known)}")


def _parsed(raw: bytes, path: str, report: Report) -> dict[str, Any]:
    try:
        return tomllib.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        report(Problem(path, f"is not UTF-8 (at line {line})", "save it as UTF-8"))
    except RecursionError:
        report(Problem(path, "is nested too deeply", "flatten it: no setting is more than four levels deep"))
    except ValueError as error:  # TOMLDecodeError, and a number too long to be an int
        report(Problem(path, f"is not TOML: {error}", "correct it; the package has postroom.example.toml"))
    return {}


def _validated(raw: dict[str, Any], report: Report) -> FileTable:
    while True:
        try:
            return FileTable.model_validate(raw)
        except ValidationError as error:
            for found in error.errors(include_input=False, include_url=False, include_context=False):
                report(_wrong_value(found["type"], found["msg"], tuple(str(key) for key in found["loc"])))
                _prune(raw, found["loc"])


def _wrong_value(kind: str, message: str, keys: tuple[str, ...]) -> Problem:
    if kind == "extra_forbidden":
        return unknown_setting(keys, _known_keys(keys))
    return Problem(
        dotted(*keys), *_TYPE_FIXES.get(kind, (message, "see the package's postroom.example.toml"))
    )


def _known_keys(keys: tuple[str, ...]) -> list[str]:
    table = _TABLES.get(keys[0], FileTable) if len(keys) > 1 else FileTable
    return sorted(field.alias or name for name, field in table.model_fields.items())


def _prune(raw: dict[str, Any], loc: tuple[int | str, ...]) -> None:
    """Removes the deepest table entry on the way to `loc`, so that the rest can be validated."""
    table, keys = raw, [str(key) for key in loc]
    while len(keys) > 1 and isinstance(table.get(keys[0]), dict):
        table = table[keys.pop(0)]
    table.pop(keys[0], None)
