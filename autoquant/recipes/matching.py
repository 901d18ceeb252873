"""Which modules a mapping of another tool takes, found as that tool finds them.

LLM Compressor goes through the modules in their order and closes a set where a further match lies outside of what the
set has in common (``compressed_tensors.utils.match.match_modules_set``, compressed-tensors 0.19.0). Quark looks each
name up in every decoder layer, and where the first of those that read is none there, it takes each linear whose name
ends so, with the module beside it (``get_layers_for_scaling`` in torch/algorithm/utils/prepare.py, amd-quark 0.13).
"""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from autoquant.errors import AutoQuantError

RE = "re:"


@dataclass(frozen=True, slots=True)
class WrittenMapping:
    """A hand-made mapping: ``smooth`` is divided, ``balance`` multiplied; names, or expressions behind ``re:``.

    ``layers``: the module list whose members the names are in, in each of them; empty where they are of the model.
    ``modifier``: which of the tool's algorithms it is for; some leave out what others stop at. ``observed``: where it
    looks at activations (``inp``, without which Quark takes nothing; ``activation_hook_target``).
    ``alpha``: SmoothQuant's, None where the recipe says none.
    """

    smooth: str
    balance: tuple[str, ...]
    layers: str = ""
    modifier: str = ""
    observed: str = ""
    alpha: float | None = None

    def __str__(self) -> str:
        return f"{self.smooth} -> {', '.join(self.balance)}"


@dataclass(frozen=True, slots=True)
class MatchedPair:
    """One set of modules that a mapping takes."""

    smooth: str
    balance: tuple[str, ...]


def matched_pairs(mapping: WrittenMapping, modules: Mapping[str, str]) -> list[MatchedPair]:
    """The sets that ``mapping`` takes of ``modules``, names in their order and their classes; [] where it takes none.

    Raises AutoQuantError where the tool stops with an error.
    """
    if mapping.layers:
        return _in_layers(mapping, modules)
    if all(name in modules for name in (mapping.smooth, *mapping.balance)):
        return [MatchedPair(mapping.smooth, mapping.balance)]
    found = []
    for smooth, *balance in match_sets(modules, (mapping.smooth, *mapping.balance)):
        if len(smooth) > 1:
            raise AutoQuantError(f"it takes {len(smooth)} modules for the one to scale: {', '.join(smooth[:3])}, ...")
        found.append(MatchedPair(smooth[0], tuple(name for names in balance for name in names)))
    return found


def match_sets(modules: Mapping[str, str], targets: Sequence[str]) -> Iterable[list[list[str]]]:
    """Sets of names, in the order of ``targets``. Raises AutoQuantError where the tool does."""
    matches: dict[str, list[str]] = defaultdict(list)
    context: str | None = None
    missing = set(targets)
    for name, kind in modules.items():
        taken = [target for target in dict.fromkeys(targets) if is_match(name, kind, target)]
        if len(taken) > 1:
            raise AutoQuantError(f"'{name}' is taken by {len(taken)} expressions: {', '.join(taken)}")
        for target in taken:
            wider = _common(name, context)
            if not missing and wider != context:
                yield [matches[target] for target in targets]
                matches, wider, missing = defaultdict(list), name, set(targets)
            matches[target].append(name)
            context = wider
            missing.discard(target)
    if missing == set(targets):
        return
    if missing:
        raise AutoQuantError(f"the last set is incomplete: nothing is taken by {', '.join(sorted(missing))}")
    yield [matches[target] for target in targets]


def is_match(name: str, kind: str, target: str) -> bool:
    """True if an expression (``re:``, from the start of the name), a name or a class's name takes this module."""
    if target.startswith(RE):
        return re.match(target.removeprefix(RE), name) is not None
    return target in (name, kind)


def _common(name: str, other: str | None) -> str:
    """The modules that two names have in common in front; the name itself where there is no other."""
    parts = zip(name.split("."), (name if other is None else other).split("."), strict=False)
    return ".".join(part for part, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], parts))


def _in_layers(mapping: WrittenMapping, modules: Mapping[str, str]) -> list[MatchedPair]:
    start = re.compile(re.escape(mapping.layers) + r"\.\d+\.")
    layers: dict[str, list[str]] = defaultdict(list)
    for name in modules:
        if (match := start.match(name)) is not None:
            layers[match[0]].append(name.removeprefix(match[0]))
    found = []
    for prefix, names in layers.items():
        linears = [name for name in names if modules[prefix + name].endswith("Linear")]
        pairs = _by_name(mapping, names, linears)
        pairs = _beside(mapping, names, linears) if pairs is None else pairs
        found += [MatchedPair(prefix + pair.smooth, tuple(prefix + name for name in pair.balance)) for pair in pairs]
    return found


def _by_name(mapping: WrittenMapping, names: Sequence[str], linears: Sequence[str]) -> list[MatchedPair] | None:
    """The pair of these names in a layer, [] where its input is not observed; None where a module is missing."""
    if mapping.balance[0] in names and (mapping.observed or mapping.balance[0]) not in linears:
        return []
    if all(name in names for name in (mapping.smooth, *mapping.balance)):
        return [MatchedPair(mapping.smooth, mapping.balance)]
    return None


def _beside(mapping: WrittenMapping, names: Sequence[str], linears: Sequence[str]) -> list[MatchedPair]:
    """Each linear that a name is the end of, scaled by the module beside it; up to the first that has none."""
    if not fnmatch.filter(linears, "*" + (mapping.observed or mapping.balance[0])):
        return []
    found: list[MatchedPair] = []
    for name in (name for balance in mapping.balance for name in fnmatch.filter(linears, "*" + balance)):
        smooth = f"{name.rpartition('.')[0]}.{mapping.smooth}"
        if smooth not in names:
            break
        found.append(MatchedPair(smooth, (name,)))
    return found
