"""Modules that a mapping takes, found as the tools find them."""

from __future__ import annotations

import pytest

from autoquant.errors import AutoQuantError
from autoquant.recipes.matching import MatchedPair, WrittenMapping, match_sets, matched_pairs

LAYER = ("norm", "attn.q", "attn.k", "mlp.up", "mlp.down")
NAMES = {"": "Model", "embed": "Embedding"} | {f"layers.{n}.{name}": "Linear" for n in range(2) for name in LAYER}


def test_a_set_is_closed_by_the_next_layer() -> None:
    found = matched_pairs(WrittenMapping("re:.*norm", ("re:.*q$", "re:.*k$")), NAMES)
    assert found == [MatchedPair(f"layers.{n}.norm", (f"layers.{n}.attn.q", f"layers.{n}.attn.k")) for n in range(2)]


def test_all_matches_within_a_layer_are_taken() -> None:
    names = NAMES | {"layers.1.mlp.experts.0.up": "Linear", "layers.1.mlp.experts.1.up": "Linear"}
    found = matched_pairs(WrittenMapping("re:.*norm", ("re:.*up$",)), names)
    assert found[1].balance == ("layers.1.mlp.up", "layers.1.mlp.experts.0.up", "layers.1.mlp.experts.1.up")


def test_an_expression_is_matched_from_the_start_and_not_to_the_end() -> None:
    assert matched_pairs(
        WrittenMapping("re:layers.0.norm", ("re:.*attn",)), {"layers.0.norm": "N", "layers.0.attn.q": "L"}
    )
    assert matched_pairs(WrittenMapping("re:norm", ("re:attn",)), NAMES) == []


def test_a_class_names_its_modules() -> None:
    assert [sets for sets in match_sets({"a": "Norm", "b": "Linear"}, ["Norm", "Linear"])] == [[["a"], ["b"]]]


def test_what_stops_the_tool() -> None:
    with pytest.raises(AutoQuantError, match="the last set is incomplete: nothing is taken by re:nowhere"):
        matched_pairs(WrittenMapping("re:.*norm", ("re:nowhere",)), NAMES)
    with pytest.raises(AutoQuantError, match="is taken by 2 expressions"):
        matched_pairs(WrittenMapping("re:.*norm", ("re:.*q$", "re:.*attn.q$")), NAMES)
    with pytest.raises(AutoQuantError, match="it takes 2 modules for the one to scale"):
        matched_pairs(WrittenMapping("re:.*norm", ("embed2",)), {"a.norm": "N", "b.norm": "N", "embed2": "E"})


def test_quark_takes_experts_by_the_end_of_their_names() -> None:
    """Where no module of the layer has the reader's name, each linear that ends so is scaled by the one beside it."""
    names = {"layers.0.mlp.up": "Linear", "layers.0.mlp.down": "Linear"}
    names |= {f"layers.1.mlp.experts.{n}.{part}": "Linear" for n in range(2) for part in ("up", "down")}
    names |= {"layers.1.mlp.shared.down": "Linear"}
    mapping = WrittenMapping("up", ("down",), "layers", "smooth", "down")
    assert matched_pairs(mapping, names) == [
        MatchedPair("layers.0.mlp.up", ("layers.0.mlp.down",)),
        *(MatchedPair(f"layers.1.mlp.experts.{n}.up", (f"layers.1.mlp.experts.{n}.down",)) for n in range(2)),
    ]
    by_name = WrittenMapping("mlp.up", ("mlp.down",), "layers", "smooth", "mlp.act")
    assert matched_pairs(by_name, names) == []  # its input is not looked at


def test_quark_looks_in_every_layer() -> None:
    mapping = WrittenMapping("norm", ("attn.q", "attn.k"), "layers")
    assert [pair.smooth for pair in matched_pairs(mapping, NAMES)] == ["layers.0.norm", "layers.1.norm"]
    assert matched_pairs(WrittenMapping("norm", ("attn.v",), "layers"), NAMES) == []
