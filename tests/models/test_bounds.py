"""`check --model` ends soon and small on any file: each case in a process of its own, time and memory measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autoquant.config.file import config_text
from autoquant.config.format import Config
from tests.config.test_bounds import many_layers

RUN = """
import sys, time
from pathlib import Path
from autoquant.config.file import load_config
from autoquant.errors import AutoQuantError
from autoquant.executor.resolve import problems
from autoquant.models.fit import problems_error
sys.path.insert(0, sys.argv[2])
from test_fit import structure
def peak():  # ru_maxrss would be the parent's, if that is larger
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
model, path = structure(), Path(sys.argv[1])
before, started = peak(), time.process_time()
lines = ["nothing is wrong"]
try:
    found = problems(load_config(path), model)
    if found:
        raise problems_error(path, "made-up", found)
except AutoQuantError as error:
    lines = [error.message, *error.details]
spent = time.process_time() - started
print(spent, (peak() - before) / 1024, len(lines), *lines[:9], sep=chr(10))
"""
SECONDS, MEBIBYTES = 2.0, 300.0


def many_linears(content: dict[str, Any]) -> None:
    """10,000 that the model does not have, which is 20,000 problems."""
    linear = content["model"]["linears"][-1]
    content["model"]["linears"] += [{**linear, "path": f"haed{i}", "weight": f"haed{i}.weight"} for i in range(10_000)]


def many_blocked(content: dict[str, Any]) -> None:
    blocked = content["blocked"][0]
    content["blocked"] = [{**blocked, "path": f"net.{{layer}}.uot{i}"} for i in range(20_000)]


def many_groups(content: dict[str, Any]) -> None:
    group = content["claims"]["groups"][1]
    content["claims"]["groups"] = [{**group, "name": f"group {i}"} for i in range(2_000)]
    content["smoothing"]["groups"] = []


def wide_slots(content: dict[str, Any]) -> None:
    """As many positions as a file's slots may have together, of parameters that are narrower."""
    group = content["claims"]["groups"][0]
    group["channels"] = 4_000_000
    block = {"shape": [4_000_000], "stride": [1], "channel_stride": [1]}
    group["sources"][0].update(size=4_000_000)
    group["targets"] = [{**group["targets"][0], "size": 4_000_000, "index": [block]}]


def huge_size(content: dict[str, Any]) -> None:
    group = content["claims"]["groups"][0]
    group["channels"] = 3_000_000_000
    for slot in (*group["sources"], *group["targets"]):
        slot["size"] = 3_000_000_000


CASES: dict[Callable[[dict[str, Any]], None], str] = {
    many_layers: "of them shown",
    many_linears: ", 100 of them shown",
    many_blocked: ", 100 of them shown",
    many_groups: "",
    wide_slots: "the config says 4000000 positions (size)",
    huge_size: "the config says 3000000000 positions (size)",
}


@pytest.mark.parametrize("change", CASES, ids=lambda change: change.__name__)
def test_check_against_a_model_is_bounded(
    change: Callable[[dict[str, Any]], None], example_config: Config, tmp_path: Path
) -> None:
    content = json.loads(config_text(example_config))
    change(content)
    path = tmp_path / "c.json"
    path.write_text(json.dumps(content))
    arguments = [sys.executable, "-c", RUN, str(path), str(Path(__file__).parent)]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    seconds, mebibytes, count, *lines = result.stdout.splitlines()
    print(change.__name__, seconds, mebibytes, count)
    assert float(seconds) < SECONDS, seconds
    assert float(mebibytes) < MEBIBYTES, mebibytes
    assert int(count) <= 101
    assert CASES[change] in result.stdout, lines
