"""Rotation spaces as other tools know them: modules that write, norms, and linears that read, all of them whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from autoquant.config.format import Config, Norm, Slot, Space
from autoquant.config.layers import layer_numbers
from autoquant.config.slots import channels_of
from autoquant.recipes.pairs import Refusal, is_whole

Layers = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NormRead:
    """A norm whose gain goes into linears; ``norm`` is None where they read the space itself."""

    norm: str | None
    linears: tuple[str, ...]
    layers: Layers


@dataclass(frozen=True, slots=True)
class WholeSpace:
    """Modules whose whole output, or an embedding's whole rows, are rotated, and those whose whole input is.

    ``writers``: module path, layers. ``size`` of a block, one for each head in R2.
    """

    name: str
    kind: str
    size: int
    writers: tuple[tuple[str, Layers], ...]
    reads: tuple[NormRead, ...]


def whole_spaces(config: Config) -> tuple[list[WholeSpace], list[Refusal]]:
    """The spaces of ``config`` that are in use, and those of them that have what other tools do not know."""
    found: list[WholeSpace] = []
    refused: list[Refusal] = []
    roles = {linear.weight: linear.role for linear in config.model.linears}
    for space in config.rotation.spaces:
        if not (config.rotation.enable if space.enable is None else space.enable):
            continue
        reason = next(_reasons(space, roles), None)
        if reason is not None:
            refused.append(Refusal(f"{space.kind} {space.name}", reason))
        else:
            found.append(_whole(space))
    refused += [
        Refusal(f"{online.kind} {online.path}", "an online rotation")
        for online in config.rotation.online
        if online.enable
    ]
    return found, refused


def _whole(space: Space) -> WholeSpace:
    def layers(own: str | None) -> Layers:
        text = own if own is not None else space.layers
        return () if text is None else layer_numbers(text)

    def norm(found: Norm | None) -> str | None:
        return None if found is None or found.weight is None else found.weight.removesuffix(".weight")

    return WholeSpace(
        space.name,
        space.kind,
        space.size,
        tuple((slot.path.removesuffix(".weight"), layers(slot.layers)) for slot in space.writers),
        tuple(
            NormRead(
                norm(read.norm), tuple(slot.path.removesuffix(".weight") for slot in read.readers), layers(read.layers)
            )
            for read in space.reads
        ),
    )


def _reasons(space: Space, roles: Mapping[str, str]) -> Iterator[str]:
    """What other tools do not know of a space."""
    if space.kind == "other":
        yield "a space of its own kind, neither the residual stream nor the values of heads"
    if space.centre:
        yield "a LayerNorm reads it: its writers have to be centred"
    for writer in space.writers:
        if writer.fold_norm is not None:
            yield f"a norm is folded into the table '{writer.path}'"
        if not writer.path.endswith(".weight"):
            yield f"'{writer.path}' is written too, and is rotated with it: a bias or a parameter of its own"
        yield from _slot_reasons(space, writer, roles)
    for read in space.reads:
        if read.norm is not None and read.norm.offset:
            yield f"the gain '{read.norm.weight}' is 1 + weight"
        if read.norm is not None and read.norm.bias is not None:
            yield f"the norm has a bias, '{read.norm.bias}'"
        for reader in read.readers:
            yield from _slot_reasons(space, reader, roles)
            if reader.dim != 1 or not reader.path.endswith(".weight"):
                yield f"'{reader.path}' is not the weight of a linear, or is transposed"


def _slot_reasons(space: Space, slot: Slot, roles: Mapping[str, str]) -> Iterator[str]:
    if slot.stack is not None:
        yield f"'{slot.path}' holds stacked experts"
    elif roles.get(slot.path) == "router":
        yield f"'{slot.path}' is a router"
    elif space.blocks == 1 and space.kind != "R2" and not is_whole(slot, space.size):
        yield f"'{slot.path}' has an index map: some of its rows or columns only"
    elif space.kind == "R2" and not _is_by_head(slot, space):
        yield f"'{slot.path}' has an index map that is not head after head"


def _is_by_head(slot: Slot, space: Space) -> bool:
    """True if each run of ``size`` positions is one block in order: the same rotation may then turn all of them."""
    if slot.size % space.size:
        return False
    channels = channels_of(slot)
    return bool(np.array_equal(channels % space.size, np.arange(slot.size) % space.size)) and bool(
        (channels >= 0).all()
    )


def norms_of(spaces: Iterable[WholeSpace]) -> list[NormRead]:
    """The reads behind a norm, each once."""
    return list(dict.fromkeys(read for space in spaces for read in space.reads if read.norm is not None))
