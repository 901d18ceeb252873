from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from autoquant.config.check import json_path
from autoquant.config.file import save_config
from autoquant.config.format import edited
from autoquant.models.structure import fingerprint

if TYPE_CHECKING:
    from autoquant.config.format import Config
    from autoquant.executor.fit import Structure

SHAPES = {
    "table.weight": (32, 8),
    "head.weight": (32, 8),
    **{f"net.{i}.qkv.weight": (12, 8) for i in range(4)},
    **{f"net.{i}.qkv.bias": (12,) for i in range(4)},
    **{f"net.{i}.out.weight": (8, 8) for i in range(4)},
    **{f"net.{i}.norm.weight": (8,) for i in range(4)},
}
TIED = (("table.weight", "head.weight"),)
PARAMETERS = 32 * 8 + 4 * (12 * 8 + 12 + 8 * 8 + 8)


def structure(changes: dict[str, Any] | None = None, tied: tuple[tuple[str, ...], ...] = TIED) -> Structure:
    from autoquant.executor.fit import Structure

    shapes = {name: shape for name, shape in {**SHAPES, **(changes or {})}.items() if shape is not None}
    modules = {name.rpartition(".")[0] for name in shapes}
    return Structure(shapes, tied, frozenset(modules))


def messages(config: Config, model: Structure) -> list[str]:
    from autoquant.executor.fit import model_problems

    return [f"{json_path(problem.path)}: {problem.message}" for problem in model_problems(config, model)]


@pytest.fixture
def config(example_config: Config) -> Config:
    """The example with the facts of the model above."""
    provenance = edited(example_config.provenance, fingerprint=fingerprint(SHAPES, TIED))
    facts = edited(example_config.model, parameters=PARAMETERS)
    return edited(example_config, provenance=provenance, model=facts)


def test_what_fits_has_no_problems(config: Config) -> None:
    assert messages(config, structure()) == []


def test_a_missing_parameter_is_named_with_the_nearest(config: Config) -> None:
    found = messages(
        config,
        structure({f"net.{i}.norm.weight": None for i in range(4)} | {f"net.{i}.nrom.weight": (8,) for i in range(4)}),
    )
    assert found[0].startswith("$.provenance.fingerprint: the model's is sha256:")
    near = "the model has no parameter 'net.{layer}.norm.weight'; did you mean 'net.{layer}.nrom.weight'?"
    assert found[1:] == [
        f"$.smoothing.groups[0].sources[0].path: {near}",
        f"$.rotation.spaces[0].reads[0].norm.weight: {near}",
    ]


def test_a_parameter_missing_in_some_layers(config: Config) -> None:
    found = messages(config, structure({"net.2.qkv.bias": None}))
    assert "$.model.linears[0].bias: the model has no parameter 'net.{layer}.qkv.bias' (layers 2)" in found


def test_wrong_shapes(config: Config) -> None:
    found = messages(config, structure({"net.3.qkv.weight": (12, 9), "net.1.norm.weight": (7,)}))
    shape = "'net.{layer}.qkv.weight' (layers 3) is [12, 9] in the model"
    assert f"$.model.linears[0]: {shape}; the config says 8 (in_features) in dimension 1" in found
    assert f"$.smoothing.groups[0].targets[0]: {shape}; the config says 8 positions (size) along dimension 1" in found
    norm = "'net.{layer}.norm.weight' (layers 1) is [7] in the model"
    assert f"$.rotation.spaces[0].reads[0].norm.weight: {norm}; the config says 8 elements" in found


def test_another_depth_is_one_problem_and_not_one_for_each_path(config: Config) -> None:
    fewer = {name: None for name in SHAPES if name.startswith(("net.2.", "net.3."))}
    found = messages(config, structure(fewer))
    assert [message.partition(":")[0] for message in found] == [
        "$.provenance.fingerprint",
        "$.model.layers",
        "$.model.parameters",
    ]
    assert found[1] == "$.model.layers: the model has 2 layers, not 4"


def test_ties(config: Config) -> None:
    assert "$.model.tied[0]: the model does not tie table.weight and head.weight" in messages(
        config, structure(tied=())
    )
    untied = edited(config, model=edited(config.model, tied=()))
    assert messages(untied, structure()) == [
        "$.model.tied: the model ties head.weight and table.weight, which is not listed"
    ]


def test_stacked_matrices(config: Config) -> None:
    from autoquant.executor.fit import _axis

    slot = edited(config.smoothing.groups[0].targets[0], dim=2, stack=4, size=32)
    assert _axis(slot, (4, 6, 8)) is None
    assert _axis(slot, (5, 6, 8)) == "the config says 4 stacked matrices (stack)"
    assert _axis(slot, (4, 6, 9)) == "the config says 32 positions (size) along dimension 2, 4 matrices together"
    assert _axis(slot, (4, 6)) == "it has no dimension 2 (dim)"
    assert _axis(slot, (4, 6, 8, 5)) is None  # a tensor of four dimensions, for each entry of the first


def test_every_problem_has_its_line(config: Config, tmp_path: Path) -> None:
    from autoquant.executor.fit import model_problems, problems_error

    path = tmp_path / "c.json"
    save_config(config, path)
    error = problems_error(path, "made-up", model_problems(config, structure({"net.0.out.weight": (8, 4)})))
    assert error.message == f"{path}: does not fit made-up: {len(error.details)} problems"
    assert error.details[0].startswith(f"{path}:10:20: $.provenance.fingerprint: ")
    lines = [int(detail.removeprefix(f"{path}:").partition(":")[0]) for detail in error.details]
    assert lines == sorted(lines)
