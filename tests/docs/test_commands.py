"""Every command that a page shows exists, with the options that it is given; links lead somewhere."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from autoquant.cli.main import COMMANDS, GROUPS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]  # it names what was

BLOCK = re.compile(r"^```(?:bash|sh|console|text)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:autoquant|make|python|\.venv/bin/\S+) [^`\n]*)`")
STARTS = ("autoquant", "make", "python")


def commands(page: str) -> Iterator[str]:
    """Command lines in blocks and in running text, continued lines joined, comments left out."""
    lines = [line for block in BLOCK.findall(page) for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *INLINE.findall(page)]:
        for part in line.removeprefix("$ ").partition("  #")[0].split(" && "):
            command = part.strip().removeprefix(".venv/bin/")
            if command.split(" ")[0] in STARTS:
                yield command


def problem(line: str, targets: set[str]) -> str | None:
    """What of a command line does not exist, None where all of it does."""
    words = shlex.split(line.replace("…", ""), comments=True)
    program, rest = words[0], words[1:]
    options = [word.partition("=")[0] for word in rest if re.fullmatch(r"--?[a-zA-Z][\w-]*(=.*)?", word)]
    if program == "make":
        return next((f"no target '{w}'" for w in rest if w.islower() and "=" not in w and w not in targets), None)
    if program == "python" and rest[:1] == ["-m"] and rest[1:2] != ["autoquant"]:
        return None
    if program == "python" and rest[:1] != ["-m"]:
        script = ROOT / rest[0]
        if not rest[0].endswith(".py"):
            return None
        if not script.is_file():
            return f"no script '{rest[0]}'"
        text = script.read_text(encoding="utf-8")
        return next((f"{rest[0]} has no '{option}'" for option in options if f'"{option}"' not in text), None)
    name = next((word for word in rest if not word.startswith("-") and word not in ("autoquant",)), None)
    if name is None or name == "COMMAND":
        return None
    if name not in COMMANDS:
        return f"no command '{name}'"
    command: click.Command = importlib.import_module(f"autoquant.cli.{name.replace('-', '_')}").command
    shown = [p for p in command.params if not getattr(p, "hidden", False)]  # an old name is for one release only
    known = {o for p in shown for o in (*p.opts, *p.secondary_opts)} | {"-h", "--help"}
    return next((f"{name} has no option '{option}'" for option in options if option not in known), None)


@pytest.fixture(scope="module")
def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_exists(page: Path, targets: set[str]) -> None:
    found = {line: problem(line, targets) for line in commands(page.read_text(encoding="utf-8"))}
    assert {line: why for line, why in found.items() if why is not None} == {}


def test_readme_has_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in GROUPS["Everyday"] if f"`autoquant {name}" not in readme] == []
    lines = list(commands(readme))
    assert {"make demo", "make test"} <= set(lines)
    assert len([line for line in lines if line.startswith("autoquant")]) > 10


def test_the_page_of_commands_has_all() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"`autoquant {name}" not in page] == []


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("autoquant analize llama", "no command 'analize'"),
        ("autoquant analyze llama --alhpa 0.5 -o x.json", "analyze has no option '--alhpa'"),
        ("autoquant analyze llama --fromat=json", "analyze has no option '--fromat'"),
        ("make tset", "no target 'tset'"),
        ("python benchmarks/nothing.py", "no script 'benchmarks/nothing.py'"),
        ("python benchmarks/fuzz.py --programms 3", "benchmarks/fuzz.py has no '--programms'"),
    ],
)
def test_that_a_mistake_would_be_seen(line: str, why: str, targets: set[str]) -> None:
    assert problem(line, targets) == why
    assert list(commands(f"```\n$ {line}\n```\n")) == [line]


@pytest.mark.parametrize("link", sorted({(p, t) for p in PAGES for t in re.findall(r"\]\(([^)#\s]+)", p.read_text())}))
def test_links_between_pages_lead_somewhere(link: tuple[Path, str]) -> None:
    page, target = link
    assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
