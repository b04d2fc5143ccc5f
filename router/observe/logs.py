"""Loggers for the library, and the set-up of logging for the command line. What is masked: observe.masking.

Nothing is configured by importing this. Inside another program events go to that program's structlog
configuration if it has one, else to the standard library's logging under the logger's name, masked in
either case.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, TextIO

from router.observe.masking import format_exception, mask

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}


class Logger:
    """Writes events: a fixed text and named values, as in `log.info("flushed", rows=12, elapsed_ms=3.1)`.

    `service=` and `domain=` name ours; a value under `name=` is taken for a person's and masked. `bind`
    gives a logger that adds the same values to every event, for example `correlation_id`.
    """

    __slots__ = ("_bound", "_name")

    def __init__(self, name: str, bound: Mapping[str, Any] | None = None) -> None:
        self._name = name
        self._bound = dict(bound or {})

    def __repr__(self) -> str:
        return f"Logger({self._name!r}, {mask(self._bound)!r})"

    def bind(self, **values: Any) -> Logger:
        """A logger that adds `values` to each event, over those of this one."""
        return Logger(self._name, {**self._bound, **values})

    def debug(self, event: str, /, **values: Any) -> None:
        self._log("debug", event, values)

    def info(self, event: str, /, **values: Any) -> None:
        self._log("info", event, values)

    def warning(self, event: str, /, **values: Any) -> None:
        self._log("warning", event, values)

    def error(self, event: str, /, **values: Any) -> None:
        self._log("error", event, values)

    def critical(self, event: str, /, **values: Any) -> None:
        self._log("critical", event, values)

    def exception(self, event: str, /, **values: Any) -> None:
        """An error with the traceback of the exception that is being handled."""
        self._log("error", event, {"exc_info": True, **values})

    def _log(self, level: str, event: str, values: dict[str, Any]) -> None:
        # structlog takes a quarter of a second to import; who uses it has imported it.
        structlog = sys.modules.get("structlog")
        configured = structlog is not None and structlog.is_configured()
        target = logging.getLogger(self._name)
        if not configured and not target.isEnabledFor(LEVELS[level]):
            return
        given = {**self._bound, **values}
        error = _exception_of(given.pop("exc_info", None))
        masked = mask({**given, "event": event})
        if error is not None:
            masked["exception"] = format_exception(error)
        text = masked.pop("event")
        if configured and structlog is not None:
            getattr(structlog.get_logger(self._name), level)(text, **masked)
        else:
            target.log(LEVELS[level], "%s", _as_line(text, masked), extra={"postroom": masked}, stacklevel=3)


def get_logger(name: str, **bound: Any) -> Logger:
    """The logger called `name`, usually the module's `__name__`; `bound` is added to each of its events."""
    return Logger(name, bound)


def _exception_of(exc_info: object) -> BaseException | None:
    if isinstance(exc_info, BaseException):
        return exc_info
    if isinstance(exc_info, tuple):
        return _exception_of(exc_info[1])
    return sys.exception() if exc_info else None


def _as_line(event: str, values: dict[str, Any]) -> str:
    shown = [f"{key}={value}" for key, value in values.items() if key != "exception"]
    trace = f"\n{values['exception']}" if "exception" in values else ""
    return " ".join([event, *shown]) + trace


def mask_event(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """`mask` as a structlog processor, for a program that logs through structlog itself."""
    return mask(event)


def configure_logging(
    *, form: Literal["json", "console"] = "console", level: str = "info", stream: TextIO | None = None
) -> None:
    """Sends all logs of the process, also those of libraries, to `stream` (standard error), masked.

    For the command line only: it replaces the handlers of the root logger and configures structlog.
    """
    import structlog

    output = stream if stream is not None else sys.stderr
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer(default=repr)
        if form == "json"
        else structlog.dev.ConsoleRenderer(colors=output.isatty())
    )
    common: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.format_exc_info,
        mask_event,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    handler = logging.StreamHandler(output)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=common,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(LEVELS[level])
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *common,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
