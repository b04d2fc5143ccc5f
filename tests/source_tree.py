"""The source tree as the tests of the house see it: modules, and what they import when they run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("actors", "router")


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


@cache
def nodes_of(file: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(tree_of(file)))


@cache
def sources(*folders: str) -> tuple[Path, ...]:
    """The .py files in these top-level folders."""
    return tuple(sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py")))


def module_of(file: Path) -> str:
    """`router.postgres` for router/postgres/__init__.py."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    """Every module of both packages."""
    return {module_of(file): file for file in sources(*PACKAGES)}


@cache
def imports_of(file: Path) -> frozenset[str]:
    """The modules that a file imports when it runs, also inside functions; not those under TYPE_CHECKING.

    `from package import name` is an import of `package.name` where that is a module.
    """
    return frozenset(_imports(tree_of(file), file))


def _imports(node: ast.AST, file: Path) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and _is_type_checking(child.test):
            for other in child.orelse:
                yield from _imports(other, file)
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = _base(child, file)
            for alias in child.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in modules() else base
        elif not isinstance(child, ast.expr):  # an expression holds no statement
            yield from _imports(child, file)


def _is_type_checking(test: ast.expr) -> bool:
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def _base(node: ast.ImportFrom, file: Path) -> str:
    if not node.level:
        return node.module or ""
    package = file.relative_to(ROOT).parts[:-1]
    above = package[: len(package) - node.level + 1]
    return ".".join((*above, node.module) if node.module else above)
