from __future__ import annotations

from typing import TYPE_CHECKING

from autoquant.config.format import edited
from autoquant.report.summary import because, reached, summarise

if TYPE_CHECKING:
    from autoquant.config.format import Config


def test_every_linear_says_what_reaches_it(example_config: Config) -> None:
    layers, outside = summarise(example_config).sections
    assert (layers.layers, outside.layers) == ("0-3", None)
    qkv, out = layers.rows
    assert (qkv.name, qkv.shape, qkv.smoothing, qkv.rotation) == ("qkv", "8 -> 12", ("norm norm",), ("R1 in",))
    assert (out.smoothing, out.rotation) == (("from 4 rows of qkv",), ("online in", "R1 out"))
    (head,) = outside.rows
    assert (head.smoothing, head.smoothable) == (("no",), False)


def test_totals_count_every_layer(example_config: Config) -> None:
    assert summarise(example_config).totals == (
        "8 of 9 linears smoothable, residual rotatable (8), 0 operators without a rule"
    )
    assert summarise(example_config, ["aten.fold"]).totals.endswith(", 1 operator without a rule (aten.fold)")


def test_a_group_for_some_layers_reaches_those_only(example_config: Config) -> None:
    first = edited(example_config.smoothing.groups[0], layers="0-2")
    smoothing = edited(example_config.smoothing, groups=(first,))
    config = edited(example_config, smoothing=smoothing)
    assert reached(config, config.model.linears[0]) == {0: True, 1: True, 2: True, 3: False}
    qkv, out = summarise(config).sections[0].rows
    assert qkv.smoothing == ("norm norm (layers 0-2)", "no in layers 3")
    assert out.smoothing == ("no, see [1]",)
    assert summarise(config).notes == ("the other half is gated (aten.silu at act)",)


def test_columns_that_no_group_reaches_make_it_partial(example_config: Config) -> None:
    group = example_config.smoothing.groups[1]
    half = edited(group.targets[0], index=(edited(group.targets[0].index[0], shape=(1, 4)),))  # type: ignore[index]  # it has an index
    smoothing = edited(example_config.smoothing, groups=(edited(group, targets=(half,)),))
    config = edited(example_config, smoothing=smoothing)
    assert not any(reached(config, config.model.linears[1]).values())
    assert summarise(config).sections[0].rows[1].smoothing == ("from 4 rows of qkv", "part of it, see [1]")


def test_a_blocked_residual_is_named_in_the_totals(example_config: Config) -> None:
    reason = {"path": "table", "layers": None, "what": "rotation", "reason": "no rotation passes it"}
    blocked = edited(example_config.blocked[0], **{**reason, "operator": "aten.add", "at": "net.0"})
    rotation = edited(example_config.rotation, spaces=())
    config = edited(example_config, rotation=rotation, blocked=(blocked,))
    assert "residual blocked by aten.add at net.0 (" in summarise(config).totals
    assert because(blocked) == "no rotation passes it (aten.add at net.0)"
