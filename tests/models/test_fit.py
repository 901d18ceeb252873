from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from autoquant.config.check import problems as check_problems
from autoquant.config.file import save_config
from autoquant.config.format import IndexMap, edited
from autoquant.config.places import json_path
from autoquant.models.structure import fingerprint

if TYPE_CHECKING:
    from autoquant.config.format import Config
    from autoquant.models.structure import ModelStructure

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


def structure(changes: dict[str, Any] | None = None, tied: tuple[tuple[str, ...], ...] = TIED) -> ModelStructure:
    import torch

    from autoquant.models.structure import ModelStructure

    shapes = {name: shape for name, shape in {**SHAPES, **(changes or {})}.items() if shape is not None}
    modules = {name.rpartition(".")[0] for name in shapes}
    canonical = {name: next((tie[0] for tie in tied if name in tie), name) for name in shapes}
    return ModelStructure(shapes, dict.fromkeys(shapes, torch.float32), canonical, frozenset(modules))


def messages(config: Config, model: ModelStructure) -> list[str]:
    from autoquant.models.fit import structure_problems

    return [f"{json_path(problem.path)}: {problem.message}" for problem in structure_problems(config, model)]


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
        f"$.claims.groups[0].sources[0].path: {near}",
        f"$.claims.spaces[0].reads[0].norm.weight: {near}",
    ]


def test_a_parameter_missing_in_some_layers(config: Config) -> None:
    found = messages(config, structure({"net.2.qkv.bias": None}))
    assert "$.model.linears[0].bias: the model has no parameter 'net.{layer}.qkv.bias' (layers 2)" in found


def test_wrong_shapes(config: Config) -> None:
    found = messages(config, structure({"net.3.qkv.weight": (12, 9), "net.1.norm.weight": (7,)}))
    shape = "'net.{layer}.qkv.weight' (layers 3) is [12, 9] in the model"
    assert f"$.model.linears[0]: {shape}; the config says 8 (in_features) in dimension 1" in found
    assert f"$.claims.groups[0].targets[0]: {shape}; the config says 8 positions (size) along dimension 1" in found
    norm = "'net.{layer}.norm.weight' (layers 1) is [7] in the model"
    assert f"$.claims.spaces[0].reads[0].norm.weight: {norm}; the config says 8 elements" in found


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
    from autoquant.models.fit import axis_problem

    slot = edited(config.smoothing.groups[0].targets[0], dim=2, stack=4, size=32)
    assert axis_problem(slot, (4, 6, 8)) is None
    assert axis_problem(slot, (5, 6, 8)) == "the config says 4 matrices stacked along dimension 0 (stack)"
    assert axis_problem(slot, (4, 6, 9)) == "the config says 32 positions (size) along dimension 2, 4 matrices together"
    assert axis_problem(slot, (4, 6)) == "it has no dimension 2 (dim)"
    assert axis_problem(slot, (4, 6, 8, 5)) is None  # a tensor of four dimensions, for each entry of the first
    assert axis_problem(edited(slot, dim=1, size=16), (8, 4)) is None  # the matrices share dimension 0


def test_every_problem_has_its_line(config: Config, tmp_path: Path) -> None:
    from autoquant.models.fit import problems_error, structure_problems

    path = tmp_path / "c.json"
    save_config(config, path)
    error = problems_error(path, "made-up", structure_problems(config, structure({"net.0.out.weight": (8, 4)})))
    assert error.message == f"{path}: does not fit made-up: {len(error.details)} problems"
    assert error.details[0].startswith(f"{path}:50:20: $.provenance.fingerprint: ")
    lines = [int(detail.removeprefix(f"{path}:").partition(":")[0]) for detail in error.details]
    assert lines == sorted(lines)


def test_a_space_of_two_blocks_fits(config: Config) -> None:
    """R1 of 2 blocks: its norm has a gain for each block, or one for all channels."""
    space = config.rotation.spaces[0]
    index = tuple(
        IndexMap(start=4 * block, shape=(4,), stride=(1,), channel_start=4 * block, channel_stride=(1,))
        for block in range(2)
    )
    writers = (space.writers[0], edited(space.writers[1], index=index))
    blocks = edited(space, size=4, blocks=2, writers=writers)
    two = edited(config, rotation=edited(config.rotation, spaces=(blocks,)))
    assert messages(two, structure()) == []
    assert check_problems(two) == []


def test_positions_are_checked_by_whatever_looks_at_a_model(config: Config) -> None:
    group = config.smoothing.groups[1]
    index = (IndexMap(start=9, shape=(4,), stride=(1,), channel_stride=(1,)),)
    changed = edited(group, sources=(edited(group.sources[0], index=index), *group.sources[1:]))
    wrong = edited(config, smoothing=edited(config.smoothing, groups=(config.smoothing.groups[0], changed)))
    expected = "$.claims.groups[1].sources[0].index[0]: position 12 is out of range; expected 0 to 11"
    assert messages(wrong, structure()) == [expected]


def test_a_size_that_no_parameter_has_is_not_expanded(config: Config) -> None:
    group = config.smoothing.groups[0]
    targets = (edited(group.targets[0], size=3_000_000_000),)
    changed = edited(group, targets=targets, channels=3_000_000_000)
    wrong = edited(config, smoothing=edited(config.smoothing, groups=(changed, config.smoothing.groups[1])))
    assert any("the config says 3000000000 positions (size)" in message for message in messages(wrong, structure()))


def test_the_longest_stack_may_hold_no_linear(config: Config) -> None:
    """Seven convolutions before an encoder of four layers: the config says seven."""
    model = structure({"convs.6.weight": (3,)})
    assert {config.model.layers, 7} <= model.stack_lengths

    def said(layers: int) -> list[str]:
        found = messages(edited(config, model=edited(config.model, layers=layers)), model)
        return [message for message in found if message.startswith("$.model.layers")]

    assert said(config.model.layers) == said(7) == []
    assert said(9) == ["$.model.layers: the model has 4 layers, not 9"]
