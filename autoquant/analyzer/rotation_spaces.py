"""Rotatable spaces: from merged coordinates and their splits to writers, norms and readers."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from autoquant.analyzer.axes import Axis
from autoquant.analyzer.extents import EXTENTS
from autoquant.analyzer.index_maps import index_maps
from autoquant.analyzer.interpreter import Interpreter, Site, interpreted
from autoquant.analyzer.rotation_notes import Read, Split
from autoquant.analyzer.rotation_state import RotationAnalysis, numbered
from autoquant.analyzer.rules import ROTATIONS
from autoquant.analyzer.shared_parameters import shared_names
from autoquant.analyzer.smoothing_groups import group_name, several_dimensions, slot_of
from autoquant.analyzer.variables import ZERO, Ints, Reason, Solution
from autoquant.capture.routes import Captured
from autoquant.config.format import Norm, Reader, Slot, Space, Writer, edited
from autoquant.config.format import Read as ConfigRead
from autoquant.config.layers import module_of
from autoquant.config.slots import channels_of

Lost = tuple[Ints, Reason]
"""Components that could be rotated as far as the equations go, and what the config cannot say of them."""


@dataclass(frozen=True, slots=True)
class Rotations:
    """The solved analysis of one capture."""

    analysis: RotationAnalysis
    interpreter: Interpreter
    solution: Solution
    blocks: Ints
    """Per component, a number of its block; -1 where it cannot be rotated."""
    spaces: tuple[Space, ...]
    lost: tuple[Lost, ...]
    """Spaces that are not written, though nothing ends them."""


def analyse_rotations(captured: Captured, extent: int = EXTENTS[0]) -> Rotations:
    """Find every vector space of the graph that an orthogonal matrix can be put on."""
    analysis = RotationAnalysis()
    interpreter = interpreted(captured, ROTATIONS.table, analysis, analysis.end, extent=extent)
    conflicts = [*_used_in_two_ways(analysis), *_twice_read(analysis), *_contested_gains(analysis)]
    for axes, reason in [*conflicts, *_used_without_gain(analysis)]:
        for family in axes:
            analysis.variables.fix(torch.from_numpy(analysis.axes.labels(family)), reason)
    _split_what_is_read_in_parts(analysis)
    keep = np.zeros(analysis.variables.count, dtype=np.bool_)
    solution = analysis.variables.solve(keep)
    if _fix_what_spaces_share(analysis, solution, shared_names(captured)):
        solution = analysis.variables.solve(keep)
    axes = analysis.axes.all()
    blocks, apart = _blocks(analysis, axes, solution)
    if _fix_copies_paired_otherwise(analysis, axes, solution, blocks):
        solution = analysis.variables.solve(keep)
        blocks, apart = _blocks(analysis, axes, solution)
    spaces, lost = _spaces(analysis, axes, solution, blocks)
    return Rotations(analysis, interpreter, solution, blocks, spaces, (*apart, *lost))


def _split_what_is_read_in_parts(analysis: RotationAnalysis) -> None:
    """Columns of one weight that several operators read, each some of them, are not mixed with those of others."""
    parts: dict[str, dict[bytes, tuple[Ints, Reason]]] = {}
    for read in analysis.reads:
        if read.columns is not None and not analysis.axes.used_once(read.weight):
            labels = np.unique(read.columns.numpy())
            reason = read.site.because("parts of it are read by themselves")
            parts.setdefault(read.weight, {})[labels.tobytes()] = (labels[labels != ZERO], reason)
    for several in parts.values():
        for labels, reason in several.values() if len(several) > 1 else ():
            analysis.splits.append(Split(labels, np.ones(len(labels), dtype=np.int64), reason))


def _fix_what_spaces_share(analysis: RotationAnalysis, solution: Solution, tied: Collection[str]) -> bool:
    """End the spaces whose norms cannot be folded although each reader alone would allow it; True if there were any.

    Writers may be centred only where every reader subtracts the mean, and nothing depends on it before. A gain may be
    folded only where all that is behind it reads one and the same space, and no other norm holds it.
    """
    means = _touched(solution, [s.labels for s in analysis.splits if s.centre])
    spaces: dict[str, set[tuple[int, ...]]] = {}
    reads = []
    for family in analysis.axes.all():
        every = analysis.axes.labels(family)
        for read in _reads(analysis, family):
            labels = np.intersect1d(every, read.columns) if read.in_part and read.columns is not None else every
            labels = labels[~solution.fixed[labels]]
            components = tuple(np.unique(solution.component[labels]).tolist())
            if len(labels):
                reads.append((read, labels, components))
            for name in (read.gain.weight, read.gain.bias) if read.gain is not None else ():
                if name is not None:
                    spaces.setdefault(name, set()).add(components)
    found, ended = False, set[int]()
    for read, labels, components in reads:
        text = None
        layer = read.behind or (read.gain is not None and read.gain.kind == "layer")  # a LayerScale goes before
        if not layer and np.isin(components, means).any():
            text = "its mean is subtracted for some of its readers only"
        if text is None and np.isin(components, means).any() and _writes_too(analysis, read):
            text = f"{read.weight} is written too, and could not be centred for that without being read otherwise"
        for name in (read.gain.weight, read.gain.bias) if read.gain is not None else ():
            if text is None and name in tied:
                text = f"{name} is shared with another norm"
            if text is None and len(spaces.get(name or "", ())) > 1:
                text = f"{name} is applied to other vectors too"
        if text is not None:
            analysis.variables.fix(torch.from_numpy(labels), read.site.because(text))
            ended.update(components)
            found = True
    means = np.setdiff1d(means, list(ended))
    for split in analysis.splits:
        labels = split.labels[~solution.fixed[split.labels]]
        if split.length and np.isin(solution.component[labels], means).any():
            reason = replace(split.reason, text="its length is taken before its mean is subtracted")
            analysis.variables.fix(torch.from_numpy(labels), reason)
            found = True
    return found


def _writes_too(analysis: RotationAnalysis, read: Read) -> bool:
    """True if something else than reading is done with a weight: a table or a transposed one may write the same space.

    It is in the config once, as a reader, and readers are not centred.
    """
    own = {r.site.order for r in analysis.reads if (r.weight, r.dim) == (read.weight, read.dim)}
    return not read.behind and bool(analysis.axes.used_by(read.weight) - own)


def _fix_copies_paired_otherwise(
    analysis: RotationAnalysis, axes: Sequence[Axis], solution: Solution, blocks: Ints
) -> bool:
    """End the blocks whose copies are not always the same; True if there were any.

    Where several channels have one coordinate, as in two halves that are added, a writer or reader rotates the first
    channels of all coordinates together, then the second ones, and so on. Those have to be one vector: wherever a
    channel lies in any order, its company must be the same.
    """
    rows = [
        (None, labels) for f in axes if f.role != "column" for labels in analysis.axes.labels(f).reshape(_stack(f), -1)
    ]
    orders = [*rows, *((site, labels) for site, found in analysis.arranged for labels in found.numpy())]
    company = np.zeros(len(solution.component), dtype=np.uint64)
    met: list[tuple[Site | None, Ints, npt.NDArray[np.uint64]]] = []
    several = np.zeros(int(blocks.max(initial=0)) + 1, dtype=np.bool_)
    for site, labels in orders:
        labels = labels[(labels != ZERO) & (blocks[solution.component[labels]] >= 0)]
        component = solution.component[labels]
        nth = _occurrence(component)
        several[blocks[component[nth > 0]]] = True
        _, group = np.unique(blocks[component] * (len(labels) + 1) + nth, return_inverse=True)
        sums = np.zeros(len(labels), dtype=np.uint64)
        with np.errstate(over="ignore"):
            np.add.at(sums, group, numbered(labels))
        met.append((site, labels, sums[group]))
    found = False
    for site, labels, sums in met:
        here = several[blocks[solution.component[labels]]]
        labels, sums = labels[here], sums[here]
        new = company[labels] == 0
        company[labels[new]] = sums[new]
        other = company[labels] != sums
        if other.any():
            assert site is not None  # each channel has one place in one weight
            reason = site.because("copies of its channels lie in different orders")
            wrong = np.isin(blocks[solution.component], blocks[solution.component[labels[other]]])
            analysis.variables.fix(torch.from_numpy(np.flatnonzero(wrong)), reason)
            found = True
    return found


def _stack(family: Axis) -> int:
    """Number of matrices that a family's positions go through, one after the other."""
    return family.count // family.full_shape[family.dim] if family.stack and not family.keyed else 1


def _occurrence(values: Ints) -> Ints:
    """For each entry how many equal ones are before it."""
    order = np.argsort(values, kind="stable")
    found = values[order]
    nth = np.empty(len(values), dtype=np.int64)
    nth[order] = np.arange(len(values)) - np.searchsorted(found, found)
    return nth


def _used_in_two_ways(analysis: RotationAnalysis) -> list[tuple[list[Axis], Reason]]:
    """Parameters of which one use stands in the way of another.

    A table that is a weight too (a tied head) is rotated along its channels for both, as long as no norm goes into it.
    """
    found = []
    for families, reason in analysis.axes.conflicts():
        uses = analysis.axes.uses(families[0].param) if families else {}
        if uses.keys() == {"a table", "a weight"} and families[0].param not in analysis.folded:
            families = [family for family in families if family.dim == 0]  # each row of a token: none may be mixed
        found.append((families, reason))
    return found


def _contested_gains(analysis: RotationAnalysis) -> list[tuple[list[Axis], Reason]]:
    """A norm weight that is used elsewhere too must stay what it is: it cannot be folded into its readers."""
    contested = analysis.axes.contested()
    found = []
    for family in analysis.axes.all():
        norm = analysis.folded.get(family.param)
        if norm is not None and family.role == "table":
            found += [([family], contested[name]) for name in (norm.weight, norm.bias) if name in contested]
            if analysis.lookups[family.param] > 1:
                here = Reason("a norm is applied to one of its two uses", "aten.embedding", "", family.order)
                found.append(([family], here))
        for read in _reads(analysis, family):
            names = (read.gain.weight, read.gain.bias) if read.gain else ()
            found += [([family], contested[name]) for name in names if name in contested]
    return found


def _twice_read(analysis: RotationAnalysis) -> list[tuple[list[Axis], Reason]]:
    """A weight that is read behind two different norms can hold the gain of neither."""
    found = []
    for family in analysis.axes.all():
        reads = _reads(analysis, family)
        for read, other in itertools.combinations(reads, 2):
            if _gain_key(read.gain) != _gain_key(other.gain) and not _apart(read, other):
                found.append(([family], reads[-1].site.because("the weight is used behind different norms")))
                break
    return found


def _gain_key(gain: Norm | None) -> tuple[str | None, str | None, int] | None:
    return None if gain is None else (gain.weight, gain.bias, gain.offset)


def _apart(read: Read, other: Read) -> bool:
    """True if different columns read, each those that lie beside the other's in one tensor."""
    if not (read.in_part and other.in_part) or read.columns is None or other.columns is None:
        return False
    return not bool(np.isin(read.columns, other.columns).any())


def _used_without_gain(analysis: RotationAnalysis) -> list[tuple[list[Axis], Reason]]:
    """A weight that is used elsewhere too cannot hold a gain that is applied behind it here, nor one that writes
    along the same dimension one that is applied before it.
    """
    found = []
    for family in analysis.axes.all():
        reads = _reads(analysis, family)
        others = analysis.axes.used_by(family.param) - {read.site.order for read in reads} if reads else frozenset()
        for read in reads:
            gain = read.gain
            if gain is None or not (gain.weight or gain.bias):
                continue
            if (not analysis.axes.used_once(family.param)) if read.behind else others:
                reason = read.site.because(
                    f"{gain.weight or gain.bias} cannot be folded into {family.param}, used elsewhere too"
                )
                found.append(([family], reason))
    return found


def _takes(read: Read, labels: Ints) -> bool:
    """True if it reads any of some channels of its weight: other rows of the same matrix may write."""
    return read.columns is None or bool(np.isin(labels, read.columns.numpy()).any())


def _reads(analysis: RotationAnalysis, family: Axis) -> list[Read]:
    return [read for read in analysis.reads if (read.weight, read.dim) == (family.param, family.dim)]


def _blocks(analysis: RotationAnalysis, axes: Sequence[Axis], solution: Solution) -> tuple[Ints, list[Lost]]:
    """Components that see the same parameters and the same splits may be mixed: number those sets.

    Also those that end here, since they cannot be centred together.
    """
    count = int(solution.component.max()) + 1
    code, ranks = np.zeros(count, dtype=np.uint64), _ranks(analysis, axes, solution)
    salts = np.random.default_rng(0).integers(1, 2**63, size=len(axes) + len(analysis.splits), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for family, salt in zip(axes, salts, strict=False):
            members = np.bincount(solution.component[analysis.axes.labels(family)], minlength=count).astype(np.uint64)
            code += (members * salt) ^ (members * members * (salt >> np.uint64(7)))
        for split, salt in zip(analysis.splits, salts[len(axes) :], strict=True):
            keys = np.zeros(count, dtype=np.uint64)
            np.add.at(keys, solution.component[split.labels], numbered(ranks[split.labels] + split.keys))
            code += (keys ^ (keys >> np.uint64(29))) * salt
    fixed = np.zeros(count, dtype=np.bool_)
    fixed[solution.component[solution.fixed]] = True
    _, blocks = np.unique(code, return_inverse=True)
    blocks = blocks.astype(np.int64)
    blocks[fixed] = -1
    lost: list[Lost] = []
    for split in analysis.splits:
        if split.centre:  # writers are centred over all that the mean is taken of: it must be one block
            touched = np.unique(solution.component[split.labels])
            for block in np.unique(blocks[touched]):
                whole = np.flatnonzero(blocks == block)
                if block != -1 and np.isin(touched, whole, invert=True).any() and len(np.unique(blocks[touched])) > 1:
                    blocks[whole] = -1
                    text = "its mean is taken over channels that could only be rotated apart"
                    lost.append((whole, replace(split.reason, text=text)))
    return blocks, lost


def _ranks(analysis: RotationAnalysis, axes: Sequence[Axis], solution: Solution) -> Ints:
    """For each label a number for its weight, its matrix and how many of its component are before it there.

    Of copies of a channel the first ones are rotated together, then the second ones: the n-th ones must see the same
    splits, and not all of them in any order.
    """
    ranks = np.zeros(len(solution.component), dtype=np.int64)
    for number, family in enumerate(axes):
        labels = analysis.axes.labels(family)
        row = np.arange(len(labels)) // max(len(labels) // _stack(family), 1)
        nth = _occurrence(row * len(ranks) + solution.component[labels])
        ranks[labels] = numbered(nth + len(labels) * (row + (number << 24))).view(np.int64)
    return ranks


def _spaces(
    analysis: RotationAnalysis, axes: Sequence[Axis], solution: Solution, blocks: Ints
) -> tuple[tuple[Space, ...], list[Lost]]:
    ids = np.concatenate([np.zeros(0, np.int64), *(analysis.axes.labels(f) for f in axes)])
    which = np.repeat(np.arange(len(axes)), [f.count for f in axes])
    component = solution.component[ids]
    block = blocks[component]
    held = np.unique(block * (len(blocks) + 1) + component) // (len(blocks) + 1)
    several = np.unique(held, return_counts=True)
    live = (block >= 0) & np.isin(block, several[0][several[1] > 1])  # a block of one coordinate cannot rotate
    ids, which, component, block = ids[live], which[live], component[live], block[live]
    by_signature: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    order = np.argsort(block, kind="stable")
    edges = np.flatnonzero(np.diff(block[order])) + 1
    for part in np.split(order, edges):
        if len(part):
            signature = len(np.unique(component[part])), tuple(np.unique(which[part]).tolist())
            by_signature.setdefault(signature, []).append(int(block[part[0]]))
    spaces, lost = [], list[Lost]()
    values = _touched(solution, [np.unique(labels.numpy()) for _, labels in analysis.values])
    means = _touched(solution, [split.labels for split in analysis.splits if split.centre])
    for (size, members), numbers in sorted(by_signature.items(), key=lambda item: item[0][1]):
        chosen = np.isin(block, numbers)
        positions = ids[chosen], which[chosen], component[chosen], block[chosen]
        space = _space(
            analysis,
            axes,
            size,
            members,
            positions,
            is_value=bool(np.isin(positions[2], values).any()),
            centre=bool(np.isin(positions[2], means).any()),
        )
        if isinstance(space, Reason):
            lost.append((np.unique(positions[2]), space))
        else:
            spaces.append(space)
    return named_by_start(spaces), lost


def _touched(solution: Solution, labels: Sequence[Ints]) -> Ints:
    """The components of any of the labels."""
    return np.unique(solution.component[np.concatenate([np.zeros(0, np.int64), *labels])])


def named_by_start(spaces: Sequence[Space]) -> tuple[Space, ...]:
    """The residual stream goes by that name; where there are several (towers, tables apart), each by what starts it."""
    if sum(space.kind == "R1" for space in spaces) < 2:
        return tuple(spaces)
    told: list[Space] = []
    for space in spaces:
        name = space.name
        if space.kind == "R1":
            name = f"residual of {space.writers[0].path.removesuffix('.weight')}"
            same = sum(other.name.partition(" #")[0] == name for other in told)
            name += f" #{same + 1}" if same else ""
        told.append(edited(space, name=name))
    return tuple(told)


def _name(kind: str, writers: Sequence[Writer], reads: Collection[tuple[Norm | None, Sequence[Reader]]]) -> str:
    """The residual stream goes by that name; one of a tower, which no table starts, by what starts it."""
    start = module_of(writers[0].path)
    several = len({module_of(writer.path) for writer in writers}) > 1 and len(reads) > 1
    if kind == "other" and several and not any(part.isdecimal() for part in start.split(".")):  # not in a layer
        return f"residual of {start}"
    return "residual" if kind == "R1" else group_name(writers, [r for _, readers in reads for r in readers])


def _for_all(slot: Slot, shape: Sequence[int]) -> Slot:
    """A slot of which every stacked matrix is alike, as one of all of them: without a stack."""
    if slot.stack is None or slot.dim == 0 or slot.size != slot.stack * shape[slot.dim]:
        return slot
    channels = channels_of(slot).reshape(slot.stack, -1)
    if (channels != channels[:1]).any():
        return slot
    positions = np.flatnonzero(channels[0] >= 0)
    index = index_maps(positions, channels[0][positions], shape[slot.dim])
    return edited(slot, stack=None, size=shape[slot.dim], index=index)


def _cannot_hold(gain: Norm | None, whole: bool, sizes: Mapping[str, int], size: int, channels: int) -> str | None:
    """Why readers cannot take up a norm's gain or bias; ``whole``: they read all of its channels in their order."""
    if gain is None:
        return None
    if (gain.weight or gain.bias) and not whole:
        return f"{gain.weight or gain.bias} does not multiply these channels alone, each once and in their order"
    if sizes.get(gain.weight or "", size) not in (size, channels):
        return f"{gain.weight} is one gain for several parts, each of which is rotated by itself"
    return None


def _space(
    analysis: RotationAnalysis,
    axes: Sequence[Axis],
    size: int,
    members: tuple[int, ...],
    positions: tuple[Ints, Ints, Ints, Ints],
    *,
    is_value: bool,
    centre: bool,
) -> Space | Reason:
    """The config's form of a space, or why it has none."""
    ids, which, component, block = positions
    first = which == members[0]
    start = ids[first]
    rank_of_block = {b: i for i, b in enumerate(dict.fromkeys(block[first][np.argsort(start)].tolist()))}
    by_block: dict[int, dict[int, int]] = {b: {} for b in rank_of_block}
    for c, b in zip(
        component[first][np.argsort(start)].tolist(), block[first][np.argsort(start)].tolist(), strict=True
    ):
        by_block[b].setdefault(c, len(by_block[b]))
    channel = np.array(
        [rank_of_block[b] * size + by_block[b][c] for c, b in zip(component.tolist(), block.tolist(), strict=True)]
    )
    channels = size * len(rank_of_block)
    writers: list[Writer] = []
    both: list[tuple[Writer, Reader]] = []
    reads: dict[tuple[str, str | None, str | None, int] | None, tuple[Norm | None, list[Reader]]] = {}
    for index in members:
        family = axes[index]
        here = which == index
        slot = slot_of(family, ids[here] - family.start, channel[here], channels, False, 1)
        if slot is None:
            return Reason(several_dimensions(family), "", "", family.order)
        slot = _for_all(slot, family.full_shape)
        readers = [read for read in _reads(analysis, family) if _takes(read, ids[here])]
        if not readers:
            folded = analysis.folded.get(family.param)
            if folded is not None and slot.index is not None:
                text = f"{folded.weight or folded.bias} is folded into all of its channels, which are rotated in parts"
                return Reason(text, "embedding", "", family.order)
            writers.append(Writer(**slot.model_dump(), fold_norm=folded))
            continue
        apart = {_gain_key(read.gain): read for read in readers}
        for read in apart.values():
            mine = here & np.isin(ids, read.columns) if read.in_part and read.columns is not None else here
            part = (
                slot if mine is here else slot_of(family, ids[mine] - family.start, channel[mine], channels, False, 1)
            )
            assert part is not None, "a part of what lies along one dimension"
            gain, in_order = read.gain, channel[mine][np.argsort(ids[mine])]
            whole = part.index is None or (mine is not here and np.array_equal(in_order, np.arange(channels)))
            if problem := _cannot_hold(gain, whole, analysis.gain_sizes, size, channels):
                return read.site.because(problem)
            key = None if gain is None else (gain.kind, gain.weight, gain.bias, gain.offset)
            reader = Reader(**part.model_dump(), bias=read.bias)
            reads.setdefault(key, (gain, []))[1].append(reader)
            if key is None and _writes_too(analysis, read):
                both.append((Writer(**part.model_dump()), reader))
    if (
        not writers and both
    ):  # a table that is the head too is rotated once: listed as what writes where nothing else is
        writers, known = [writer for writer, _ in both], [reader for _, reader in both]
        reads[None] = (None, [reader for reader in reads[None][1] if reader not in known])
        reads = {key: read for key, read in reads.items() if read[1]}
    if not writers or not reads:
        return Reason("no weight reads it" if writers else "no weight writes it", "", "", axes[members[0]].order)
    kind = "R1" if any(axes[i].role == "table" for i in members) else "R2" if is_value else "other"
    return Space(
        name=_name(kind, writers, reads.values()),
        kind=kind,  # type: ignore[arg-type]  # one of the three literals
        size=size,
        blocks=len(rank_of_block),
        centre=centre,
        writers=tuple(writers),
        reads=tuple(ConfigRead(norm=norm, readers=tuple(readers)) for norm, readers in reads.values()),
    )
