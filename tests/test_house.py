"""The laws of the house: which way imports point, what each folder may hold, and what the wheel contains."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import click
import pytest
from source_tree import PACKAGES, ROOT, imports_of, module_of, modules, nodes_of, sources

from router.cli import main

LAYERS = {
    "cli": (
        "router.cli",
        "router.__main__",
        "archives",
        "audit",
        "conform",
        "dlq",
        "erase",
        "events",
        "jobs",
        "services",
        "command",
    ),
    "commands": (
        "serve",
        "demo",
        "trial",
        "operations",
        "registering",
        "retrieval",
        "erasing",
        "cleaning",
        "conformance",
        "reparse",
        "explain",
        "conservation",
    ),
    "client": ("client",),
    "edge": ("edge",),
    "app": ("router", "router.app", "archiving", "database", "housekeeping", "inbound", "roster", "sending"),
    "accept": ("accept",),
    "adapters": ("postgres", "delivery", "channels", "spool", "archive"),
    "policy": ("routing", "retry", "home_menu", "registry"),
    "config": ("config", "config_file", "config_rules", "settings"),
    "words": ("domains", "json_text", "mac", "credentials", "clock", "schedule"),
    "observe": ("observe",),
    "actors": ("actors",),
    "simulator": ("simulator",),
}
"""Every room of both packages, by layer; names without a dot are rooms of `router`."""

WHOLE = {"router", "router.app", "router.cli", "router.__main__"}

MAY_IMPORT = {
    "cli": {"commands", "app", "adapters", "config", "words", "observe", "actors"},
    "commands": {"edge", "app", "adapters", "policy", "config", "words", "actors", "simulator"},
    "client": {"adapters", "words", "actors"},
    "edge": {"app", "accept", "adapters", "config", "words", "observe", "actors"},
    "app": {"accept", "adapters", "policy", "config", "words", "observe", "actors"},
    "accept": {"adapters", "config", "actors"},
    "adapters": {"words", "observe", "actors"},
    "policy": {"config", "words", "actors"},
    "config": {"words"},
    "words": set(),
    "observe": set(),
    "actors": set(),
    "simulator": set(),
}
"""What a layer may import beside itself. docs/architecture.md draws this table."""

BETWEEN_ADAPTERS = {("postgres", "channels")}  # a stored body is read as the channel reads it

ADAPTERS_OF_PORTS = {
    "router.postgres.jobs",
    "router.postgres.journal",
    "router.postgres.lease",
    "router.postgres.outbox",
    "router.postgres.statuses",
    "router.delivery.http",
    "router.delivery.graph",
    "router.spool.directory",
}
"""Only router.app knows these: everybody else knows the port."""

OURS = {
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "pyproject.toml", ".env.example", ".gitignore",
    ".ci", "actors", "bench", "docs", "migrations", "router", "tests",
}  # fmt: skip

SQL_FILES = [*(ROOT / "migrations").glob("*.sql"), *(ROOT / "router/postgres/queries").glob("*.sql")]


def room_of(module: str) -> str:
    """`postgres` for router.postgres.journal, `router.app` for the few that LAYERS names whole."""
    package, *inner = module.split(".")
    whole = ".".join((package, *inner[:1]))
    if package != "router":
        return package
    return whole if whole in WHOLE else inner[0]


def layer_of(module: str) -> str:
    room = room_of(module)
    return next((layer for layer, rooms in LAYERS.items() if room in rooms), f"no layer for {room}")


def is_ours(module: str) -> bool:
    return module.split(".")[0] in PACKAGES


# Imports


def test_the_actors_import_the_standard_library_and_trio() -> None:
    for file in sources("actors"):
        roots = {name.split(".")[0] for name in imports_of(file)}
        assert roots - sys.stdlib_module_names <= {"trio", "actors"}, module_of(file)


def test_the_simulator_shares_no_code_with_the_router() -> None:
    for file in sources("router/simulator"):
        foreign = {
            name
            for name in imports_of(file)
            if name.split(".")[0] not in sys.stdlib_module_names and not name.startswith("router.simulator")
        }
        assert foreign <= {"trio"}, module_of(file)


def test_every_room_has_its_layer() -> None:
    rooms = {room_of(module) for module in modules()}
    assert rooms == {room for rooms in LAYERS.values() for room in rooms}


def test_imports_point_down() -> None:
    list(TopologicalSorter(MAY_IMPORT).static_order())  # the table itself goes one way: else CycleError
    wrong = [
        f"{module} imports {name}"
        for module, file in modules().items()
        for name in filter(is_ours, imports_of(file))
        if layer_of(name) not in MAY_IMPORT[layer_of(module)] | {layer_of(module)}
    ]
    assert wrong == []  # say it in MAY_IMPORT and docs/architecture.md, or turn the import round


def test_nothing_is_allowed_that_nobody_needs() -> None:
    used: dict[str, set[str]] = {layer: set() for layer in LAYERS}
    for module, file in modules().items():
        for name in filter(is_ours, imports_of(file)):
            used[layer_of(module)].add(layer_of(name))
    assert {layer: used[layer] - {layer} for layer in LAYERS} == MAY_IMPORT


def test_adapters_do_not_know_each_other() -> None:
    adapters = LAYERS["adapters"]
    found = {
        (room_of(module), room_of(name))
        for module, file in modules().items()
        for name in filter(is_ours, imports_of(file))
        if room_of(module) in adapters and room_of(name) in adapters
    }
    assert {pair for pair in found if pair[0] != pair[1]} <= BETWEEN_ADAPTERS


def test_only_the_app_names_the_adapters_of_ports() -> None:
    for module, file in modules().items():
        if module not in ("router.app", "router.archiving", "router.housekeeping"):
            assert not imports_of(file) & ADAPTERS_OF_PORTS, module


def test_no_module_is_in_an_import_circle() -> None:
    graph = {
        module: {name for name in imports_of(file) if name in modules() and name != module}
        for module, file in modules().items()
    }
    list(TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_a_host_that_imports_us_pays_for_no_library_of_the_commands_and_keeps_its_own_logging() -> None:
    script = (
        "import logging, sys, router, router.config_rules, router.observe.logs as logs;"
        "logs.get_logger('x').info('y');"
        "print(sys.modules.keys() & {'pydantic', 'structlog', 'pyarrow'}, logging.getLogger().handlers)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "set() []\n"


def test_the_packages_import_neither_tests_nor_bench() -> None:
    for file in sources(*PACKAGES):
        assert not {name.split(".")[0] for name in imports_of(file)} & {"tests", "bench"}, module_of(file)


def test_the_picture_of_the_imports_is_this_table() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    picture = next(
        block for block in re.findall(r"```mermaid\n(.*?)```", page, re.S) if "%% imports" in block
    )
    drawn: dict[str, set[str]] = {layer: set() for layer in LAYERS}
    for line in picture.splitlines():
        if "-->" in line:
            above, below = line.strip().split(" --> ")
            drawn[above] |= set(below.split(" & "))
    assert drawn == MAY_IMPORT
    rooms = {name: tuple(text.split("<br>")[1].split(", ")) for name, text in _boxes(picture)}
    assert rooms == {
        layer: tuple(room.removeprefix("router.") if "." in room else room for room in rooms)
        for layer, rooms in LAYERS.items()
    }


def _boxes(picture: str) -> list[tuple[str, str]]:
    return re.findall(r'^\s*(\w+)\["(.+)"\]$', picture, re.M)


# Files


def test_the_top_level_is_fixed() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    assert {Path(line).parts[0] for line in listed.stdout.splitlines()} <= OURS


def test_every_file_opens_by_saying_what_belongs_in_it() -> None:
    for file in sources("actors", "router", "bench", "tests"):
        assert re.match(r'(#!.*\n)?"""[^"\s]', file.read_text(encoding="utf-8")), file.relative_to(ROOT)


def test_the_packages_neither_print_nor_block_nor_leave_things_to_do() -> None:
    for file in sources(*PACKAGES):
        assert "TODO" not in file.read_text(encoding="utf-8"), module_of(file)
        for node in nodes_of(file):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("print", "time.sleep"), (
                    f"{module_of(file)}:{node.lineno}"
                )


def test_property_tests_draw_text_cheaply() -> None:
    """tests/texts.py says why."""
    for file in (ROOT / "tests").rglob("*.py"):
        plain = re.search(r"st\.text\((?=\)|min_size|max_size)", file.read_text(encoding="utf-8"))
        assert plain is None or file == Path(__file__), file


# SQL


def test_python_holds_no_sql() -> None:
    statement = re.compile(r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH|SET|CREATE|ALTER|DROP|TRUNCATE) \w")
    for file in sources(*PACKAGES):
        for line, text in _strings(file):
            assert not statement.match(text), f"{module_of(file)}:{line}"


def _strings(file: Path) -> Iterator[tuple[int, str]]:
    for node in nodes_of(file):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def test_sql_is_told_the_time() -> None:
    assert SQL_FILES
    for file in SQL_FILES:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            code = line.partition("--")[0]
            rest = re.sub(r"\w+ timestamptz NOT NULL DEFAULT now\(\)|SET DEFAULT now\(\)", "", code)
            assert not re.search(r"\bnow\(\)|current_timestamp|localtimestamp", rest, re.I), (
                f"{file.name}:{number}"
            )


def test_the_databases_own_clock_is_for_leases() -> None:
    text = (ROOT / "migrations/0001_journal.sql").read_text(encoding="utf-8")
    functions = re.findall(r"CREATE FUNCTION (\w+)\(.*?\$\$(.*?)\$\$", text, re.S)
    by_hand = {"create_wa_events_partition"}  # an operator's call, without an argument
    using = {name for name, body in functions if "clock_timestamp" in body}
    assert using == {"postroom_take_lease", "postroom_renew_lease"} | by_hand
    assert not any(
        "clock_timestamp" in file.read_text() for file in SQL_FILES if file.parent.name == "queries"
    )


def test_every_statement_is_used() -> None:
    python = "\n".join(file.read_text(encoding="utf-8") for file in sources("router"))
    for file in SQL_FILES:
        for name in re.findall(r"^-- name: (\w+)$", file.read_text(encoding="utf-8"), re.M):
            assert re.search(rf'[\[(]\s*"{name}"', python), f"{file.name}: {name}"


def test_migrations_are_contiguous() -> None:
    names = sorted(file.name for file in (ROOT / "migrations").iterdir())
    assert [name[:5] for name in names] == [f"{number:04}_" for number in range(1, len(names) + 1)]
    assert all(re.fullmatch(r"\d{4}_\w+\.sql", name) for name in names)


# The wheel and the command


def test_the_wheel_holds_what_runs_and_nothing_else(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {Path(name).parts[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)
    for file in sources(*PACKAGES):
        assert str(file.relative_to(ROOT)) in names
    for file in (ROOT / "migrations").iterdir():
        assert f"router/postgres/migrations/{file.name}" in names
    for file in (ROOT / "router/postgres/queries").iterdir():
        assert f"router/postgres/queries/{file.name}" in names
    assert {"router/py.typed", "actors/py.typed", "router/postroom.example.toml"} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert not any("test" in name or "__pycache__" in name for name in names)


def _commands(
    group: click.Group, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from _commands(command, (*path, name))


@pytest.mark.parametrize(
    ("path", "command"), [pytest.param(*one, id="-".join(one[0])) for one in _commands(main)]
)
def test_every_command_has_help_with_an_example(path: tuple[str, ...], command: click.Command) -> None:
    text = command.get_help(click.Context(command, info_name=f"postroom {' '.join(path)}"))
    example = re.search(r"Example: +(.*postroom .*)", text)
    assert example is not None
    assert f"postroom {path[0]}" in example[1]
