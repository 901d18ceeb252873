"""The commands of docs/editors.md run, in order, on a config of the repository."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from autoquant.cli.main import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "editors.md").read_text(encoding="utf-8")


def test_the_commands_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("my.json", "new.json"):
        shutil.copy(ROOT / "generated_configs" / "llama.json", name)
    lines = [line for line in PAGE.splitlines() if line.startswith("autoquant ")]
    assert len(lines) == 4
    for line in lines:
        result = CliRunner().invoke(main, shlex.split(line)[1:])
        assert result.exit_code == 0, result.output
    assert Path("merged.json").read_bytes() == Path("my.json").read_bytes()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_what_the_page_says(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"_AUTOQUANT_COMPLETE={shell}_source autoquant" in PAGE
    from click.shell_completion import get_completion_class

    made = get_completion_class(shell)
    assert made is not None
    complete = made(main, {}, "autoquant", "_AUTOQUANT_COMPLETE")
    assert "%(complete_var)s" in complete.source_template
    found = [item.value for item in complete.get_completions([], "re")]
    assert found == ["report"] and "--layer" in [item.value for item in complete.get_completions(["show"], "--")]


def test_the_schema_that_the_page_names_is_there() -> None:
    (name,) = set(re.findall(r"autoquant-config\.v\d\.schema\.json", PAGE))
    assert (ROOT / "schemas" / name).is_file()
