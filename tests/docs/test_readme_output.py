"""README shows what is printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from autoquant.cli.main import main

README = Path(__file__).parents[2] / "README.md"
SHOWN = re.compile(r"^\$ (autoquant [^\n]+)\n(.*?)(?=^\$ |^```)", re.MULTILINE | re.DOTALL)


def test_readme_shows_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shown output is printed in this order, lines left out where '…' stands; a line that ends in it is cut."""
    monkeypatch.chdir(tmp_path)
    shown = SHOWN.findall(README.read_text(encoding="utf-8"))
    assert shown
    for line, output in shown:
        result = CliRunner(env={"COLUMNS": "140"}).invoke(main, shlex.split(line)[1:])
        assert result.exit_code == 0, result.output
        printed = iter(result.output.splitlines())
        for expected in filter(None, map(str.strip, output.splitlines())):
            if expected != "…":
                assert any(squeezed(p).startswith(squeezed(expected.removesuffix("…"))) for p in printed), expected


def squeezed(line: str) -> str:
    return re.sub(r"[ ─]+", " ", line).strip()


@pytest.mark.slow
def test_the_first_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(README.parent)
    block = re.search(r"^```\npip install \.\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert block is not None
    lines = block[1].replace("out/", f"{tmp_path}/").splitlines()
    assert len(lines) == 2
    for line in lines:
        result = CliRunner().invoke(main, shlex.split(line)[1:])
        assert result.exit_code == 0, result.output
    assert "perplexity" in result.output and f"{tmp_path}/int8" in result.output
