"""The README and the other pages: their commands and examples work, and what they point to is there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import scenarios_kit as kit
from tables import each

from router.cli import main
from router.config import LimitsConfig
from router.settings import load_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

TRY = "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/postroom demo"
TEST = "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.fixture
def home() -> Iterator[Path]:
    with kit.new_home() as home:
        yield home


def test_the_two_commands_stand_there() -> None:
    assert f"    {TRY}\n" in README
    assert f"    {TEST}\n" in README


def test_ci_ends_with_the_tests_of_the_readme() -> None:
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert script.rstrip().endswith('"$bin/pytest"')
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


@pytest.mark.postgres
def test_the_embedding_example_delivers(home: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=home,
            env=kit.environment(),
            capture_output=True,
            text=True,
            timeout=kit.HANGS,
            check=False,
        )

    done = run("-W", "error", "-c", blocks("python")[0])
    assert (done.returncode, done.stdout) == (0, "rides heard: taxi please\n"), done.stderr
    checked = run("-m", "router", "check", "--json")
    assert json.loads(checked.stdout)["places"]["delivered"] == 1


def test_the_embedding_example_is_about_ten_lines() -> None:
    assert sum(bool(line.strip()) for line in blocks("python")[0].splitlines()) <= 14


def test_the_blueprint_example_mounts_every_path() -> None:
    names: dict[str, object] = {}
    exec(blocks("python")[1], names)
    router = SimpleNamespace(
        config=SimpleNamespace(limits=LimitsConfig()),
        webhooks=SimpleNamespace(paths=("/webhooks/whatsapp", "/webhooks/whatsapp/kigali")),
    )
    app = names["my_app"](router)  # type: ignore[operator]
    assert {rule.rule for rule in app.url_map.iter_rules()} >= set(router.webhooks.paths)


def test_the_configuration_examples_are_read(tmp_path: Path) -> None:
    file = tmp_path / "postroom.toml"
    file.write_text("\n".join(blocks("toml")))
    secrets = {
        "WHATSAPP_APP_SECRET": "s",
        "WHATSAPP_VERIFY_TOKEN": "v",
        "WHATSAPP_ACCESS_TOKEN": "t",
        "RIDES_SECRET": "whsec_c2VjcmV0",
    }
    config = load_config(file=file, environ=secrets, overrides={})
    assert config.services["rides"].url == "http://127.0.0.1:9001/messages"
    assert config.services["rides"].secret == "whsec_c2VjcmV0"
    assert config.sender is not None
    assert config.sender.token == "t"


def test_every_command_is_in_the_table() -> None:
    table = README.split("## Commands")[1].split("\n## ")[0]
    for name, command in main.commands.items():
        for path in (
            [f"{name} {inner}" for inner in command.commands] if isinstance(command, click.Group) else [name]
        ):
            assert f"`postroom {path}" in table


@each("page", PAGES)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", path):
            continue
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, (
                target
            )


@each("page", PAGES)
def test_files_and_tests_that_are_named_exist(page: Path) -> None:
    file = ROOT
    for named, test in re.findall(
        r"`((?:tests|router|actors|bench|docs)/[\w./-]+)?(?:::(\w+))?`", page.read_text()
    ):
        if named:
            file = ROOT / named
            assert file.exists(), named
        if test:
            assert f"def {test}(" in file.read_text(encoding="utf-8"), f"{file}::{test}"


def test_every_setting_has_its_line() -> None:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    example = (ROOT / "router/postroom.example.toml").read_text(encoding="utf-8")
    for name in {*re.findall(r"^(?:# )?(\w+) = ", example, re.M)} - {"BOOK_NOW", "BACK"}:
        assert f"`{name}`" in page, name
    for name in re.findall(r"^#?([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.M):
        assert f"`{name}`" in page or name in ("RIDES_SECRET", "JOBS_TOKEN"), name


def test_every_decision_is_listed_and_has_its_parts() -> None:
    folder = ROOT / "docs/decisions"
    listed = re.findall(r"\]\((\d{4}-[\w-]+\.md)\)", (folder / "README.md").read_text(encoding="utf-8"))
    assert listed == sorted(file.name for file in folder.glob("0*.md"))
    for name in listed:
        heads = re.findall(r"^## (.+)$", (folder / name).read_text(encoding="utf-8"), re.M)
        assert heads == ["Context", "Measurement", "Decision", "Cost"], name
