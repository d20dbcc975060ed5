"""The documentation keeps its word: its Python runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from documentation import COMMANDS, ROOT, blocks, shell_lines, write_film

README = ROOT / "README.md"
PAGES = [ROOT / "docs" / name for name in re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)]
DOCUMENTS = [README, *PAGES, *(ROOT / "packages" / name / "README.md" for name in COMMANDS), *sorted(ROOT.glob("examples/*/README.md"))]
GENERATED = ("parity", "benchmarks")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each of the four commands."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in COMMANDS.items():
            cli = importlib.import_module(module)
            patch.setattr(cli, "run", lambda main, parser, argv=None, name=name: found.update({name: parser}) or 0)
            cli.main([])
    return found


def flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Every option of a parser and of its subcommands."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from flags(inner)


def parses(parser: argparse.ArgumentParser, arguments: list[str]) -> bool:
    try:
        parser.parse_args(arguments)
    except SystemExit as done:
        return not done.code
    return True


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_python_of_a_page_runs_as_it_stands(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_film(tmp_path / "film.mp4")
    examples = [block for block in blocks(path) if block.language == "python" and not block.title]
    assert examples or path != README
    for block in examples:
        exec(compile(block.text, f"{named(path)}: {block.section}", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_commands_of_a_page_exist(path: Path, parsers: dict[str, argparse.ArgumentParser], capsys: pytest.CaptureFixture[str]) -> None:
    sessions = set(re.findall(r"^def (\w+)\(session: nox", (ROOT / "noxfile.py").read_text(), re.MULTILINE))
    for block in blocks(path):
        for words in shell_lines(block):
            command, *arguments = words
            if command in parsers:
                assert parses(parsers[command], arguments), f"{shlex.join(words)}\n{capsys.readouterr().err}"
            if arguments[:3] == ["-m", "nox", "-s"]:
                asked = arguments[3 : arguments.index("--") if "--" in arguments else None]
                assert set(asked) <= sessions, shlex.join(words)


def test_overview_names_every_command(parsers: dict[str, argparse.ArgumentParser]) -> None:
    overview = (ROOT / "docs" / "index.md").read_text()
    for name, parser in parsers.items():
        (commands,) = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        (listed,) = re.findall(rf"`{name} ([\w \\|]+)`", overview)
        assert set(listed.split(" \\| ")) == set(commands)


def test_page_of_the_trainer_names_the_recipes_there_are() -> None:
    page = (ROOT / "packages" / "wan-train" / "README.md").read_text()
    recipes = {path.stem for path in (ROOT / "packages/wan-train/src/wan_train/recipes").glob("*.toml")}
    assert set(re.findall(r"^\| `([\w.-]+)` \|", page, re.MULTILINE)) == recipes
    assert set(re.findall(r"wan-train run ([\w.-]+)", page)) <= recipes


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_options_that_a_page_mentions_exist(path: Path, parsers: dict[str, argparse.ArgumentParser]) -> None:
    known = {flag for parser in parsers.values() for flag in flags(parser)}
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    mentioned = {flag for code in re.findall(r"`([^`]+)`", prose) for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", code)}
    assert mentioned <= known, f"no command takes {', '.join(sorted(mentioned - known))}"


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_page_of_the_navigation_exists_and_its_references_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    for link in re.findall(r"\]\(([^)#:]+\.(?:md|png|svg|gif))(?:#[^)]*)?\)", text):
        assert (path.parent / link).exists(), f"{named(path)} links to {link}"
    for included in re.findall(r'^--8<-- "(.+)"$', text, re.MULTILINE):
        assert (ROOT / included).exists(), f"{named(path)} includes {included}"
        assert "](" not in re.sub(r"\]\((https?:|#)", "", (ROOT / included).read_text()), (
            f"{included} is included: its relative links break"
        )
    for module in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE):
        assert importlib.import_module(module).__doc__, f"{named(path)} documents {module}"


def test_readme_links_lead_somewhere() -> None:
    for link in re.findall(r"(?:\]\(|src=\")([^)\"#:]+)(?:#[^)\"]*)?[)\"]", README.read_text()):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("name", GENERATED)
def test_generated_page_says_how_it_was_made(name: str) -> None:
    assert f"python -m nox -s bench -- {name}" in (ROOT / "docs" / f"{name}.md").read_text()
