"""Why a linear is or is not smoothable and rotatable: the operators from its source to it, or to what blocks.

The solved equations say *that* a scale is free or fixed. Here the graph is walked once more along one channel,
backwards from the linear, so that a person can follow it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import fx

from autoquant.analyzer.analysis import NO_SOURCE, Analysis
from autoquant.analyzer.chains import Chains, Steps, rotation_chains, scale_chains
from autoquant.analyzer.rotation_spaces import Rotations
from autoquant.analyzer.rotation_state import Vector
from autoquant.analyzer.rules.sentences import qualified
from autoquant.analyzer.scale_state import Use
from autoquant.analyzer.templates import StackMap
from autoquant.analyzer.variables import Reason
from autoquant.config.format import Linear, SmoothingKind
from autoquant.config.layers import LAYER, layer_set, module_of
from autoquant.config.spelling import did_you_mean, with_ends
from autoquant.errors import AutoQuantError


@dataclass(frozen=True, slots=True)
class Chain:
    """Operators in the order in which they run."""

    title: str
    steps: Steps


@dataclass(frozen=True, slots=True)
class Answer:
    """Can it be done, how, and the way there."""

    verdict: str
    chains: tuple[Chain, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Explanation:
    """Both answers for one linear, with the paths of the traced layers as ``rename`` would have them."""

    linear: Linear
    layers: str | None
    smoothing: Answer
    rotation: Answer
    rename: tuple[tuple[str, str], ...]


def explain(analysis: Analysis, stacks: Sequence[StackMap], path: str) -> Explanation:
    """Explain the linear at ``path``: its module or weight, with the number of a layer or ``{layer}``.

    Raises AutoQuantError with the nearest name where there is no such linear.
    """
    linear, renamed, layers = _find(analysis, stacks, path)
    use = next(use for use in analysis.scales.analysis.uses if use.weight == linear.weight)
    return Explanation(linear, layers, _smoothing(analysis, linear, use), _rotation(analysis, linear, use), renamed)


# --- which linear -----------------------------------------------------------------------------------------------------


def _find(
    analysis: Analysis, stacks: Sequence[StackMap], path: str
) -> tuple[Linear, tuple[tuple[str, str], ...], str | None]:
    """The traced linear, how to rename the traced layers, and the layers that it stands for."""
    by_name = {name: linear for linear in analysis.findings.linears for name in (linear.path, linear.weight)}
    for stack in stacks:
        number, dot, rest = path.removeprefix(f"{stack.path}.").partition(".")
        if not path.startswith(f"{stack.path}.") or not dot:
            continue
        have = [(i, n) for i, originals in enumerate(stack.originals) for n in originals]
        if number != LAYER and not any(str(n) == number for _, n in have):
            last = max(n for _, n in have)
            raise AutoQuantError(f"{path}: there is no layer {number}; the layers of {stack.path} are 0 to {last}")
        for i, n in have:
            linear = by_name.get(f"{stack.path}.{i}.{rest}")
            if linear is not None and number in (LAYER, str(n)):
                same = {
                    m for j, m in have if f"{stack.path}.{j}.{rest}" in by_name and stack.kinds[j] == stack.kinds[i]
                }
                return linear, _first(stacks), layer_set(same)
    if path in by_name:
        return by_name[path], _first(stacks), None
    names = [rename(name, _first(stacks)) for name in by_name]
    names += [
        name.replace(f"{stack.path}.{stack.originals[0][0]}.", f"{stack.path}.{LAYER}.")
        for name in names
        for stack in stacks
    ]
    whole = next((name for name in names if name.endswith(f".{path}")), None)
    near = f"; did you mean '{whole}'?" if whole else did_you_mean(path, with_ends(names))
    raise AutoQuantError(f"{path}: no linear of the model{near}")


def _first(stacks: Sequence[StackMap]) -> tuple[tuple[str, str], ...]:
    return tuple((f"{s.path}.{i}", f"{s.path}.{o[0]}") for s in stacks for i, o in enumerate(s.originals))


def rename(text: str, renamed: Sequence[tuple[str, str]]) -> str:
    """Put the numbers of the original layers into a traced path or a sentence with such paths."""
    words = []
    for word in text.split(" "):
        for old, new in renamed:
            bare = word.lstrip("('")
            if bare == old or bare.startswith((f"{old}.", f"{old},", f"{old})", f"{old}:", f"{old}'")):
                word = word[: len(word) - len(bare)] + new + bare[len(old) :]
                break
        words.append(word)
    return " ".join(words)


# --- smoothing --------------------------------------------------------------------------------------------------------


def _smoothing(analysis: Analysis, linear: Linear, use: Use) -> Answer:
    scales = analysis.scales
    labels = use.labels.reshape(-1).numpy()
    groups = [
        group
        for group in scales.groups
        if group.kind is not SmoothingKind.QUERY_KEY
        and any((slot.path, slot.dim) == (use.weight, use.contracted_dim) for slot in group.targets)
    ]
    free = ~scales.solution.fixed[labels]
    chosen = labels if groups and free.all() else labels[~free] if (~free).any() else labels
    found, counts = np.unique(chosen, return_counts=True)
    label = int(found[np.argmax(counts)])
    start = _input(use.site.node)
    chains = scale_chains(scales, int(scales.solution.component[label]))
    if groups and free.all():
        way = chains.back(start)
        sources = dict.fromkeys(module_of(slot.path) for group in groups for slot in group.sources)
        readers = dict.fromkeys(module_of(slot.path) for group in groups for slot in group.targets)
        others = [reader for reader in readers if reader != linear.path]
        notes = [f"the scale is put on {', '.join(sources)}"]
        if others:
            notes.append(f"the same scale is undone in every other reader too: {', '.join(others)}")
        return Answer(
            "yes",
            (Chain("from the source to this linear", chains.steps([*way, use.site.node], reader=use.site.node)),),
            tuple(notes),
        )
    what = "no" if not groups else f"in part: {int((~free).sum())} of its {len(labels)} input channels are blocked"
    table = scales.analysis.variables.reasons
    if label in table:
        return _stopped(what, chains, table[label], start, use.site.node, exact=label)
    reason = table.get(int(scales.solution.reason[label]))
    way = chains.back(start)
    first = Chain("what this linear reads", chains.steps([*way, use.site.node], use.site.node, blocked=True))
    if reason is None:
        return Answer(what, (first,), (NO_SOURCE,))
    return _elsewhere(what, chains, reason, first, way)


def _stopped(
    what: str, chains: Chains, reason: Reason, start: fx.Node | None, reader: fx.Node, exact: int | None = None
) -> Answer:
    """Blocked by an operator between the source and the linear: the way there, and what fed the blocking one."""
    blocker = chains.at(reason)
    note = f"blocked by {qualified(reason.operator)}{f' at {reason.at}' if reason.at else ''}: {reason.text}"
    if blocker is None:
        return Answer(what, (), (note,))
    way = chains.back(start, until=blocker, exact=exact)
    before = chains.into(blocker)
    return Answer(
        what,
        (
            Chain(
                "from the source to what blocks, and on to this linear",
                chains.steps([*before, *way, reader], reader, (blocker, reason)),
            ),
        ),
        (note,),
    )


def _elsewhere(what: str, chains: Chains, reason: Reason, first: Chain, way: Sequence[fx.Node]) -> Answer:
    """What the linear reads is fixed by another reader of the same channels."""
    blocker = chains.at(reason)
    place = f"{qualified(reason.operator)}{f' at {reason.at}' if reason.at else ''}"
    note = f"the same channels are needed by {place}, which blocks: {reason.text}"
    if blocker is None:
        return Answer(what, (first,), (note,))
    other = chains.back_to(blocker, way[0] if way else None)
    return Answer(
        what,
        (
            first,
            Chain(
                "the same channels on their way to what blocks",
                chains.steps([*other, blocker], None, (blocker, reason)),
            ),
        ),
        (note,),
    )


def _input(node: fx.Node) -> fx.Node | None:
    """The activation that a product reads."""
    return next((argument for argument in node.all_input_nodes if argument.op == "call_function"), None)


# --- rotation ---------------------------------------------------------------------------------------------------------


def _rotation(analysis: Analysis, linear: Linear, use: Use) -> Answer:
    rotations, node = analysis.rotations, use.site.node
    start = _input(node)
    notes = _outputs(analysis, linear)
    fits = [online for online in analysis.findings.online if online.path == linear.path]
    notes += [
        f"an online rotation fits ({o.kind}): a Hadamard matrix of size {o.size}, computed while the model runs"
        for o in fits
    ]
    value = rotations.interpreter.values.get(start) if start is not None else None
    for space in rotations.spaces:
        if any(
            reader.path == linear.weight and reader.dim == linear.in_dim
            for read in space.reads
            for reader in read.readers
        ):
            component = _component(analysis, value)
            title = "from the nearest writer to this linear"
            blocks = f"{space.blocks} blocks of {space.size}" if space.blocks > 1 else f"{space.size} channels"
            verdict = f"yes, its input is the space '{space.name}' ({space.kind}, {blocks})"
            if component is None:
                return Answer(verdict, (), tuple(notes))
            chains = rotation_chains(rotations, component)
            return Answer(
                verdict, (Chain(title, chains.steps([*chains.back(start), node], reader=node)),), tuple(notes)
            )
    component = _component(analysis, value)
    if component is None:
        chains = rotation_chains(rotations, -1)
        blocker = chains.end(start)
        reason = None if blocker is None else chains.reason(blocker)
        if reason is None:
            return Answer("no", (), ("no rotation in the weights reaches it", *notes))
        answer = _stopped("no, its input is not a vector that weights alone could rotate", chains, reason, start, node)
    else:
        chains = rotation_chains(rotations, component)
        label = int(np.flatnonzero(rotations.solution.component == component)[0])
        reason = rotations.analysis.variables.reasons.get(int(rotations.solution.reason[label]))
        way = chains.back(start)
        if reason is None:
            assert isinstance(value, Vector)
            return _split(chains, rotations, value, [*way, node], notes)
        first = Chain("what this linear reads", chains.steps([*way, node], node, blocked=True))
        answer = _elsewhere("no", chains, reason, first, way)
    answer = _with_first_cause(answer, chains, None if reason is None else chains.at(reason))
    return Answer(answer.verdict, answer.chains, (*answer.notes, *notes))


def _with_first_cause(answer: Answer, chains: Chains, blocker: fx.Node | None) -> Answer:
    """What blocks may do so because of what was blocked before, perhaps many layers before: where that began."""
    cause = None if blocker is None else chains.first(blocker)
    reason = None if cause is None or cause is blocker else chains.reason(cause)
    if cause is None or reason is None:
        return answer
    note = f"the first cause is {qualified(reason.operator)} at {reason.at or 'the model'}, which blocks: {reason.text}"
    steps = chains.steps([*chains.into(cause), cause], None, (cause, reason))
    return Answer(answer.verdict, (*answer.chains, Chain("the first cause", steps)), (*answer.notes, note))


def _split(chains: Chains, rotations: Rotations, value: Vector, way: Sequence[fx.Node], notes: Sequence[str]) -> Answer:
    """Nothing fixes the channels, and yet no two of them may be mixed."""
    mine = rotations.solution.component[np.unique(value.coordinates.numpy())]
    for split in rotations.analysis.splits:
        here = np.isin(rotations.solution.component[split.labels], mine)
        if len(np.unique(split.keys[here])) > 1 and (blocker := chains.at(split.reason)) in way:
            assert blocker is not None
            steps = chains.steps(way, way[-1], (blocker, split.reason))
            note = f"blocked by {qualified(split.reason.operator)} at {split.reason.at}: {split.reason.text}"
            return Answer("no", (Chain("from the nearest writer to this linear", steps),), (note, *notes))
    return Answer(
        "no",
        (Chain("what this linear reads", chains.steps(way, way[-1], blocked=True)),),
        ("its channels cannot be mixed with one another", *notes),
    )


def _component(analysis: Analysis, value: object) -> int | None:
    """The component of a channel of a vector, a blocked one if there is one; None for what is no vector."""
    if not isinstance(value, Vector):
        return None
    solution = analysis.rotations.solution
    labels = np.unique(value.coordinates.numpy())
    labels = labels[labels > 1]
    if not len(labels):
        return None
    fixed = labels[solution.fixed[labels]]
    return int(solution.component[fixed[0] if len(fixed) else labels[0]])


def _outputs(analysis: Analysis, linear: Linear) -> list[str]:
    """What the linear's own outputs take part in."""
    return [
        f"its output is rotated with the space '{space.name}' ({space.kind})"
        for space in analysis.rotations.spaces
        if any(writer.path == linear.weight and writer.dim != linear.in_dim for writer in space.writers)
    ]
