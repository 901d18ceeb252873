"""Draws programs, checks every claim that is made about them by execution, and cuts down those where one is wrong."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import transformers.integrations.moe  # noqa: F401  # registers the grouped product
from oracle import change_of, expand, outcomes, outputs_of
from program_blocks import CATALOGUE, WEIGHTS
from programs import WIDTHS, Built, InvalidError, Plant, Program, Step, build, draw, shrunk
from readable import text
from recorder import captured

from autoquant import aten as operators
from autoquant.analyzer.analysis import analyse
from autoquant.analyzer.findings import Findings
from autoquant.analyzer.rules import ROTATIONS, SCALES
from autoquant.aten import operator_name
from autoquant.capture.graph import Captured
from autoquant.config.format import Slot
from autoquant.errors import AutoQuantError

TOLERANCE = 1e-6
JUMPS = 12
"""Times that the parameters of a program are moved by a unit in the last place, to see whether that changes it."""

NOT_COVERED = {
    "flex_attention": "is compiled where it is called; its rules are tried in test_flex_attention.py",
    "_grouped_mm": "has no kernel for float64; its rules are those of transformers::grouped_mm_fallback",
}
"""Operators of the table that no program contains, and why."""


def table() -> frozenset[str]:
    """All operators that some part of the analyzer knows by name."""
    names = {*SCALES.table, *ROTATIONS.table}
    for name, value in vars(operators).items():
        if name.isupper() and name != "COUNTING" and isinstance(value, (frozenset, dict)):
            names.update(value)
    return frozenset(names - set(getattr(operators, "ALIASES", ())))


@dataclass(frozen=True, slots=True)
class Failure:
    """What is wrong with a program. ``kind`` is a claim that does not hold, a plant that is not found, or an error."""

    kind: str
    detail: str


@dataclass(frozen=True, slots=True)
class Checked:
    """What was counted, the operators in the graph, the worst change, and the first thing that is wrong."""

    counts: Counter[str]
    operators: frozenset[str]
    worst: float
    failure: Failure | None


def check(built: Built) -> Checked:
    """Analyse a program and carry out every claim."""
    module, tokens = built.network, built.tokens
    counts: Counter[str] = Counter(programs=1, planted=len(module.plants))
    try:
        graph = captured(module, (tokens,))
    except AutoQuantError:  # export refuses some products sized by data; the recorder does not
        return Checked(Counter(programs=1, uncaptured=1), frozenset(), 0.0, None)
    try:
        findings = analyse(graph).findings
    except Exception as error:  # whatever the analyzer raises on a valid program is a finding
        return Checked(counts, frozenset(), 0.0, Failure("error", f"{type(error).__name__}: {error}"))
    met = operators_in(graph)
    lacking = [plant for plant in module.plants if not _found(plant, findings)]
    missed = [plant for plant in lacking if matters(built, plant)]
    plants = len(module.plants) - len(lacking) + len(missed)
    counts["planted"] = plants
    counts.update(groups=len(findings.groups), spaces=len(findings.spaces), found=plants - len(missed))
    counts.update(exported="p0" not in graph.subgraphs[0].inputs)
    failure = (
        Failure(f"missed {missed[0].what} of a {missed[0].kind}", f"{missed[0]}\n{text(findings)}") if missed else None
    )
    worst = 0.0
    for outcome in outcomes(module, lambda m: m(tokens), findings, built.program.seed):
        counts["carried out"] += 1
        if not outcome.change < TOLERANCE and jumps(built):
            counts["not judged"] += 1
            continue
        worst = max(worst, outcome.change)
        if not outcome.change < TOLERANCE:
            counts["wrong"] += 1
            return Checked(counts, met, worst, Failure("wrong", f"{outcome}\n{text(findings)}"))
    return Checked(counts, met, worst, failure)


def matters(built: Built, plant: Plant) -> bool:
    """True if the outputs are made of what was planted, and not of its shape alone (``expand_as``)."""
    changed = copy.deepcopy(built.network)
    with torch.no_grad():
        for path in (*plant.sources, *plant.targets):
            changed.get_parameter(path).neg_().add_(1)
        return change_of(outputs_of(changed(built.tokens)), outputs_of(built.network(built.tokens))) > TOLERANCE


def jumps(built: Built) -> bool:
    """True if rounding alone changes the outputs, as where ``ceil`` is taken of shares that sum up to 1."""
    with torch.no_grad():
        expected = outputs_of(built.network(built.tokens))
        for seed in range(JUMPS):
            generator = torch.Generator().manual_seed(seed)
            moved = copy.deepcopy(built.network)
            for parameter in moved.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.mul_(1 + torch.finfo(parameter.dtype).eps * noise)
            if not change_of(outputs_of(moved(built.tokens)), expected) < TOLERANCE:
                return True
    return False


def operators_in(graph: Captured) -> frozenset[str]:
    """The operators that the graph calls."""
    nodes = (node for subgraph in graph.subgraphs for node in subgraph.graph.graph.nodes)
    return frozenset(operator_name(node) for node in nodes if node.op == "call_function")


def _found(plant: Plant, findings: Findings) -> bool:
    """Do the groups from the sources cover all columns of the targets; do spaces cover all rows of the writers?"""
    if plant.what == "space":
        # A writer that a gain follows stands where the gain is folded.
        members = [(*s.writers, *(r for read in s.reads for r in read.readers)) for s in findings.spaces]
        return any(all(_covered(slots, path) for path in plant.sources) for slots in members)
    groups = [g for g in findings.groups if {s.path for s in g.sources} >= set(plant.sources)]
    return all(_covered([t for g in groups for t in g.targets], path) for path in plant.targets)


def _covered(slots: Iterable[Slot], path: str) -> bool:
    """Whether every axis of a parameter that is in a slot is so as a whole."""
    axes: dict[tuple[int, int], set[int]] = {}
    for slot in slots:
        if slot.path == path:
            axes.setdefault((slot.dim, slot.size), set()).update(expand(slot)[0])
    return bool(axes) and all(len(found) == size for (_, size), found in axes.items())


def run(seed: int) -> Checked:
    """The program of a seed, checked."""
    return check(draw(CATALOGUE, WEIGHTS, seed))


def alone(kind: str) -> Built:
    """A program of one step of a kind, read by a linear, which is what a scale or a rotation is undone in."""
    entry = CATALOGUE[kind]
    for seed in range(40):
        inner = Step("linear", (0,), seed)
        step = Step(kind, (1, 0)[: entry.inputs] if seed % 2 else (1,) * entry.inputs, seed)
        try:
            return build(CATALOGUE, Program(seed, WIDTHS[seed % len(WIDTHS)], 1 + seed // 20, (inner, step)))
        except InvalidError as error:
            last = error
    raise last


def minimal(program: Program, failure: Failure) -> Built:
    """The smallest program that fails in the same way."""

    def fails(built: Built) -> bool:
        found = check(built).failure
        return found is not None and found.kind == failure.kind

    return shrunk(CATALOGUE, program, fails)


def report(program: Program, failure: Failure) -> str:
    """The smallest program that fails in the same way, as Python, with what is wrong with it."""
    small = minimal(program, failure)
    found = check(small).failure
    assert found is not None
    return f"{found.kind}: {found.detail}\ntokens = torch.{small.tokens!r}\n{small.network.text()}"
