"""Matrices that stand in no product: listed all the same, with what they are used for instead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from autoquant.analyzer.analysis import NO_SOURCE, Analysis
from autoquant.analyzer.axes import SEVERAL
from autoquant.analyzer.rules.sentences import qualified
from autoquant.analyzer.variables import Reason
from autoquant.capture.routes import Captured
from autoquant.config.format import Blocked
from autoquant.config.layers import module_of

UNUSED = "it is not traced: nothing that it computes reaches the logits"
TABLE = "its rows are looked up, and what they write is not rotated"
NO_MATRIX = "its channels do not lie along its last two dimensions, and no quantized linear holds such a weight"
AS_A_TENSOR = "it stands in no product that could be followed: it is used as "
KEPT = "a tensor that keeps its scale"


def unlisted(
    module: nn.Module, captured: Captured, analysis: Analysis, blocked: Iterable[Blocked]
) -> tuple[Blocked, ...]:
    """An entry for every parameter of two or more dimensions that is no linear's, in no claim, and not blocked yet.

    Also for one in a claim that is no matrix: nothing quantizes it.
    """
    tied = {name: names for names in captured.aliases for name in names}
    known = {other for name in _known(analysis) for other in tied.get(name, (name,))}
    entries = tuple(blocked)
    paths = {entry.path for entry in entries}
    around = {entry.path for entry in entries if entry.what == "smoothing"}  # values lost tell nothing of weights
    uses = analysis.scales.analysis.axes.uses
    found: dict[Blocked, None] = {}
    for name, parameter in module.named_parameters():
        names = tied.get(name, (name,))
        found_uses = {how: reason for one in names for how, reason in uses(one).items()}
        claimed = known.intersection(names) and SEVERAL not in found_uses  # else it is claimed, and no linear
        if parameter.dim() < 2 or claimed or any(_covered(one, paths, around) for one in names):
            continue
        text, reason = _why(found_uses)
        operator, at = ("forward", module_of(name)) if reason is None else (qualified(reason.operator), reason.at)
        entry = Blocked(path=module_of(name), what="smoothing", reason=text, operator=operator, at=at)
        found[entry] = None
    return tuple(found)


def _known(analysis: Analysis) -> Iterator[str]:
    findings = analysis.findings
    yield from (linear.weight for linear in findings.linears)
    for group in findings.groups:
        yield from (slot.path for slot in (*group.sources, *group.targets))
    for space in findings.spaces:  # what reads and is no linear, such as a convolution, is not smoothed or quantized
        yield from (slot.path for slot in space.writers)


def _covered(name: str, paths: set[str], around: set[str]) -> bool:
    """True if the parameter or its module is blocked already, or all that a module around it holds."""
    parts = name.split(".")
    return bool(paths & {name, module_of(name)}) or any(".".join(parts[:end]) in around for end in range(1, len(parts)))


def _why(uses: dict[str, Reason]) -> tuple[str, Reason | None]:
    """What the parameter is used for, in words, and the operator that says so."""
    if not uses:
        return UNUSED, None
    how, reason = max(uses.items(), key=lambda use: use[1].order)
    if how == SEVERAL:
        return NO_MATRIX, reason
    if how == "a table":
        return TABLE, reason
    if how.startswith("a weight"):
        return NO_SOURCE, reason
    return (reason.text if how == KEPT else f"{AS_A_TENSOR}{how}"), reason
