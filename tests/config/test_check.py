from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from autoquant.config.check import problems
from autoquant.config.places import json_path

if TYPE_CHECKING:
    from autoquant.config.format import Config

GROUPS, SPACE = ("smoothing", "groups"), ("rotation", "spaces", 0)
NORM, V_OUT = (*GROUPS, 0), (*GROUPS, 1)
V_INDEX, OUT_INDEX = (*V_OUT, "sources", 0, "index"), (*V_OUT, "targets", 0, "index")


def changed(config: Config, path: tuple[str | int, ...], value: Any) -> Config:
    """The config with the value at ``path`` replaced, or appended where the last part is '+'."""
    content: Any = config.model_dump(mode="json", by_alias=True)
    target = content
    for part in path[:-1]:
        target = target[part]
    if path[-1] == "+":
        target.append(value)
    else:
        target[path[-1]] = value
    return type(config).model_validate(content, strict=False)


def found(config: Config) -> list[str]:
    return [f"{json_path(problem.path)}: {problem.message}" for problem in problems(config)]


def test_the_example_has_no_problem(example_config: Config) -> None:
    assert found(example_config) == []


def block(**changes: Any) -> dict[str, Any]:
    return {"start": 8, "shape": [4], "stride": [1], "channel_start": 0, "channel_stride": [1], **changes}


HEADS = {"start": 0, "shape": [2, 4], "stride": [4, 1], "channel_start": 0, "channel_stride": [0, 1]}
HEAD_LINEAR = {"path": "head", "weight": "head.weight", "in_features": 8, "out_features": 32, "in_dim": 1}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        # names
        ((*V_OUT, "name"), "norm-qkv", "name: the name 'norm-qkv' is taken by $.claims.groups[0]"),
        (("model", "linears", "+"), HEAD_LINEAR, "path: 'head' is there twice, first as $.model.linears[2]"),
        (("model", "tied", 0), ["a.weight", "a.weight"], "tied[0]: expected at least two different parameter names"),
        # layers
        ((*NORM, "layers"), "0-4", "layers: layer 4 does not exist; the model's layers are 0 to 3"),
        ((*NORM, "layers"), "0-3:0", "$.claims.groups[0].layers: layer set '0-3:0': '0-3:0' has step 0"),
        (
            (*V_OUT, "layers"),
            None,
            "$.claims.groups[1]: 'net.{layer}.qkv.weight' holds {layer} and layers is missing; "
            "expected the layers that it stands for, such as '0-3'",
        ),
        (
            (*NORM, "layers"),
            "0-2",
            "$.smoothing.groups[0].overrides[0].layers: the group has no layer 3; expected some of '0-2'",
        ),
        (("model", "linears", 2, "layers"), "0", "$.model.linears[2].layers: is given, and no path holds {layer}"),
        (("blocked", 0, "layers"), None, "$.blocked[0]: 'net.{layer}.out' holds {layer} and layers is missing"),
        (("rotation", "online", 0, "layers"), "7", "$.rotation.online[0].layers: layer 7 does not exist"),
        ((*SPACE, "layers"), "0-9", "$.claims.spaces[0].layers: layer 9 does not exist"),
        ((*SPACE, "layers"), None, "writers[1]: 'net.{layer}.out.weight' holds {layer} and layers"),
        ((*SPACE, "writers", 0, "layers"), "0", "writers[0].layers: is given, and no path holds"),
        ((*SPACE, "reads", 1, "layers"), "0", "$.claims.spaces[0].reads[1].layers: is given, and no path holds"),
        # paths
        (
            ("quantization", "exclude", 0),
            "heda",
            "$.quantization.exclude[0]: 'heda' is no linear in model.linears; did you mean 'head'?",
        ),
        (
            ("quantization", "overrides", 0, "path"),
            "net.{layer}.ot",
            "overrides[0].path: 'net.{layer}.ot' is no linear in model.linears; did you mean 'net.{layer}.out'?",
        ),
        (
            ("quantization", "overrides", 0, "layers"),
            "3,5",
            "$.quantization.overrides[0].layers: layer 5 does not exist; the model's layers are 0 to 3",
        ),
        (
            ("quantization", "overrides", 0, "path"),
            "head",
            "$.quantization.overrides[0].layers: the linear has no layer 3; expected null",
        ),
        (("rotation", "online", 0, "path"), "net.{layer}.o", "$.rotation.online[0].path: 'net.{layer}.o' is no linear"),
        (
            (*SPACE, "reads", 0, "readers", 0, "path"),
            "net.{layer}.qvk.weight",
            "$.claims.spaces[0].reads[0].readers[0].path: 'net.{layer}.qvk.weight' is no weight in model.linears "
            "or in another claim; did you mean 'net.{layer}.qkv.weight'?",
        ),
        # slots
        ((*NORM, "channels"), 9, "sources[0].size: without index, expected one position for each of the 9"),
        ((*NORM, "sources", 0, "power"), 0, "$.claims.groups[0].sources[0].power: expected a power other than 0"),
        ((*NORM, "sources", 0, "stack"), 3, "sources[0].size: 8 positions are not a multiple of the 3"),
        ((*NORM, "sources", "+"), {"path": "net.{layer}.norm.weight", "size": 8}, "sources[1]: position 0 of"),
        (V_INDEX, [], "sources[0].index: expected at least one block, or null for the whole axis"),
        ((*V_INDEX, 0), block(stride=[1, 1]), "stride and channel_stride differ in length: 1, 2 and 1"),
        ((*V_INDEX, 0), block(shape=[0]), "index[0].shape: expected at least one extent, and each at least 1"),
        ((*V_INDEX, 0), block(shape=[], stride=[], channel_stride=[]), "index[0].shape: expected at least one"),
        ((*V_INDEX, 0), block(shape=[1 << 40]), "sources[0].index[0].shape: more than 4194304 positions"),
        ((*V_INDEX, 0), block(start=9), "index[0]: position 12 is out of range; expected 0 to 11"),
        ((*V_INDEX, 0), block(start=2, stride=[-1]), "index[0]: position -1 is out of range; expected 0 to 11"),
        ((*V_INDEX, 0), block(channel_start=1), "index[0]: channel 4 is out of range; expected 0 to 3"),
        ((*V_INDEX, 0), block(channel_stride=[0]), "sources[0].index: channel 1 of 4 is on no position"),
        ((*V_INDEX, 0), block(shape=[3]), "sources[0].index: channel 3 of 4 is on no position"),
        ((*OUT_INDEX, 0), {**HEADS, "stride": [2, 1]}, "targets[0].index: position 2 occurs more than once"),
        ((*OUT_INDEX, "+"), HEADS, "targets[0].index: names more positions than the 8 of the axis"),
        ((*V_OUT, "channels"), 1 << 60, "index: channel 4 of 1152921504606846976 is on no position"),
        # rotation
        ((*SPACE, "centre"), True, "$.claims.spaces[0].centre: expected false: no LayerNorm reads the space"),
        (
            (*SPACE, "reads", 0, "norm", "kind"),
            "layer",
            "$.claims.spaces[0].centre: expected true: a LayerNorm reads the space",
        ),
        ((*SPACE, "blocks"), 2, "writers[0].size: without index, expected one position for each of the 16"),
    ],
)  # fmt: skip
def test_each_check_fires(example_config: Config, path: tuple[str | int, ...], value: Any, message: str) -> None:
    messages = found(changed(example_config, path, value))
    assert any(message in item for item in messages), messages


def test_a_permuted_and_reversed_axis_is_fine(example_config: Config) -> None:
    config = changed(example_config, (*V_INDEX, 0), block(start=11, stride=[-1], channel_start=0))
    assert found(config) == []


def test_all_at_once(example_config: Config) -> None:
    config = changed(example_config, ("quantization", "exclude"), ["a", "b"])
    config = changed(config, (*NORM, "channels"), 9)
    assert len(found(config)) == 4


def test_a_linear_in_two_sets_of_layers_is_one_path(example_config: Config) -> None:
    content = example_config.model_dump(mode="json", by_alias=True)
    first = content["model"]["linears"][1]
    content["model"]["linears"].append({**first, "layers": "3", "in_features": 4})
    first["layers"] = "0-2"
    config = type(example_config).model_validate(content, strict=False)
    assert found(config) == []
    assert found(changed(config, ("model", "linears", 3, "layers"), "2-3")) == [
        "$.model.linears[3].path: 'net.{layer}.out' in layer 2 is there twice, first as $.model.linears[1]"
    ]


def test_json_path() -> None:
    assert json_path(("smoothing", "groups", 3, "$schema")) == "$.claims.groups[3]['$schema']"


def test_a_reader_may_be_one_layer_written_out(example_config: Config) -> None:
    """What all layers read has no layers of its own, and names each of them."""
    path = (*SPACE, "reads", 0, "readers", 0, "path")
    assert not [line for line in found(changed(example_config, path, "net.3.qkv.weight")) if "is no weight" in line]
    (line,) = [line for line in found(changed(example_config, path, "net.4.qkv.weight")) if "is no weight" in line]
    assert line.startswith("$.claims.spaces[0].reads[0].readers[0].path: 'net.4.qkv.weight' is no weight in")
