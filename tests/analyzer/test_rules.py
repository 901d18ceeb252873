"""Every operator of the table between two linears and in a residual stream: what is claimed of it holds.

What is not homogeneous blocks. A wrong rule is put in, one operator after the other, and the proof must notice.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import operator_programs
import pytest
import torch
import transformers.integrations.moe  # noqa: F401  # registers the grouped product
from complex_programs import turned
from operator_programs import BLOCKS, HOMOGENEOUS, WITH_MORE, More, X, between, in_a_space, on_the_stream, with_more
from oracle import proved
from small_graphs import Graph

from autoquant import aten as operators
from autoquant.analyzer.rules import ROTATIONS, SCALES, Rule, Rules
from autoquant.analyzer.rules.registry import check_signature
from autoquant.capture.routes import capture

TOKENS = torch.tensor([[1, 4, 2]])
UNARY = {**{name: function for name, (function, _) in HOMOGENEOUS.items()}, **BLOCKS}
ALL: dict[str, More] = {**{name: (lambda s, x, y, f=f: f(x)) for name, f in UNARY.items()}, **WITH_MORE}


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_homogeneous(name: str) -> None:
    function, power = HOMOGENEOUS[name]
    groups = proved(between(function), X).groups
    (group,) = groups
    assert group.channels == 4
    assert [(slot.path, slot.power) for slot in group.sources] == [("a.weight", 1), ("a.bias", 1)]
    assert [(slot.path, slot.power) for slot in group.targets] == [("b.weight", power)]


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str) -> None:
    findings = proved(between(BLOCKS[name]), X)
    assert findings.groups == ()
    (blocked,) = (b for b in findings.blocked if b.path == "b" and b.what == "smoothing")
    assert blocked.reason and blocked.operator.startswith(("aten.", "constant"))


@pytest.mark.parametrize("name", WITH_MORE)
def test_with_more(name: str) -> None:
    proved(with_more(WITH_MORE[name]), X)


@pytest.mark.parametrize("name", ALL)
def test_in_a_space(name: str) -> None:
    """The same operators on what is added to a residual stream: the proof is what is tested."""
    proved(in_a_space(ALL[name]), TOKENS)


@pytest.mark.parametrize("name", ALL)
def test_on_the_stream(name: str) -> None:
    proved(on_the_stream(ALL[name]), TOKENS)


@pytest.mark.parametrize(
    ("equation", "shapes", "letters"),
    [
        ("bts, bsd->btd", [(2, 3, 3), (2, 3, 4)], (["bts", "bsd"], "btd")),
        ("...hqk,...khd->...qhd", [(2, 5, 1, 3, 3), (2, 5, 3, 1, 4)], (["abhqk", "abkhd"], "abqhd")),
        ("...d,ed->...e", [(2, 3, 4), (4, 4)], (["abd", "ed"], "abe")),
        ("...d,ed->...e", [(4,), (4, 4)], (["d", "ed"], "e")),
        ("...td,...d->...td", [(1, 3, 4), (1, 4)], (["atd", "ad"], "atd")),
        ("...td,...d->...td", [(2, 3, 4), (1, 4)], None),  # one is repeated
        ("...td,...d->...td", [(2, 3, 4), (4,)], None),
        ("bii,bid->bd", [(2, 3, 3), (2, 3, 4)], None),  # a diagonal
        ("bts,bsd", [(2, 3, 3), (2, 3, 4)], None),  # the result is left to the alphabet
    ],
)
def test_letters_of_einsum(equation: str, shapes: list[tuple[int, ...]], letters: tuple[list[str], str] | None) -> None:
    assert operators.einsum_letters(equation, shapes) == letters


def test_two_channels_that_become_one_complex_number_have_one_scale() -> None:
    (group,) = proved(between(turned), X).groups
    assert group.channels == 2
    assert [index.model_dump(exclude_defaults=True) for index in group.targets[0].index or ()] == [
        {"shape": (2, 2), "stride": (2, 1), "channel_stride": (1, 0)}
    ]


def test_values_by_einsum_with_dots_are_found_in_both_analyses() -> None:
    findings = proved(with_more(WITH_MORE["einsum with dots"]), X)
    assert [(group.name, group.channels) for group in findings.groups] == [("a -> b", 4)]
    assert [(space.name, space.blocks, space.size) for space in findings.spaces] == [("a -> b", 2, 2)]


def test_the_sum_of_rows_is_written_by_the_table() -> None:
    findings = proved(in_a_space(WITH_MORE["embedding_bag"]), TOKENS)
    (residual,) = (space for space in findings.spaces if space.kind == "R1")
    assert "m" in [writer.path for writer in residual.writers]
    largest = proved(in_a_space(WITH_MORE["embedding_bag, the largest"]), TOKENS)
    assert [space.kind for space in largest.spaces] == []
    assert "a tensor that is not rotated is added" in [b.reason for b in largest.blocked]


def test_a_weight_that_is_normalised_blocks_in_words() -> None:
    findings = proved(between(BLOCKS["_weight_norm"]), X)
    assert {b.reason for b in findings.blocked if b.path == "b" and b.what == "smoothing"} == {
        "it is a weight that is normalised before it is used"
    }
    assert findings.unknown_operators == ()


# --- the table is tested whole ---------------------------------------------------------------------------------------


SETS = [name for name in vars(operators) if name.isupper() and name != "COUNTING"]
"""Sets of operators that a graph may have between linears; COUNTING makes numbers of no activation."""


def table() -> set[str]:
    """Every operator that has a rule, or stands in a set of operators."""
    names = {*SCALES.table, *ROTATIONS.table}
    sets = [value for name, value in vars(operators).items() if name in SETS and isinstance(value, frozenset | dict)]
    assert len(sets) > 10
    return {operators.ALIASES.get(name, name) for found in sets for name in found} | names


def used() -> Iterator[str]:
    """The operators of all programs, as they are captured."""
    for function in ALL.values():
        for subgraph in capture(with_more(function).double().eval(), (X,), {}, "export").subgraphs:
            yield from (operators.operator_name(n) for n in subgraph.graph.graph.nodes if n.op == "call_function")


def _line(name: str) -> str:
    source = Path(operator_programs.__file__)
    number = next(i for i, text in enumerate(source.read_text().splitlines(), 1) if text.startswith(f"{name}:"))
    return f"tests/analyzer/{source.name}:{number}"


TO_EXTEND = (
    f"add one to HOMOGENEOUS ({_line('HOMOGENEOUS')}), BLOCKS ({_line('BLOCKS')}) or WITH_MORE ({_line('WITH_MORE')})"
)


def test_the_message_names_the_lines_to_edit() -> None:
    assert re.fullmatch(r"add one to .*operator_programs\.py:\d+\).*operator_programs\.py:\d+\)", TO_EXTEND)


def test_every_operator_with_a_rule_is_tested() -> None:
    # The first has no kernel for float64; export refuses the size that the second makes; the third, which takes
    # functions, has test_flex_attention.py.
    missing = table() - set(used()) - {"_grouped_mm", "bincount", "flex_attention"}
    assert not missing, f"no program for {sorted(missing)}: {TO_EXTEND}"
    for rules in (SCALES.table, ROTATIONS.table):
        assert rules["_grouped_mm"].apply is rules["transformers::grouped_mm_fallback"].apply


def test_second_names_are_second_names() -> None:
    for name, first in operators.ALIASES.items():
        assert getattr(torch.ops.aten, name).overloads(), name
        assert getattr(torch.ops.aten, first).overloads(), first


# --- registration ----------------------------------------------------------------------------------------------------


def test_a_rule_that_does_not_fit_its_schema_is_an_error_on_import() -> None:
    rules = Rules("scale")
    with pytest.raises(TypeError, match=r"too_short \(tests?.*\) does not fit aten::gelu\(.*change its parameters"):

        @rules.rule("gelu", says="")
        def too_short(a: object, site: object) -> None: ...

    with pytest.raises(TypeError, match=r"got an unexpected keyword argument 'approximate'"):

        @rules.rule("gelu", says="")
        def no_keyword(a: object, site: object, x: object) -> None: ...

    with pytest.raises(TypeError, match=r"missing a required argument: 'z'"):

        @rules.rule("relu", says="")
        def too_long(a: object, site: object, x: object, z: object) -> None: ...

    assert rules.table == {}


def test_a_rule_for_no_operator_or_for_one_that_has_a_rule_is_an_error_on_import() -> None:
    def passes(a: object, site: object, x: object, *args: object, **kwargs: object) -> None: ...

    rules = Rules("rotation")
    rules.rule("relu", says="")(passes)
    with pytest.raises(TypeError, match="relu has a rotation rule already"):
        rules.rule("abs relu", says="")(passes)
    with pytest.raises(TypeError, match="torch has no operator rleu"):
        rules.rule("rleu", says="")(passes)


def test_an_overload_left_out_has_no_rule() -> None:
    where = SCALES.table["where"]
    assert where.without == {"default"}
    with pytest.raises(TypeError, match=r"name the overload 'default' in without="):
        check_signature(where.apply, "where")


def test_rules_of_other_libraries_fit_their_operators() -> None:
    """They are registered after the rules, by transformers."""
    name = "transformers::grouped_mm_fallback"
    assert torch.ops.transformers.grouped_mm_fallback.overloads()
    for rules in (SCALES, ROTATIONS):
        check_signature(rules.table[name].apply, name)


def test_every_rule_is_a_top_level_function_beside_its_sentence() -> None:
    for rules in (SCALES, ROTATIONS):
        for name, rule in rules.table.items():
            module = sys.modules[rule.apply.__module__]
            assert module.__name__.startswith("autoquant.analyzer.rules."), name
            assert rule.says, name
            assert rule.apply is vars(module).get(rule.apply.__qualname__), f"{name}: a closure, or renamed"


# --- a wrong rule is noticed -----------------------------------------------------------------------------------------


def assert_noticed(graph: Graph, argument: torch.Tensor) -> None:
    with pytest.raises(AssertionError, match="Outcome"):
        proved(graph, argument)


@pytest.mark.parametrize("name", sorted((operators.NONLINEAR & set(BLOCKS)) - {"bucketize"}))
def test_proof_notices_a_scale_let_through(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCALES.table, name, Rule(lambda a, site, x, *_, **__: a.labels(site, x), says=""))
    assert_noticed(between(BLOCKS[name]), X)


def test_no_rule_lets_a_scale_into_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong rule of bucketize, whose result are integers, is stopped before any proof."""
    monkeypatch.setitem(SCALES.table, "bucketize", Rule(lambda a, site, x, *_, **__: a.labels(site, x), says=""))
    findings = proved(between(BLOCKS["bucketize"]), X)
    assert findings.groups == ()


@pytest.mark.parametrize("name", ["relu", "abs", "silu", "tanh", "square", "maximum"])
def test_proof_notices_a_rotation_let_through(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROTATIONS.table, name, Rule(lambda a, site, x, *_: x, says=""))
    assert_noticed(on_the_stream(lambda s, x, y: x + ALL[name](s, x, y)), TOKENS)


def test_no_nonlinear_operator_is_left_out_of_the_mutations() -> None:
    assert set(BLOCKS) >= operators.NONLINEAR
