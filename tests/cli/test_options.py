"""Old names of options: each is taken for one more release, says so, and does what the new one does."""

from __future__ import annotations

import importlib
from typing import Any

import click
import pytest
from click.testing import CliRunner

from autoquant import api
from autoquant.cli.main import COMMANDS, main
from autoquant.errors import AutoQuantError
from autoquant.survey import survey

TEXTS = ["--data", "d", "--calibration", "c"]
REQUIRED = {
    "analyze": ["m"],
    "apply": ["m", "c", "-o", "no-such/o"],
    "check": ["c", "--model", "m"],
    "compare": ["m", "-o", "no-such/o", *TEXTS],
    "eval": ["m", "--data", "d"],
    "quantize": ["m", "c", "-o", "no-such/o"],
    "search": ["m", "c", "-o", "o.json", "--calibration", "c"],
    "survey": [],
    "verify": ["m", "c"],
}
FUNCTIONS = {"eval": "evaluate"}
RENAMED = [
    ("analyze", ["--kind", "causal-lm"], "--task", {"task": "causal-lm"}),
    ("check", ["--kind", "seq2seq-lm"], "--task", {"task": "seq2seq-lm"}),
    ("verify", ["--kind", "causal-lm"], "--task", {"task": "causal-lm"}),
    ("survey", ["--kinds", "causal-lm,seq2seq-lm"], "--task", {"task": ["causal-lm", "seq2seq-lm"]}),
    ("compare", ["--preopt", "none,rotation"], "--transforms", {"transforms": "none,rotation"}),
    ("compare", ["--window", "7"], "--length", {"length": 7}),
    ("eval", ["--window", "7"], "--length", {"length": 7}),
    ("search", ["--means", "alpha,clip"], "--knobs", {"knobs": "alpha,clip"}),
    *(
        (command, options, "--transforms", {"transforms": expression})
        for command in ("apply", "quantize")
        for options, expression in [
            (["--rotate"], "smooth+fc_fc+rotation"),
            (["--no-rotate"], "smooth+fc_fc"),
            (["--smooth", "fc_fc"], "fc_fc+rotation"),
            (["--smooth", "none", "--no-rotate"], "none"),
            (["--alpha", "0.75", "--no-rotate"], "smooth:0.75+fc_fc:0.75"),
        ]
    ),
]


def taken(command: str, options: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], str]:
    """What a command hands on, and what it printed."""
    seen: dict[str, Any] = {}

    def stop(*args: Any, **kwargs: Any) -> None:
        seen.update({name: value for name, value in kwargs.items() if name not in ("progress", "tell")})
        raise AutoQuantError("stop")

    def chosen(names: Any, task: Any, types: Any) -> None:
        stop(task=task)

    if command == "survey":
        monkeypatch.setattr(survey, "registered", list)
        monkeypatch.setattr(survey, "chosen_names", chosen)
    else:
        monkeypatch.setattr(api, FUNCTIONS.get(command, command), stop)
    result = CliRunner().invoke(main, [command, *REQUIRED[command], *options])
    assert result.exit_code == 1 and result.output.splitlines()[-1] == "error: stop", result.output
    return seen, result.output


@pytest.mark.parametrize(("command", "options", "new", "wanted"), RENAMED, ids=lambda value: str(value)[:30])
def test_the_old_name_of_an_option_does_what_the_new_one_does(
    command: str, options: list[str], new: str, wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, output = taken(command, options, monkeypatch)
    assert seen.items() >= wanted.items()
    (warning,) = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert new in warning and warning.endswith(("the old name goes with the next release", "they go next release"))
    ((_, value),) = wanted.items()
    again, quiet = taken(command, [new, ",".join(value) if isinstance(value, list) else str(value)], monkeypatch)
    assert again == seen and "warning: " not in quiet


def test_every_hidden_option_is_tried_above() -> None:
    hidden = {
        (command, option.opts[0])
        for command in COMMANDS
        for option in importlib.import_module(f"autoquant.cli.{command.replace('-', '_')}").command.params
        if isinstance(option, click.Option) and option.hidden
    }
    tried = {(command, name) for command, names, _, _ in RENAMED for name in names if name.startswith("--")}
    assert hidden == {(command, name) for command, name in tried if name != "--no-rotate"}  # --rotate's other half
