"""Hand-made mappings judged: applied with random scales to a small float64 model, the logits compared.

A mapping is applied as its tool applies it: the gain, or the rows and the bias of a linear, are divided by a scale a
channel, the columns of all that it takes for readers are multiplied by it. The groups of the analysis say which reader
a wrong one has forgotten, or which operator stands in its way.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import torch
from torch import Tensor, nn

from autoquant.certificate.certify import small_config
from autoquant.certificate.experts import choices_of
from autoquant.certificate.prove import TOLERANCES, dtype_of
from autoquant.certificate.runs import Reference, departure, further_runs, refer
from autoquant.config.format import Config
from autoquant.errors import AutoQuantError
from autoquant.models.reduce import float64_throughout, runs_in_float64, small, widened
from autoquant.models.source import LoadedModel, ModelSource
from autoquant.recipes.experts import expert_weight, modules_of, stacked
from autoquant.recipes.faults import Fault, GroupModules, fault_of, groups_of
from autoquant.recipes.matching import MatchedPair, WrittenMapping, matched_pairs
from autoquant.recipes.offsets import offset_norms

Progress = Callable[[str], None]


class Verdict(StrEnum):
    """What becomes of a mapping."""

    RIGHT = "right"
    INCOMPLETE = "incomplete"
    WRONG = "wrong"
    STOPS = "stops"
    SKIPPED = "skipped"
    NOT_MATCHED = "not matched"


@dataclass(frozen=True, slots=True)
class Judged:
    """One mapping: ``change`` of the logits (relative; None where nothing was applied), and ``why`` in words.

    ``faults``: of the sets that change the logits, one of those that are alike.
    """

    mapping: WrittenMapping
    verdict: Verdict
    sets: int = 0
    change: float | None = None
    why: str = ""
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True, slots=True)
class Audit:
    """All mappings of a recipe, and the groups of the model that none of them uses."""

    model: str
    tool: str
    judged: tuple[Judged, ...]
    idle: tuple[str, ...] = field(default=())

    @property
    def verdict(self) -> Verdict:
        """The worst of the mappings'; what the tool leaves out is no fault beside what is right."""
        worst = (Verdict.WRONG, Verdict.INCOMPLETE, Verdict.STOPS, Verdict.NOT_MATCHED, Verdict.RIGHT, Verdict.SKIPPED)
        return min((one.verdict for one in self.judged), key=worst.index, default=Verdict.NOT_MATCHED)


@dataclass(frozen=True, slots=True)
class Bench:
    """A small model, its analysis, and what it returns: the same for each recipe that is put to it."""

    source: ModelSource
    loaded: LoadedModel
    config: Config
    reference: Reference
    widen: Callable[[], contextlib.AbstractContextManager[None]]


def bench_for(source: ModelSource, seed: int = 0, progress: Progress = lambda step: None) -> Bench:
    """A small model of ``source``, analysed and run. Raises AutoQuantError where that cannot be done."""
    progress(f"building a small {source.name}")
    loaded = small(source, seed, each=2)
    config = small_config(source, loaded)
    loaded = widened(loaded)
    widen = float64_throughout if runs_in_float64(loaded) else contextlib.nullcontext
    progress("running it")
    with widen():
        reference = refer(loaded, further_runs(loaded, choices_of(config), seed))
    return Bench(source, loaded, config, reference, widen)


def audit(bench: Bench, mappings: Sequence[WrittenMapping], tool: str, seed: int = 0) -> Audit:
    """Judge each of ``mappings`` alone, as ``tool`` applies it."""
    names = modules_of(bench.loaded.module)
    groups = groups_of(bench.config)
    judged, used = [], set()
    for mapping in mappings:
        try:
            pairs = matched_pairs(mapping, names)
        except AutoQuantError as error:
            judged.append(Judged(mapping, Verdict.STOPS, why=error.message))
            continue
        if not pairs:
            judged.append(Judged(mapping, Verdict.NOT_MATCHED, why="no module is taken"))
            continue
        judged.append(_judge(bench, mapping, pairs, tool, groups, seed))
        used |= {pair.smooth for pair in pairs}
    judged = _as_their_likes(judged)
    idle = dict.fromkeys(one.group.name for one in groups if not one.sources & used)
    return Audit(bench.source.name, tool, tuple(judged), tuple(idle))


def _as_their_likes(judged: Sequence[Judged]) -> list[Judged]:
    """Mappings of experts that the small model is without, judged as those that differ in a number alone."""
    alike = {_pattern(str(one.mapping)): one for one in judged if one.verdict is not Verdict.NOT_MATCHED}
    return [
        replace(
            alike[pattern], mapping=one.mapping, sets=0, why=f"as {alike[pattern].mapping}; the small model has fewer"
        )
        if one.verdict is Verdict.NOT_MATCHED and (pattern := _pattern(str(one.mapping))) in alike
        else one
        for one in judged
    ]


def _pattern(text: str) -> str:
    """The same for names that differ in the numbers of layers and experts alone."""
    return re.sub(r"\.\d+\.", ".#.", text)


def _judge(
    bench: Bench,
    mapping: WrittenMapping,
    pairs: Sequence[MatchedPair],
    tool: str,
    groups: Sequence[GroupModules],
    seed: int,
) -> Judged:
    module, whole = copy.deepcopy(bench.loaded.module), len(pairs)
    fused = tool == "quark" or mapping.modifier == "AWQModifier"

    def scale(changed: nn.Module, pair: MatchedPair) -> None:
        scale_(changed, pair, tool, seed, fused=fused)

    try:
        if mapping.modifier == "AWQModifier":
            pairs = [pair for pair in pairs if not _skipped(module, pair)]
            if not pairs:
                return Judged(mapping, Verdict.SKIPPED, whole, why="it leaves projections of grouped queries alone")
        for pair in pairs:
            scale(module, pair)
    except AutoQuantError as error:
        return Judged(mapping, Verdict.STOPS, len(pairs), why=error.message)
    with bench.widen():
        change = departure(module, bench.reference)
    if change <= TOLERANCES[dtype_of(module)]:
        return Judged(mapping, Verdict.RIGHT, len(pairs), change)
    faults = tuple(_faults(bench, pairs, groups, scale, offset_norms(tool)))
    verdict = Verdict.INCOMPLETE if faults and all(fault.missing for fault in faults) else Verdict.WRONG
    why = "; ".join(dict.fromkeys(fault.why for fault in faults)) or "each set alone holds, all of them together do not"
    return Judged(mapping, verdict, len(pairs), change, why, faults)


def _skipped(module: nn.Module, pair: MatchedPair) -> bool:
    """True if AWQModifier leaves a pair out: ``_check_layers_are_compatible`` in modifiers/transform/awq/base.py."""
    made = len(_parts(module, pair.smooth)[0])
    return any(
        (name.endswith(".o_proj") and pair.smooth.endswith(".v_proj") and made != read)
        or (name.endswith(".o_proj") and pair.smooth.endswith(".qkv_proj") and made != 3 * read)
        for name in pair.balance
        for read in [_parts(module, name)[0].shape[1]]
    )


def _faults(
    bench: Bench,
    pairs: Sequence[MatchedPair],
    groups: Sequence[GroupModules],
    scale: Callable[[nn.Module, MatchedPair], None],
    offsets: frozenset[str],
) -> Iterator[Fault]:
    """What is wrong with each set that changes the logits when it alone is scaled, one of those that are alike."""
    alike = {_pattern(str(pair)): pair for pair in reversed(pairs)}
    given = bench.reference.runs[0]
    for pair in reversed(alike.values()):
        module = copy.deepcopy(bench.loaded.module)
        scale(module, pair)
        with bench.widen():
            if departure(module, bench.reference) > TOLERANCES[dtype_of(module)]:
                yield fault_of(pair, bench.config, groups, bench.loaded.module, given, offsets)


@torch.no_grad()
def scale_(module: nn.Module, pair: MatchedPair, tool: str, seed: int, *, fused: bool = False) -> None:
    """Divide ``pair.smooth`` by random scales and multiply ``pair.balance`` by them, as ``tool`` does.

    ``fused``: of a packed projection with more rows the last are meant.

    Raises AutoQuantError where it would stop: no weight, or other sizes.
    """
    weight, bias = _parts(module, pair.smooth)
    columns = [_parts(module, name)[0] for name in pair.balance]
    for name, column in zip(pair.balance, columns, strict=True):
        if column.dim() != 2:
            raise AutoQuantError(f"'{name}' is no linear: it has no columns to scale")
    width = columns[0].shape[1]
    generator = torch.Generator().manual_seed(seed + len(pair.smooth))
    scales = torch.exp(torch.rand(width, generator=generator, dtype=torch.float64) * 2 - 1).to(weight.dtype)
    made = scales
    if tool == "quark" and weight.dim() == 2 and len(weight) < width and width % len(weight) == 0:
        made, scales = _repeated(module, scales, len(weight))
    if len(weight) != len(made) and not (fused and weight.dim() == 2 and len(weight) > len(made)):
        raise AutoQuantError(f"'{pair.smooth}' has {len(weight)} channels, '{pair.balance[0]}' reads {width}")
    for name, column in zip(pair.balance, columns, strict=True):
        if column.shape[1] != width:
            raise AutoQuantError(f"'{name}' reads {column.shape[1]} channels, '{pair.balance[0]}' {width}")
    kind = type(module.get_submodule(pair.smooth)).__name__ if weight.dim() == 1 else ""
    offset = 1.0 if kind in offset_norms(tool) else 0.0
    rows = weight[-len(made) :]
    rows.copy_((rows + offset) / made.view(-1, *[1] * (weight.dim() - 1)) - offset)
    if bias is not None:
        if len(bias) != len(made):
            raise AutoQuantError(f"the bias of '{pair.smooth}' has {len(bias)} channels, {len(made)} are scaled")
        bias.div_(made)
    for column in columns:
        column.mul_(scales.view(1, -1))


def _repeated(module: nn.Module, scales: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """The same scales for all query heads of a key/value head: ``[channels]`` and ``[queries]``."""
    config = getattr(module, "config", None)
    heads = getattr(getattr(config, "get_text_config", lambda: config)(), "num_attention_heads", None)
    if not heads:
        raise AutoQuantError("the number of heads is not known")
    size = len(scales) // heads
    made = scales.view(channels // size, -1, size)[:, :1]
    return made.reshape(-1), made.expand(-1, len(scales) // channels, -1).reshape(-1)


def _parts(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias of a module, a part of a stacked one for an expert. Raises AutoQuantError."""
    if stacked(name) != name:
        return expert_weight(module, name), None
    part = module.get_submodule(name)
    weight = getattr(part, "weight", None)
    if not isinstance(weight, Tensor):
        raise AutoQuantError(f"'{name}' has no weight to scale")
    bias = getattr(part, "bias", None)
    return weight, bias if isinstance(bias, Tensor) else None
