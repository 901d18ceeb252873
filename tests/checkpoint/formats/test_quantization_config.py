from __future__ import annotations

import copy
from typing import Any

import pytest

from autoquant.checkpoint.formats.quantization_config import Group, group_for, groups_in, section_of
from autoquant.quantizer.strategies import Granularity

TOKEN = Group(True, Granularity.TOKEN_DYNAMIC, ("layers.0.down", r"re:layers\.1\.experts\.\d+\.up$"))
STATIC = Group(False, Granularity.TENSOR_STATIC, ("layers.0.up",))
DYNAMIC = Group(True, Granularity.TENSOR_DYNAMIC, ("layers.0.gate",))


def test_sections_come_back() -> None:
    section = section_of((TOKEN, STATIC, DYNAMIC), ("lm_head",))
    assert groups_in(section) == (TOKEN, STATIC, DYNAMIC)
    assert section["ignore"] == ["lm_head"] and section["kv_cache_scheme"] is None
    inputs = [section["config_groups"][f"group_{at}"]["input_activations"] for at in range(3)]
    assert [(i["strategy"], i["dynamic"]) for i in inputs] == [("token", True), ("tensor", False), ("tensor", True)]


def test_one_group_is_for_every_linear() -> None:
    (group,) = groups_in(section_of((STATIC,), ())) or ()
    assert group == Group(False, Granularity.TENSOR_STATIC, ("Linear",))


def test_a_name_goes_before_an_expression_and_that_before_all() -> None:
    every = Group(True, Granularity.TENSOR_STATIC, ("Linear",))
    groups = (every, TOKEN, STATIC)
    assert group_for(groups, ["layers.0.up"]) is STATIC
    assert group_for(groups, ["stacked", "layers.1.experts.12.up"]) is TOKEN
    assert group_for(groups, ["layers.1.experts.12.up_other"]) is every
    assert group_for((TOKEN, STATIC), ["layers.7.up"]) is None


def change(*path: str, to: Any) -> Any:
    section: Any = copy.deepcopy(section_of((TOKEN,), ()))
    at = section
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = to
    return section


GROUP = ("config_groups", "group_0")


@pytest.mark.parametrize(
    "section",
    [
        None,
        {"quant_method": "gptq"},
        change("kv_cache_scheme", to={"num_bits": 8, "type": "float"}),
        change("transform_config", to={"config_groups": {}} | {"x": 1}),
        change("config_groups", to={}),
        change(*GROUP, "format", to="pack-quantized"),
        change(*GROUP, "weights", to=None),
        change(*GROUP, "weights", "num_bits", to=4),
        change(*GROUP, "weights", "symmetric", to=False),
        change(*GROUP, "weights", "strategy", to="group"),
        change(*GROUP, "input_activations", to=None),
        change(*GROUP, "input_activations", "type", to="float"),
        change(*GROUP, "input_activations", "strategy", to="block"),
        change(*GROUP, "targets", to="Linear"),
        change(*GROUP, "output_activations", to={"num_bits": 8}),
    ],
)
def test_all_else_is_left_to_transformers(section: Any) -> None:
    assert groups_in(section) is None
