"""Two processes write what one writes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from quantized import PACKAGED, STATIC_KV, config_of, windows
from torch import Tensor

from autoquant.calibration.observers import CachedStates, LinearInputs
from autoquant.calibration.processes import ALONE, Processes
from autoquant.checkpoint.formats.native import TENSORS
from autoquant.checkpoint.quantize import Recipe, quantize_checkpoint
from autoquant.config.file import save_config
from autoquant.config.format import Strategy
from autoquant.errors import AutoQuantError
from autoquant.pipeline.select import Transforms

RUN = """
import sys
from pathlib import Path
import torch
from autoquant.checkpoint.quantize import Recipe, quantize_checkpoint
from autoquant.config.file import load_config
from autoquant.config.format import Strategy
from autoquant.pipeline.select import Transforms
source, target, config, batches, strategy = sys.argv[1:]
recipe = Recipe(load_config(Path(config)), Strategy(strategy), Transforms.parse("fc_fc+rotation"), torch.load(batches))
quantize_checkpoint(Path(source), Path(target), recipe, {})
"""


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    batches = windows(3)
    made = Recipe(config_of(PACKAGED), Strategy(STATIC_KV), Transforms.parse("fc_fc+rotation"), batches)
    quantize_checkpoint(PACKAGED, tmp_path / "one", made, {})
    save_config(made.config, tmp_path / "config.json")
    torch.save(batches, tmp_path / "batches")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    arguments = [PACKAGED, tmp_path / "two", tmp_path / "config.json", tmp_path / "batches", STATIC_KV]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, *map(str, arguments)],
            env={**os.environ, **common, "RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    said = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert (tmp_path / "two" / TENSORS).read_bytes() == (tmp_path / "one" / TENSORS).read_bytes()


class Other(Processes):
    """Two processes, the other of which saw something else."""

    def largest(self, maxima: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {name: torch.maximum(maximum, torch.full_like(maximum, 2.0)) for name, maximum in maxima.items()}
        return {**found, "of the other alone": torch.ones(1)} if "a.weight" in maxima else found


def test_each_merge_takes_over_what_others_saw() -> None:
    inputs, stored = LinearInputs(["a.weight", "b.weight"]), CachedStates()
    inputs.maxima |= {"a.weight": torch.tensor([1.0, 3.0]), "b.weight": torch.tensor([1.0])}
    stored.maxima["key"] = {4: torch.tensor([[1.0]])}
    inputs.merge(ALONE, "a.")
    assert not inputs.merged
    inputs.merge(Other(0, 2), "a.")
    assert inputs.maxima["a.weight"].tolist() == [2.0, 3.0] and inputs.maxima["b.weight"].tolist() == [1.0]
    assert "of the other alone" in inputs.maxima
    inputs.merge(Other(0, 2), "")
    assert inputs.maxima["b.weight"].tolist() == [2.0]
    stored.merge(Other(0, 2), "")
    assert stored.maxima["key"][4].tolist() == [[2.0]]


def test_shares_are_of_whole_batches_and_none_is_empty() -> None:
    batches = [torch.full((1, 1), i) for i in range(5)]
    shares = [Processes(rank, 2).share(batches) for rank in (0, 1)]
    assert [[int(batch) for batch in share] for share in shares] == [[0, 2, 4], [1, 3]]
    with pytest.raises(AutoQuantError, match="3 processes for 2 batches of windows: start fewer"):
        Processes(0, 3).share(batches[:2])
