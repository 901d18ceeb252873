"""Findings as short lines of text: what a person reads in a snapshot, and what the tests of small graphs compare."""

from __future__ import annotations

from collections.abc import Iterator

from autoquant.analyzer.findings import Findings
from autoquant.config.format import IndexMap, Norm, Slot, SmoothingGroup, Space


def slot_text(slot: Slot) -> str:
    """``'qkv.weight.0[8..11]'``: parameter, dimension, positions; then power, stack and offset where they matter.

    ``[0:2x4/8,1>0,1]`` is a block of shape 2 x 4 from position 0 with strides 8 and 1, whose channels step by 0 and 1.
    """
    text = f"{slot.path}.{slot.dim}"
    if slot.stack is not None:
        text += f"x{slot.stack}"
    if slot.index is not None:
        blocks = [_block_text(block) for block in slot.index]
        shown = blocks if len(blocks) <= 4 else [*blocks[:2], "..", f"{len(blocks)} blocks"]
        text += f"[{' '.join(shown)}]"
    if slot.power != 1:
        text += f"^{slot.power}"
    return f"1+{text}" if slot.offset else text


def _block_text(block: IndexMap) -> str:
    if block.stride == (1,) and block.channel_stride == (1,):
        last = block.start + block.shape[0] - 1
        positions = str(block.start) if last == block.start else f"{block.start}..{last}"
        return positions if block.channel_start in (0, block.start) else f"{positions}>{block.channel_start}"
    shape = "x".join(map(str, block.shape))
    strides, channels = (",".join(map(str, s)) for s in (block.stride, block.channel_stride))
    start = f"{block.channel_start}+" if block.channel_start else ""
    return f"{block.start}:{shape}/{strides}>{start}{channels}"


def group_lines(group: SmoothingGroup) -> Iterator[str]:
    where = f" layers {group.layers}" if group.layers is not None else ""
    yield f"{group.kind.value} {group.channels}{where}"
    yield f"    {' '.join(map(slot_text, group.sources))}"
    yield f" -> {' '.join(map(slot_text, group.targets))}"


def space_lines(space: Space) -> Iterator[str]:
    where = f" layers {space.layers}" if space.layers is not None else ""
    yield f"{space.kind} {space.blocks} x {space.size}{' centred' if space.centre else ''}{where}"
    for writer in space.writers:
        folded = f" after {_norm_text(writer.fold_norm)}" if writer.fold_norm is not None else ""
        own = f" layers {writer.layers}" if writer.layers is not None else ""
        yield f"    {slot_text(writer)}{folded}{own}"
    for read in space.reads:
        own = f" layers {read.layers}" if read.layers is not None else ""
        readers = " ".join(slot_text(r) + (" +bias" if r.bias is not None else "") for r in read.readers)
        yield f" -> {_norm_text(read.norm)}{readers}{own}"


def _norm_text(norm: Norm | None) -> str:
    if norm is None:
        return ""
    gain = f"1+{norm.weight}" if norm.offset else norm.weight
    return f"{norm.kind}({', '.join(n for n in (gain, norm.bias) if n is not None)}) "


def text(findings: Findings) -> str:
    """Everything but the list of linears."""
    lines = [line for group in findings.groups for line in group_lines(group)]
    lines += [line for space in findings.spaces for line in space_lines(space)]
    for online in findings.online:
        where = f" layers {online.layers}" if online.layers is not None else ""
        lines.append(f"online {online.kind} {online.size} {online.path}{where}")
    for blocked in findings.blocked:
        where = f" layers {blocked.layers}" if blocked.layers is not None else ""
        lines.append(f"no {blocked.what}: {blocked.path}{where}: {blocked.reason} ({blocked.operator} at {blocked.at})")
    lines += [f"no rule: {operator}" for operator in findings.unknown_operators]
    return "\n".join(lines)
