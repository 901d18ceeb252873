"""docs/adding-an-operator.md: its worked example, put into the tables of rules, finds what the proof bears out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from operator_programs import ONES, More, X, with_more
from oracle import proved
from small_graphs import Graph, lin, par
from torch import nn

from autoquant.analyzer.rules import ROTATIONS, SCALES, norms

PAGE = (Path(__file__).parents[2] / "docs" / "adding-an-operator.md").read_text(encoding="utf-8")
RULES, IN_TESTS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
ENTRY, STEP = IN_TESTS.splitlines()
OPERATOR = "_fused_rms_norm"
PROGRAM: More = eval(f"{{{ENTRY}}}", {"torch": torch})[OPERATOR]
TOKENS = torch.tensor([[1, 4, 2]])


def stream() -> Graph:
    """A residual stream that linears read behind the norm."""
    return Graph(
        lambda s, tokens: s.b(PROGRAM(s, s.table(tokens), torch.zeros(4, dtype=torch.float64))),
        table=nn.Embedding(7, 4),
        k=par(4),
        b=lin(),
    )


@pytest.fixture
def with_rules() -> Iterator[None]:
    names: dict[str, Any] = dict(vars(norms))
    exec(compile(RULES, "adding-an-operator.md", "exec"), names)
    yield
    for rules in (SCALES, ROTATIONS):
        del rules.table[OPERATOR]


def test_without_a_rule_it_blocks_and_is_named() -> None:
    found = proved(with_more(PROGRAM), X)
    assert f"aten.{OPERATOR}" in {blocked.operator for blocked in found.blocked}
    assert not any("k" in slot.path for group in found.groups for slot in group.sources)
    assert proved(stream(), TOKENS).spaces == ()


@pytest.mark.usefixtures("with_rules")
def test_with_the_rules_of_the_page_its_weight_takes_scales_and_a_space_goes_through() -> None:
    found = proved(with_more(PROGRAM), X)
    assert f"aten.{OPERATOR}" not in {blocked.operator for blocked in found.blocked if blocked.path == "b"}
    assert any(slot.path == "k" for group in found.groups for slot in group.sources)
    (space,) = proved(stream(), TOKENS).spaces
    assert [read.norm.weight for read in space.reads if read.norm is not None] == ["k"]


def test_the_step_computes_a_norm() -> None:
    step = STEP.format(x="x", W="4", v="v")
    y = eval(step, {"torch": torch, "x": X, "v": ONES})
    assert torch.allclose(y, X / (X.square().mean(-1, keepdim=True) + 1e-6).sqrt(), rtol=0, atol=1e-14)
