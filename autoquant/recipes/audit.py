"""Hand-made mappings judged: applied with random scales to a small float64 model, the logits compared.

A mapping is applied as its tool applies it: the gain, or the rows and the bias of a linear, are divided by a scale a
channel, the columns of all that it takes for readers are multiplied by it. The groups of the analysis say which reader
a wrong one has forgotten, or which operator stands in its way.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from importlib.resources import files

import torch
from torch import Tensor, nn

from autoquant.certificate.certify import small_config
from autoquant.certificate.experts import choices_of
from autoquant.certificate.prove import TOLERANCES, dtype_of
from autoquant.certificate.runs import Reference, departure, further_runs, refer
from autoquant.config.format import Config, SmoothingGroup, SmoothingKind
from autoquant.config.layers import fill, layer_numbers
from autoquant.errors import AutoQuantError
from autoquant.models.reduce import float64_throughout, runs_in_float64, small, widened
from autoquant.models.source import LoadedModel, ModelSource
from autoquant.recipes.matching import MatchedPair, WrittenMapping, matched_pairs

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
    """One mapping: ``change`` of the logits (relative; None where nothing was applied), and ``why`` in words."""

    mapping: WrittenMapping
    verdict: Verdict
    sets: int = 0
    change: float | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Audit:
    """All mappings of a recipe, and the groups of the model that none of them uses."""

    model: str
    tool: str
    judged: tuple[Judged, ...]
    idle: tuple[str, ...] = field(default=())

    @property
    def verdict(self) -> Verdict:
        """The worst of the mappings'."""
        worst = (Verdict.WRONG, Verdict.INCOMPLETE, Verdict.STOPS, Verdict.NOT_MATCHED, Verdict.SKIPPED, Verdict.RIGHT)
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
    groups = list(groups_of(bench.config))
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
    idle = dict.fromkeys(group.name for group, sources, _ in groups if not sources & used)
    return Audit(bench.source.name, tool, tuple(judged), tuple(idle))


def _judge(
    bench: Bench,
    mapping: WrittenMapping,
    pairs: Sequence[MatchedPair],
    tool: str,
    groups: Sequence[tuple[SmoothingGroup, set[str], set[str]]],
    seed: int,
) -> Judged:
    module, whole = copy.deepcopy(bench.loaded.module), len(pairs)
    try:
        if mapping.modifier == "AWQModifier":
            pairs = [pair for pair in pairs if not _skipped(module, pair)]
            if not pairs:
                return Judged(mapping, Verdict.SKIPPED, whole, why="it leaves projections of grouped queries alone")
        for pair in pairs:
            scale_(module, pair, tool, seed, fused=tool == "quark" or mapping.modifier == "AWQModifier")
    except AutoQuantError as error:
        return Judged(mapping, Verdict.STOPS, len(pairs), why=error.message)
    with bench.widen():
        change = departure(module, bench.reference)
    if change <= TOLERANCES[dtype_of(module)]:
        return Judged(mapping, Verdict.RIGHT, len(pairs), change)
    incomplete, why = _explain(bench.config, pairs[0], groups)
    return Judged(mapping, Verdict.INCOMPLETE if incomplete else Verdict.WRONG, len(pairs), change, why)


def _skipped(module: nn.Module, pair: MatchedPair) -> bool:
    """True if AWQModifier leaves a pair out: ``_check_layers_are_compatible`` in modifiers/transform/awq/base.py."""
    made = len(_parts(module, pair.smooth)[0])
    return any(
        (name.endswith(".o_proj") and pair.smooth.endswith(".v_proj") and made != read)
        or (name.endswith(".o_proj") and pair.smooth.endswith(".qkv_proj") and made != 3 * read)
        for name in pair.balance
        for read in [_parts(module, name)[0].shape[1]]
    )


def _explain(
    config: Config, pair: MatchedPair, groups: Sequence[tuple[SmoothingGroup, set[str], set[str]]]
) -> tuple[bool, str]:
    """Whether only readers are missing, and what is wrong with the first set of a mapping."""
    for _, sources, targets in groups:
        if pair.smooth in sources:
            taken = {name for name in pair.balance} | {_stacked(name) for name in pair.balance}
            missing = sorted(name for name in targets if name not in taken)
            extra = sorted(name for name in pair.balance if name not in targets and _stacked(name) not in targets)
            if extra:
                return False, f"'{extra[0]}' does not read what '{pair.smooth}' makes"
            if missing:
                return True, f"forgets the reader {', '.join(repr(name) for name in missing)}"
            others = sorted(sources - {pair.smooth})
            if others:
                return False, f"forgets '{others[0]}', which makes the same channels"
            return False, "the channels lie in another order, or the gain is 1 + weight"
    for entry in config.blocked:
        numbers = layer_numbers(entry.layers) if entry.layers else (0,)
        paths = {fill(entry.path, layer) for layer in numbers}
        if entry.what == "smoothing" and paths & {*pair.balance, pair.smooth}:
            return False, f"{entry.operator} at '{entry.at}': {entry.reason}"
    return False, f"'{pair.smooth}' is the source of no group: its channels are read in other ways too"


def _stacked(name: str) -> str:
    """The stacked parameter that holds an expert's linear: ``experts.3.up_proj`` is in ``experts.gate_up_proj``."""
    parts = name.split(".")
    for at, part in enumerate(parts[:-1]):
        if part.isdecimal() and parts[-1] in EXPERT_PARTS and parts[at - 1 : at] == ["experts"]:
            return ".".join([*parts[:at], EXPERT_PARTS[parts[-1]]])
    return name


EXPERT_PARTS = {"up_proj": "gate_up_proj", "gate_proj": "gate_up_proj", "down_proj": "down_proj"}
"""Where transformers 5 stacks what tools take apart into one linear an expert, in this order: rows of gate, then up."""


def groups_of(config: Config) -> Iterator[tuple[SmoothingGroup, set[str], set[str]]]:
    """The groups of each layer with the modules that make their channels and those that read them."""
    for group in config.smoothing.groups:
        if group.kind is SmoothingKind.QUERY_KEY:
            continue
        for layer in layer_numbers(group.layers) if group.layers else (0,):
            sides = [{_module(fill(slot.path, layer)) for slot in side} for side in (group.sources, group.targets)]
            yield group, sides[0], sides[1]


def _module(path: str) -> str:
    head, _, leaf = path.rpartition(".")
    return head if leaf in ("weight", "bias") else path


def modules_of(module: nn.Module) -> dict[str, str]:
    """The names of all modules in their order with their classes, experts taken apart as the tools do it."""
    found: dict[str, str] = {}
    for name, part in module.named_modules():
        found[name] = type(part).__name__
        stacks = [getattr(part, stacked, None) for stacked in EXPERT_PARTS.values()]
        if all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in stacks):
            for expert in range(len(part.down_proj)):
                found |= {f"{name}.{expert}.{leaf}": "Linear" for leaf in EXPERT_PARTS}
    return found


@torch.no_grad()
def scale_(module: nn.Module, pair: MatchedPair, tool: str, seed: int, *, fused: bool = False) -> None:
    """Divide ``pair.smooth`` by random scales and multiply ``pair.balance`` by them, as ``tool`` does.

    ``fused``: of a packed projection with more rows the last are meant.

    Raises AutoQuantError where it would stop: no weight, or other sizes.
    """
    weight, bias = _parts(module, pair.smooth)
    columns = [_parts(module, name)[0] for name in pair.balance]
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
    stacked = _stacked(name)
    if stacked != name:
        if getattr(module.get_submodule(stacked.rpartition(".")[0]), "is_transposed", False):
            raise AutoQuantError(f"'{stacked}' is transposed, and is not taken apart here")
        number, leaf = name.removeprefix(stacked.rpartition(".")[0] + ".").split(".")
        whole = module.get_parameter(stacked)[int(number)]
        return (whole if leaf == "down_proj" else whole.chunk(2)[leaf == "up_proj"]), None
    part = module.get_submodule(name)
    weight = getattr(part, "weight", None)
    if not isinstance(weight, Tensor):
        raise AutoQuantError(f"'{name}' has no weight to scale")
    bias = getattr(part, "bias", None)
    return weight, bias if isinstance(bias, Tensor) else None


@lru_cache(maxsize=1)
def _tools() -> Mapping[str, Mapping[str, object]]:
    content: dict[str, dict[str, object]] = json.loads(files("autoquant.recipes").joinpath("tools.json").read_text())
    return content


def offset_norms(tool: str) -> frozenset[str]:
    """Classes of norms of which ``tool`` knows that the gain is 1 + weight, at the version in tools.json."""
    names = _tools()[tool].get("offset_norms", [])
    assert isinstance(names, list)
    return frozenset(names)
