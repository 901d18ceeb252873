"""`check` ends soon and small on any file: each case in a process of its own, time and memory measured."""

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

RUN = """
import sys, time
from pathlib import Path
import autoquant.config.file as file
from autoquant.errors import AutoQuantError
def peak():  # ru_maxrss would be the parent's, if that is larger
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
before, started = peak(), time.process_time()
try:
    file.load_config(Path(sys.argv[1]))
    lines = []
except AutoQuantError as error:
    lines = [error.message, *error.details]
spent = time.process_time() - started
more = peak() - before
print(spent, more / 1024, len(lines), *lines[:2], sep=chr(10))
"""
SECONDS, MEBIBYTES = 2.0, 300.0


def override_layers(content: dict[str, Any]) -> None:
    content["smoothing"]["groups"][0]["overrides"][0]["layers"] = "0-999999"


def long_override(content: dict[str, Any]) -> None:
    content["smoothing"]["groups"][0]["overrides"][0]["layers"] = "0-99999"


def consistent_size(content: dict[str, Any]) -> None:
    group = content["claims"]["groups"][0]
    group["channels"] = 3_000_000_000
    for slot in (*group["sources"], *group["targets"]):
        slot["size"] = 3_000_000_000


def consistent_blocks(content: dict[str, Any]) -> None:
    consistent_size(content)
    block = {"shape": [3_000_000_000], "stride": [1], "channel_stride": [1]}
    content["claims"]["groups"][0]["targets"][0]["index"] = [block]


def copies_of_a_slot(content: dict[str, Any]) -> None:
    group = content["claims"]["groups"][0]
    group["channels"] = 4_000_000
    block = {"shape": [4_000_000], "stride": [1], "channel_stride": [1]}
    group["targets"] = [{**group["targets"][0], "size": 4_000_000, "index": [block]}] * 300


def wide_slots(content: dict[str, Any]) -> None:
    """300 slots of 300 parameters, each with as many positions as one may have."""
    copies_of_a_slot(content)
    group = content["claims"]["groups"][0]
    group["targets"] = [{**slot, "path": f"net.{{layer}}.w{i}"} for i, slot in enumerate(group["targets"])]


def many_layers(content: dict[str, Any]) -> None:
    """200 linears over 100,000 layers of a model that has 4."""
    model = content["model"]
    model["layers"] = 100_000
    linear = model["linears"][0]
    model["linears"] += [
        {**linear, "path": f"net.{{layer}}.p{i}", "weight": f"net.{{layer}}.p{i}.w", "layers": "0-99999"}
        for i in range(200)
    ]


def many_problems(content: dict[str, Any]) -> None:
    """20,000 values that the classes take and that do not fit together."""
    content["quantization"]["exclude"] = [f"net.{{layer}}.qvk{i}" for i in range(20_000)]


def many_keys(content: dict[str, Any]) -> None:
    """20,000 keys that the format does not have."""
    content["model"].update({f"layer_{i}": i for i in range(20_000)})


CASES: dict[Callable[[dict[str, Any]], None], str] = {
    override_layers: "out of range, at most 99999",
    long_override: "layer 99999 does not exist; the model's layers are 0 to 3",
    consistent_size: "",
    consistent_blocks: "more than 4194304 positions",
    copies_of_a_slot: "",
    wide_slots: "",
    many_layers: "",
    many_problems: "20000 problems, the first 20 are shown",
    many_keys: "20000 problems, the first 20 are shown",
}


@pytest.mark.parametrize("change", CASES, ids=lambda change: change.__name__)
def test_check_is_bounded(change: Callable[[dict[str, Any]], None], example_config: Config, tmp_path: Path) -> None:
    content = json.loads(config_text(example_config))
    change(content)
    path = tmp_path / "c.json"
    path.write_text(json.dumps(content))
    result = subprocess.run([sys.executable, "-c", RUN, path], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    seconds, mebibytes, count, *lines = result.stdout.splitlines()
    print(change.__name__, seconds, mebibytes, count)
    assert float(seconds) < SECONDS, seconds
    assert float(mebibytes) < MEBIBYTES, mebibytes
    assert int(count) <= 21
    assert CASES[change] in "".join(lines), lines
