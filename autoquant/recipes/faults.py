"""Why a set of modules that a mapping takes is no pair: readers that it forgets, readers that are none, operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autoquant.config.format import Config, SmoothingGroup, SmoothingKind
from autoquant.config.layers import fill, layer_numbers
from autoquant.config.slots import channels_of
from autoquant.library_patches import pytree
from autoquant.recipes.experts import stacked
from autoquant.recipes.matching import MatchedPair

_SAME_CHANNELS = frozenset(
    (
        *("view", "reshape", "transpose", "permute", "flatten", "unflatten", "unsqueeze", "squeeze", "expand"),
        *("contiguous", "clone", "to", "float", "double", "type", "type_as", "dropout"),
    )
)
"""Functions of torch whose result is what they are given, differently laid out or cast."""


@dataclass(frozen=True, slots=True)
class GroupModules:
    """A smoothing group in one layer: the modules that make its channels, and those that read them."""

    group: SmoothingGroup
    layer: int
    sources: frozenset[str]
    targets: frozenset[str]


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one set. ``missing``: the readers it forgets, where nothing else is wrong."""

    pair: MatchedPair
    why: str
    missing: tuple[str, ...] = ()


def groups_of(config: Config) -> list[GroupModules]:
    """The groups of each layer, but those of queries and keys."""
    found = []
    for group in config.smoothing.groups:
        if group.kind is SmoothingKind.QUERY_KEY:
            continue
        for layer in layer_numbers(group.layers) if group.layers else (0,):
            sides = [
                frozenset(member_of(fill(slot.path, layer)) for slot in side) for side in (group.sources, group.targets)
            ]
            found.append(GroupModules(group, layer, sides[0], sides[1]))
    return found


def member_of(path: str) -> str:
    """The module of a parameter that tools name; a stacked parameter itself."""
    head, _, leaf = path.rpartition(".")
    return head if leaf in ("weight", "bias") else path


def fault_of(
    pair: MatchedPair,
    config: Config,
    groups: Sequence[GroupModules],
    module: nn.Module,
    run: Callable[[nn.Module], object],
    offsets: frozenset[str] = frozenset(),
) -> Fault:
    """What is wrong with a set that changes what the model computes; ``run`` calls the model.

    ``offsets``: classes of norms of which the tool knows that the gain is 1 + weight.
    """
    of_source = next((one for one in groups if {pair.smooth, stacked(pair.smooth)} & one.sources), None)
    if of_source is None:
        return Fault(pair, _no_source(pair, config, groups, module, run))
    if (of_expert := _of_expert(pair, of_source)) is not None:
        return Fault(pair, of_expert)
    taken = {*pair.balance} | {stacked(name) for name in pair.balance}
    extra = sorted(
        name for name in pair.balance if name not in of_source.targets and stacked(name) not in of_source.targets
    )
    if extra:
        return Fault(pair, f"'{extra[0]}' does not read what '{pair.smooth}' makes{_reads(extra[0], groups)}")
    missing = tuple(sorted(name for name in of_source.targets if name not in taken))
    if missing:
        return Fault(pair, f"forgets the reader {', '.join(map(repr, missing))}", missing)
    others = sorted(of_source.sources - {pair.smooth, stacked(pair.smooth)})
    if others:
        return Fault(pair, f"forgets '{others[0]}', which makes the same channels")
    if (tie := _tie(pair, config)) is not None:
        return Fault(pair, tie)
    offset = any(slot.offset for slot in of_source.group.sources)
    if offset and type(module.get_submodule(pair.smooth)).__name__ not in offsets:
        return Fault(pair, f"the gain of '{pair.smooth}' is 1 + weight, which the tool does not know of its class")
    return Fault(pair, f"the channels of '{pair.smooth}' are read in another order, or some of them only")


def _of_expert(pair: MatchedPair, of_source: GroupModules) -> str | None:
    """What is wrong with an expert's linear that is scaled: its rows carry no scale, or another expert reads."""
    held = stacked(pair.smooth)
    if held == pair.smooth:
        return None
    head, _, leaf = pair.smooth.rpartition(".")
    slot = next(slot for slot in of_source.group.sources if fill(slot.path, of_source.layer) == held)
    channels = channels_of(slot).reshape(slot.stack or 1, -1)[0]
    half = len(channels) // 2
    rows = {"gate_proj": channels[:half], "up_proj": channels[half:]}.get(leaf, channels)
    if not (rows >= 0).any():
        return f"what '{pair.smooth}' makes takes no scale: of '{held}' the other rows do"
    other = next((name for name in pair.balance if name.rpartition(".")[0] != head and stacked(name) != name), None)
    return None if other is None else f"'{other}' does not read what '{pair.smooth}' makes: it is another expert's"


def _tie(pair: MatchedPair, config: Config) -> str | None:
    """Which weight of a set is another one too, that is scaled with it."""
    weights = [f"{name}.weight" for name in (*pair.balance, pair.smooth)]
    for names in config.model.tied:
        for weight in (weight for weight in weights if weight in names):
            other = next(name for name in names if name != weight)
            return f"'{weight}' is tied with '{other}', which is scaled too"
    return None


def _no_source(
    pair: MatchedPair,
    config: Config,
    groups: Sequence[GroupModules],
    module: nn.Module,
    run: Callable[[nn.Module], object],
) -> str:
    others = [use for use in uses_of(module, pair.smooth, run) if use.module not in pair.balance]
    into = f": it goes into {others[0]}" if others else ""
    reads = _reads(pair.balance[0], groups, "; ", quote=True) or _blocked(pair, config)
    return f"'{pair.smooth}' is the source of no group{into}{reads}"


def _blocked(pair: MatchedPair, config: Config) -> str:
    """Why what the readers read can take no scale, as a clause; nothing where the analysis does not say."""
    for entry in (entry for entry in config.blocked if entry.what == "smoothing"):
        for layer in layer_numbers(entry.layers) if entry.layers else (0,):
            path = fill(entry.path, layer)
            if path in pair.balance:
                blocks = f"{entry.operator} at '{fill(entry.at, layer)}': {entry.reason}"
                return f"; what '{path}' reads takes no scale: {blocks}"
    return ""


def _reads(name: str, groups: Sequence[GroupModules], before: str = ": it ", quote: bool = False) -> str:
    """Which module makes what ``name`` reads, as a clause; nothing where no group says so."""
    of_target = next((one for one in groups if name in one.targets or stacked(name) in one.targets), None)
    subject = f"'{name}' " if quote else ""
    return "" if of_target is None else f"{before}{subject}reads '{min(of_target.sources)}'"


@dataclass(frozen=True, slots=True)
class Use:
    """A function of torch that takes what a module makes, called by ``module``, which is of class ``kind``."""

    function: str
    module: str
    kind: str

    def __str__(self) -> str:
        return f"{self.function} at '{self.module}' ({self.kind})"


def uses_of(module: nn.Module, name: str, run: Callable[[nn.Module], object]) -> list[Use]:
    """What takes the output of the part ``name`` when ``run`` calls ``module``, each once, in its order."""
    seen = _Uses(module, name)
    try:
        with seen:
            run(module)
    finally:
        for handle in seen.handles:
            handle.remove()
    return list(seen.found)


class _Uses(TorchFunctionMode):
    """Keeps what the part makes, and notes every function that is given it."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self.within: list[tuple[str, nn.Module]] = []
        self.found: dict[Use, None] = {}
        self.handles = [handle for path, part in module.named_modules() for handle in self._watch(path, part, name)]

    def _watch(self, path: str, part: nn.Module, name: str) -> Iterator[Any]:
        yield part.register_forward_pre_hook(lambda *_: self.within.append((path, part)))
        yield part.register_forward_hook(lambda _, __, output: self._leave(output if path == name else None))

    def _leave(self, output: object) -> None:
        self.within.pop()
        self.kept += [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(leaf is kept for leaf in given for kept in self.kept):
            if name in _SAME_CHANNELS:
                self.kept += [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
            elif self.within and isinstance(result, Tensor) and not name.startswith("__get"):
                path, part = self.within[-1]
                self.found[Use(name.strip("_"), path, type(part).__name__)] = None
        return result
