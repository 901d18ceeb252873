"""Random small programs: every claim of the analyzer is carried out and must change nothing; planted groups are found.

``AUTOQUANT_FUZZ=10000 AUTOQUANT_FUZZ_SEED=5000`` runs other and more programs; a failure is printed as a minimal one.
"""

from __future__ import annotations

import gc
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fuzzer import NOT_COVERED, TOLERANCE, alone, check, jumps, matters, minimal, operators_in, report, run, table
from program_blocks import BLOCKS, CATALOGUE, PLANTS, WEIGHTS
from program_expressions import FAMILIES
from programs import Built, InvalidError, Plant, Program, Step, build, draw
from recorder import MutationError, captured, record
from torch import nn

from autoquant.analyzer.analysis import analyse
from autoquant.analyzer.rules import ROTATIONS, SCALES, Rule, Rules
from autoquant.capture.routes import capture

PROGRAMS = int(os.environ.get("AUTOQUANT_FUZZ", "2000"))
FIRST_SEED = int(os.environ.get("AUTOQUANT_FUZZ_SEED", "0"))
CHUNK = 50


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    """One thread; what was imported is not searched for garbage again and again."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("first", range(FIRST_SEED, FIRST_SEED + PROGRAMS, CHUNK))
def test_every_claim_holds(first: int) -> None:
    total: Counter[str] = Counter()
    for seed in range(first, min(first + CHUNK, FIRST_SEED + PROGRAMS)):
        checked = run(seed)
        total += checked.counts
        if checked.failure is not None:
            pytest.fail(
                f"seed {seed}\n{report(draw(CATALOGUE, WEIGHTS, seed).program, checked.failure)}", pytrace=False
            )
    print(f"seeds from {first}: {dict(total)}")
    assert total["found"] == total["planted"]
    if total["programs"] == CHUNK:  # a seed that is run again may be poor
        assert total["groups"] + total["spaces"] > 2 * total["programs"]  # the programs are worth analysing
        assert total["uncaptured"] <= total["programs"] / 20


def test_a_program_that_rounding_alone_changes_is_not_judged() -> None:
    """It takes ``ceil`` of a cumulative sum of shares, whose last one is 1 up to rounding."""
    kinds = ("linear", "torch.relu({x})", "linear", "torch.cumsum({x}.softmax(-1), -1)", "{x} + torch.ceil({x})")
    total: Counter[str] = Counter()
    for seed in range(6):
        steps = tuple(Step(kind, (place,), seed + place) for place, kind in enumerate(kinds))
        jumping = build(CATALOGUE, Program(seed, 8, 2, steps))
        assert jumps(jumping)
        checked = check(jumping)
        assert checked.failure is None and checked.worst < TOLERANCE
        total += checked.counts
    assert total["not judged"] > 0 == total["wrong"]
    assert not any(jumps(draw(CATALOGUE, WEIGHTS, seed)) for seed in range(20))


class Chain(nn.Module):
    """A planted chain whose result is used, or only its shape."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        self.a, self.b, self.used = nn.Linear(4, 4), nn.Linear(4, 4), used

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.b(self.a(x))
        return made if self.used else x[:1].expand_as(made)


@pytest.mark.parametrize("used", [True, False])
def test_what_gives_its_shape_alone_is_not_counted_as_planted(used: bool) -> None:
    built: Any = SimpleNamespace(network=Chain(used), tokens=torch.ones(2, 4))
    assert matters(built, Plant("group", "chain", ("a.weight",), ("b.weight",))) == used


def test_every_operator_of_the_table_is_in_some_program() -> None:
    met: set[str] = set()
    for kind in CATALOGUE:
        built = alone(kind)
        met |= operators_in(captured(built.network, (built.tokens,)))
    assert table() - met <= set(NOT_COVERED), "a new operator needs a step in tests/analyzer/expression_templates.py"
    assert not met & set(NOT_COVERED)


def test_drawn_programs_use_every_family() -> None:
    kinds = {step.kind for seed in range(250) for step in draw(CATALOGUE, WEIGHTS, seed).program.steps}
    assert kinds >= set(BLOCKS) | set(PLANTS)
    for name, family in FAMILIES.items():
        assert len(kinds & set(family)) > (0.7 if name != "in place" else 0.2) * len(family), name


@pytest.mark.parametrize("first", [0, 100, 200, 300])
def test_recording_gives_what_export_gives(first: int) -> None:
    # Export refuses the sizes that bincount makes, and makes other nodes of what writes into tensors or may do so.
    drawn = (draw(CATALOGUE, WEIGHTS, seed) for seed in range(first, first + 100))
    other = re.compile(r"bincount|batch_norm|_\(")
    built = next(b for b in drawn if b.network.plants and not other.search("".join(b.network.lines)))
    recorded = analyse(record(built.network, (built.tokens,))).findings
    exported = analyse(capture(built.network, (built.tokens,), {}, "export")).findings
    assert recorded == exported
    assert recorded.groups


def test_recording_refuses_mutation() -> None:
    built = alone("{x}.clone().add_({y})")
    with pytest.raises(MutationError, match="aten::add_"):
        record(built.network, (built.tokens,))
    assert check(built).counts["exported"] == 1


def test_the_same_seed_is_the_same_program() -> None:
    first, second = (draw(CATALOGUE, WEIGHTS, 5) for _ in range(2))
    assert first.program == second.program
    assert first.network.text() == second.network.text()
    assert all(
        torch.equal(a, b) for a, b in zip(first.network(first.tokens), second.network(second.tokens), strict=True)
    )
    rebuilt = build(CATALOGUE, first.program)
    assert all(
        torch.equal(a, b) for a, b in zip(first.network(first.tokens), rebuilt.network(first.tokens), strict=True)
    )


def test_a_program_is_printed_as_python() -> None:
    built = build(CATALOGUE, Program(0, 4, 1, (Step("linear", (0,), 3), Step("F.silu({x})", (1,), 4))))
    assert built.network.text() == (
        "class Program(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.table_0 = nn.Embedding(5, 4)\n"
        "        self.s0_0 = nn.Linear(4, 4, bias=False)\n"
        "        self.out2_0 = nn.Linear(4, 3)\n"
        "\n"
        "    def forward(self, tokens):\n"
        "        x0 = self.table_0(tokens)\n"
        "        x1 = self.s0_0(x0)\n"
        "        x2 = F.silu(x1)\n"
        "        outputs = (self.out2_0(x2),)\n"
        "        return outputs"
    )


def test_steps_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidError, match="differ in width"):
        build(CATALOGUE, Program(0, 4, 1, (Step("{x}.narrow(-1, 0, {H})", (0,), 3), Step("{x} * {y}", (0, 1), 4))))
    with pytest.raises(InvalidError, match="is not there"):
        build(CATALOGUE, Program(0, 4, 1, (Step("linear", (2,), 3),)))
    with pytest.raises(InvalidError, match="out of range"):
        build(CATALOGUE, Program(0, 4, 1, (Step("{x} - {y}", (0, 0), 3),)))


# --- the fuzzer itself can fail ---------------------------------------------------------------------------------------

Change = Callable[[Rules], dict[str, Rule]]
"""Wrong rules in place of some; without the entry where there is to be none."""


def _wrong(**made: Callable[..., Any]) -> dict[str, Rule]:
    return {name: Rule(rule, says="") for name, rule in made.items()}


def _passes(name: str) -> Change:
    return lambda rules: _wrong(**{name: lambda a, site, x, *args, **kwargs: x})


def _sum_without_equation(rules: Rules) -> dict[str, Rule]:
    right = rules.table["add"].apply
    return _wrong(
        add=lambda a, site, x, y, *args, **kwargs: (
            x if isinstance(x, torch.Tensor) and tuple(x.shape) == site.shape else right(a, site, x, y, *args, **kwargs)
        )
    )


def _bias_forgotten(rules: Rules) -> dict[str, Rule]:
    right = rules.table["linear"].apply
    return _wrong(linear=lambda a, site, x, w, bias=None: right(a, site, x, w))


def _any_number_may_be_filled_in(rules: Rules) -> dict[str, Rule]:
    return _wrong(masked_fill=lambda a, site, x, mask, value: a.labels(site, x))


def _a_reduction_that_asks_for_nothing(rules: Rules) -> dict[str, Rule]:
    return _wrong(sum=lambda a, site, x, dim, keepdim=False: a.labels(site, x).amax(dim, keepdim))


def _a_product_has_the_scale_of_one_side(rules: Rules) -> dict[str, Rule]:
    return _wrong(mul=lambda a, site, x, y: a.labels(site, x).expand(site.shape))


def _no_rule(name: str) -> Change:
    return lambda rules: {name: Rule(lambda *_: None, "", frozenset({"default", "Tensor", "Scalar"}))}


WRONG: dict[str, tuple[Rules, Change, str, str]] = {
    "silu lets a scale through": (SCALES, _passes("silu"), "silu", "wrong"),
    "softmax lets a scale through": (SCALES, _passes("softmax"), "softmax", "wrong"),
    "a sum joins nothing": (SCALES, _sum_without_equation, "+", "wrong"),
    "a bias is forgotten": (SCALES, _bias_forgotten, "linear", "wrong"),
    "masked_fill lets any number in": (SCALES, _any_number_may_be_filled_in, "({mask}, 0.5)", "wrong"),
    "a sum over channels joins nothing": (SCALES, _a_reduction_that_asks_for_nothing, "sum", "wrong"),
    "a product has the scale of one side": (SCALES, _a_product_has_the_scale_of_one_side, "*", "wrong"),
    "relu lets a rotation through": (ROTATIONS, _passes("relu"), "relu", "wrong"),
    "a bias is not rotated": (ROTATIONS, _bias_forgotten, "linear", "wrong"),
    "relu has no rule": (SCALES, _no_rule("relu"), "planted chain", "missed"),
    "attention has no rule": (ROTATIONS, _no_rule("scaled_dot_product_attention"), "planted attention", "missed"),
}
"""Where the rules are, what is done to them, a part of the names of steps that are drawn more often, the failure."""
SEEDS = 100
MAX_STEPS = 3


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_caught_and_cut_down(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, change, word, kind = WRONG[name]
    often = {step: weight * (50 if word in step else 1) for step, weight in WEIGHTS.items()}
    for operator, rule in change(where).items():
        monkeypatch.setitem(where.table, operator, rule)
    small = next(filter(None, (_caught(draw(CATALOGUE, often, seed), kind) for seed in range(SEEDS))), None)
    assert small is not None, f"{SEEDS} programs and none of them fails"
    assert 1 <= len(small.program.steps) <= MAX_STEPS
    monkeypatch.undo()
    checked = check(small)
    assert checked.failure is None
    assert checked.worst < TOLERANCE


def _caught(built: Built, kind: str) -> Built | None:
    """The minimal program, if this one fails as it should."""
    failure = check(built).failure
    return minimal(built.program, failure) if failure is not None and failure.kind.startswith(kind) else None
