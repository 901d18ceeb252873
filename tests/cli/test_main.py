from __future__ import annotations

import importlib
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest
from click.testing import CliRunner
from syrupy.assertion import SnapshotAssertion

from autoquant.cli import main as cli
from autoquant.config.file import save_config
from autoquant.config.format import SCHEMA_NAME
from autoquant.config.jsonschema import schema_text
from autoquant.errors import AutoQuantError
from autoquant.version import __version__

if TYPE_CHECKING:
    from autoquant.config.format import Config

HEAVY = ("torch", "transformers", "numpy", "pydantic", "jsonschema")
HELP = "from autoquant.cli.main import main; main(['--help'], standalone_mode=False)"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "autoquant", *arguments], capture_output=True, text=True, check=False)


def heavy_imports(code: str) -> list[str]:
    """Which heavy modules are loaded when ``code`` has run."""
    code += f"\nimport sys; sys.stderr.write(' '.join(name for name in {HEAVY} if name in sys.modules))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.split()


def test_help_imports_nothing_heavy() -> None:
    assert heavy_imports(HELP) == []


def test_that_a_heavy_import_would_be_seen() -> None:
    assert heavy_imports(f"import numpy\n{HELP}") == ["numpy"]
    assert heavy_imports(f"{HELP}\nimport autoquant.config.format") == ["pydantic"]


def seconds(*command: str, runs: int) -> float:
    """The best of some runs, so that a busy machine does not decide."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    return min(times)


def test_help_answers_within_a_second_and_a_half() -> None:
    assert seconds("-m", "autoquant", "--help", runs=3) < 1.5


def test_that_a_slow_help_would_be_seen() -> None:
    assert seconds("-c", f"import time; time.sleep(1.5)\n{HELP}", runs=1) >= 1.5


@pytest.mark.parametrize("name", ["", *cli.COMMANDS])
def test_the_options_are_frozen(name: str, snapshot: SnapshotAssertion) -> None:
    """A new or changed option shows here: update with --snapshot-update, and the changelog with it."""
    if name:  # click keeps the help option of its first use, which another test may have made without the group
        importlib.import_module(f"autoquant.cli.{name.replace('-', '_')}").command._help_option = None
    result = CliRunner().invoke(cli.main, [name, "--help"] if name else ["--help"], prog_name="autoquant")
    assert result.exit_code == 0
    assert "\\b" not in result.output, "click's mark of a block as it is was not read"
    assert result.output == snapshot


def test_every_command_has_its_module_and_is_listed() -> None:
    modules = {path.stem for path in Path(cli.__file__).parent.glob("*.py")} - {
        "__init__",
        "main",
        "options",
        "output",
        "progress",
    }
    assert modules == {name.replace("-", "_") for name in cli.COMMANDS}


def test_version() -> None:
    assert run("--version").stdout == f"autoquant, version {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chekc"], "Error: no command 'chekc'; did you mean 'check'?"),
        (["schema", "--forse"], "Error: No such option '--forse'."),
        (["check"], "Error: Missing argument 'CONFIG'."),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def invoke_raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> click.testing.Result:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda *_: click.Command("check", callback=fail))
    return CliRunner().invoke(cli.main, ["check"])


def test_an_error_is_one_line_and_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke_raising(monkeypatch, AutoQuantError("a.json: two problems", ("a.json:1:1: one", "a.json:2:1: two")))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "a.json:1:1: one\na.json:2:1: two\nerror: a.json: two problems\n"


def test_an_interruption_is_one_line_and_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke_raising(monkeypatch, KeyboardInterrupt())
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "error: interrupted\n")


def test_a_bug_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(invoke_raising(monkeypatch, ZeroDivisionError()).exception, ZeroDivisionError)


def test_schema_prints_and_writes(tmp_path: Path) -> None:
    assert CliRunner().invoke(cli.main, ["schema"]).output == schema_text()
    arguments = ["schema", "-o", str(tmp_path)]
    assert CliRunner().invoke(cli.main, arguments).output == f"wrote {tmp_path / SCHEMA_NAME}\n"
    assert (tmp_path / SCHEMA_NAME).read_text(encoding="utf-8") == schema_text()
    again = CliRunner().invoke(cli.main, arguments)
    assert (again.exit_code, again.stdout) == (1, "")
    assert "exists already; give --force to replace it" in again.stderr
    assert CliRunner().invoke(cli.main, [*arguments, "--force"]).exit_code == 0


def test_check(example_config: Config, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    save_config(example_config, path)
    good = run("check", str(path))
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout == f"{path}: valid; 2 smoothing groups, 1 rotation spaces, 3 linears, 1 blocked; not proved\n"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"alpha": 0.5', '"alhpa": 0.5').replace('"head"', '"haed"', 1), encoding="utf-8")
    bad = run("check", str(path))
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr == f"error: {path}:6:5: $.smoothing.alhpa: unknown key; did you mean 'alpha'?\n"
