"""The command blocks of pages that have no test of their own: each line runs, in order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from autoquant.cli.main import main

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def lines_of(page: str) -> list[str]:
    """The lines of a page's blocks that are commands of ours."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [line for block in BLOCK.findall(text) for line in block.splitlines() if line.startswith("autoquant ")]


def run(line: str, *more: str) -> None:
    result = CliRunner().invoke(main, [*shlex.split(line)[1:], *more])
    assert result.exit_code == 0, (line, result.output)


@pytest.mark.slow
def test_the_page_of_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Export, import, audit."""
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("generated_configs").symlink_to(ROOT / "generated_configs")
    lines = lines_of("docs/recipes.md")
    assert [line.split()[1] for line in lines] == ["export", "import", "audit"]
    for line in lines:
        run(line)
    assert Path("out/imported.json").exists()


@pytest.mark.slow
def test_the_first_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = ROOT / "autoquant" / "data"
    Path("my-model").symlink_to(data / "wikinano1m")
    Path("text.txt").write_bytes((data / "sample.evaluation.txt").read_bytes())
    lines = lines_of("docs/index.md")
    assert [line.split()[1] for line in lines] == ["analyze", "quantize", "eval", "report"]
    for line in lines:
        run(line, *(["--length", "100"] if " eval " in line else []))
    assert Path("my.html").stat().st_size > 100_000


@pytest.mark.slow
def test_the_python_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(compile(block.replace("out/", f"{tmp_path}/"), "README.md", "exec"), {})
    assert (tmp_path / "int8" / "config.json").exists()
