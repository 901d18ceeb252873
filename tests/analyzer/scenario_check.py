"""Analyses and proves a scenario's model as a person's own, and judges what would be written by the oracle alone.

The judge reads the config as the file format describes it. It builds the model anew for every claim, with other
parameters and other values in its buffers, and calls it as the scenario says.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from oracle import carry_out_, change_of, expand, outputs_of, randomised
from scenario_axes import AXES
from scenarios import Claimed, Scenario
from torch import Tensor, nn

from autoquant.analyzer.analyze import analyze
from autoquant.analyzer.findings import Findings
from autoquant.certificate.certify import certify
from autoquant.config.format import Config, Slot, SmoothingGroup, SmoothingKind, Space
from autoquant.errors import AutoQuantError
from autoquant.models.source import ModelSource

TOLERANCE = 1e-6
SHARP = 1e-5
"""How much a trap's claim changes an output at least, were it made."""
REFUSED = "claimed by the analysis, refused by the proof"
NO_CLAIM = "no claim holds"
NOTHING = Findings((), (), (), (), (), ())


@dataclass(frozen=True, slots=True)
class Judged:
    """What was counted on one scenario, the worst change by what holds, and what is wrong with it, as text."""

    counts: Counter[str]
    worst: float
    failures: tuple[str, ...]


def run(axis: str, seed: int) -> Judged:
    """The scenario of an axis and a seed, analysed, proved and judged."""
    scenario = AXES[axis](seed)
    judged = judge(scenario)
    judged.counts["traps that are sharp"] += sum(change > SHARP for change in springs(scenario))
    return judged


def judge(scenario: Scenario) -> Judged:
    counts = Counter(programs=1, planted=len(scenario.plants), traps=len(scenario.traps))
    source = ModelSource(f"{scenario.axis}:{scenario.seed}", factory=lambda: (_seeded(scenario), scenario.inputs))
    said: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            analyzed = analyze(source)
            counts["traps seen by the analysis"] += sum(
                not _claims(trap, _written_out(analyzed.config)) for trap in scenario.traps
            )
            config: Config | None = certify(analyzed, source)
    except AutoQuantError as error:
        config = None
        if NO_CLAIM not in error.message:
            said.append(f"error: {error.message}")
    except Exception as error:  # whatever is raised on a valid model is a finding
        return Judged(counts, 0.0, (f"error: {type(error).__name__}: {error}\n{_shown(scenario)}",))
    findings = NOTHING if config is None else _written_out(config)
    refused = [] if config is None else [b.path for b in config.blocked if b.reason.startswith(REFUSED)]
    counts.update(refused=len(refused), lost=config is None, groups=len(findings.groups), spaces=len(findings.spaces))
    missed = [plant for plant in scenario.plants if not _found(plant, findings)]
    claimed = [trap for trap in scenario.traps if _claims(trap, findings)]
    counts.update(found=len(scenario.plants) - len(missed))
    counts["traps refused"] = len(scenario.traps) - len(claimed)
    said += [f"missed: {plant}" for plant in missed]
    said += [f"trapped: {trap}" for trap in claimed]
    worst = 0.0
    for name, part in _trials(config):
        change, where = _change(scenario, part)
        counts["carried out"] += 1
        if change < TOLERANCE:
            worst = max(worst, change)
        else:
            counts["wrong"] += 1
            said.append(f"wrong: {name} changes an output by {change:.2g} ({where})")
    blocked = (
        [] if config is None or not said else [f"  {b.what} {b.path} {b.layers}: {b.reason}" for b in config.blocked]
    )
    shown = tuple("\n".join((line, _shown(scenario), *blocked)) for line in said)
    return Judged(counts, worst, shown)


def springs(scenario: Scenario) -> list[float]:
    """For each trap, how much the claim that it leads to changes an output, if it were made."""
    return [_change(scenario, _naive(scenario, trap))[0] for trap in scenario.traps]


def _shown(scenario: Scenario) -> str:
    return "\n".join([f"{scenario.axis} {scenario.seed}:", *(f"  {word}" for word in scenario.words)])


# --- what is claimed --------------------------------------------------------------------------------------------------


def _written_out(config: Config) -> Findings:
    """Every claim with the paths of its parameters, as the format says: ``{layer}`` stands for each of ``layers``."""
    groups = [g for group in config.smoothing.groups for g in _each(group)]
    online = [o for one in config.rotation.online for o in _each(one) if o.kind != "R3"]
    spaces = [s for space in config.rotation.spaces for s in _spaces(space)]
    return Findings((), tuple(groups), tuple(spaces), tuple(online), (), ())


def _spaces(space: Space) -> Iterator[Space]:
    if space.layers is not None:
        yield from _each(space)
        return
    writers = tuple(w for writer in space.writers for w in _each(writer))
    reads = tuple(r for read in space.reads for r in _each(read))
    yield space.model_copy(update={"writers": writers, "reads": reads})


def _each(item: Any) -> Iterator[Any]:
    if item.layers is None:
        yield item
        return
    text = item.model_dump_json(exclude={"layers"})
    for number in _numbers(item.layers):
        yield type(item).model_validate_json(text.replace("{layer}", str(number)))


def _numbers(text: str) -> list[int]:
    found = []
    for term in text.split(","):
        ends, _, step = term.partition(":")
        first, _, last = ends.partition("-")
        found += range(int(first), int(last or first) + 1, int(step or 1))
    return found


def _found(plant: Claimed, findings: Findings) -> bool:
    """True if groups from the sources cover all columns of the targets, or one space all rows of the writers."""
    if plant.what == "space":
        return any(all(_covered(_rows(space), path) for path in plant.sources) for space in findings.spaces)
    groups = [g for g in findings.groups if {s.path for s in g.sources} >= set(plant.sources)]
    return all(_covered([t for g in groups for t in g.targets], path) for path in plant.targets)


def _rows(space: Space) -> list[Slot]:
    """What writes into a space: also rows behind which a gain stands, which is folded into them."""
    return [*space.writers, *(slot for read in space.reads for slot in read.readers if slot.dim == 0)]


def _claims(trap: Claimed, findings: Findings) -> bool:
    """True if some claim joins the sources and the targets of a trap."""
    if trap.what == "space":
        return any({w.path for w in s.writers} & set(trap.sources) for s in findings.spaces if s.kind == "R1")
    return any(
        {s.path for s in g.sources} & set(trap.sources)
        and {t.path for t in g.targets} & set(trap.targets)
        and g.channels > (trap.rows or 0)
        for g in findings.groups
    )


def _covered(slots: Sequence[Slot], path: str) -> bool:
    axes: dict[tuple[int, int], set[int]] = {}
    for slot in slots:
        if slot.path == path:
            axes.setdefault((slot.dim, slot.size), set()).update(expand(slot)[0])
    return bool(axes) and all(len(found) == size for (_, size), found in axes.items())


# --- carrying it out --------------------------------------------------------------------------------------------------


def _trials(config: Config | None) -> Iterator[tuple[str, Findings]]:
    """Each claim alone, in all its layers at once, and everything together."""
    if config is None:
        return
    for group in config.smoothing.groups:
        yield f"group {group.name}", replace(NOTHING, groups=tuple(_each(group)))
    for space in config.rotation.spaces:
        yield f"space {space.name}", replace(NOTHING, spaces=tuple(_spaces(space)))
    for online in config.rotation.online:
        if online.kind != "R3":
            yield f"online {online.path}", replace(NOTHING, online=tuple(_each(online)))
    everything = _written_out(config)
    yield "everything", replace(everything, online=())


def _seeded(scenario: Scenario) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(scenario.seed)
        return scenario.make().eval()


def _fresh(scenario: Scenario) -> nn.Module:
    """The model with random parameters, and with other values in its buffers, in float64."""
    module = randomised(_seeded(scenario), scenario.seed)
    generator = torch.Generator().manual_seed(scenario.seed)
    with torch.no_grad():
        for part in module.modules():
            fill = getattr(getattr(part, "part", None), "fill", None)
            if fill is not None:
                fill(part, generator)
    return module


@torch.no_grad()
def _change(scenario: Scenario, claims: Findings) -> tuple[float, str]:
    """The largest relative change of an output in any run, and the name of that run."""
    module = _fresh(scenario)
    expected = [outputs_of(call(module)) for _, call in scenario.runs]
    changed = _fresh(scenario)
    _untie_tables_(changed)
    carry_out_(changed, _each_tensor_once(changed, claims), scenario.seed)
    worst = 0.0, ""
    for (name, call), before in zip(scenario.runs, expected, strict=True):
        change = change_of(outputs_of(call(changed)), before)
        worst = max(worst, (change, name))
    return worst


def _untie_tables_(module: nn.Module) -> None:
    """A table that is a linear's weight too gets a copy; other uses of one parameter stay one."""
    tables = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    others = {id(p) for part in module.modules() if part not in tables for p in part._parameters.values()}
    for table in tables:
        if id(table.weight) in others:
            table.weight = nn.Parameter(table.weight.detach().clone(), False)


def _each_tensor_once(module: nn.Module, claims: Findings) -> Findings:
    """A claim lists every name of a tied parameter, which is changed once."""
    held = dict(module.named_parameters(remove_duplicate=False))

    def once(slots: Sequence[Any], seen: set[tuple[int, int]]) -> tuple[Any, ...]:
        keys = [(id(held[slot.path]), slot.dim) for slot in slots]
        kept = [slot for i, slot in enumerate(slots) if keys[i] not in seen and keys[i] not in keys[:i]]
        seen.update(keys)
        return tuple(kept)

    groups = tuple(
        g.model_copy(update={"sources": once(g.sources, set()), "targets": once(g.targets, set())})
        for g in claims.groups
    )
    spaces = []
    for space in claims.spaces:
        seen: set[tuple[int, int]] = set()
        reads = [read.model_copy(update={"readers": once(read.readers, seen)}) for read in space.reads]
        update = {"writers": once(space.writers, set()), "reads": tuple(reads)}
        spaces.append(space.model_copy(update=update))
    return replace(claims, groups=groups, spaces=tuple(spaces))


def _naive(scenario: Scenario, trap: Claimed) -> Findings:
    """The claim that one could be led to: each row of the source is read by one column of the target."""
    held = dict(_seeded(scenario).named_parameters(remove_duplicate=False))
    if trap.what == "space":
        return replace(NOTHING, spaces=(_naive_space(held, trap),))
    source, target = trap.sources[0], trap.targets[0]
    first, second = held[source], held[target]
    slots = [_slot(source, first, 0)]
    bias = source.replace("weight", "bias")
    if source.endswith("weight") and bias in held:
        slots.append(_slot(bias, held[bias], 0))
    last = _slot(target, second, 1)
    group = SmoothingGroup(
        name="naive", kind=SmoothingKind.LINEAR_LINEAR, channels=last.size, sources=tuple(slots), targets=(last,)
    )
    return replace(NOTHING, groups=(group,))


def _slot(path: str, held: Tensor, dim: int) -> Slot:
    if held.dim() == 3:
        return Slot(path=path, dim=dim + 1, stack=held.shape[0], size=held.shape[0] * held.shape[dim + 1])
    return Slot(path=path, dim=dim, size=held.shape[dim])


def _naive_space(held: dict[str, Tensor], trap: Claimed) -> Space:
    writers: list[Any] = [{"path": "table.weight", "dim": 1, "size": held["table.weight"].shape[1]}]
    for path in trap.sources[1:]:
        writers.append({"path": path, "dim": 0, "size": held[path].shape[0]})
        bias = path.replace("weight", "bias")
        if bias in held:
            writers.append({"path": bias, "dim": 0, "size": held[path].shape[0]})
    reads: list[Any] = []
    for name in [n for n in held if n.endswith(".norm.weight")]:
        path = name.removesuffix("norm.weight")
        bias = f"{path}norm.bias" if f"{path}norm.bias" in held else None
        readers = [f"{path}{r}" for r in ("up", "gate", "q", "k", "v") if f"{path}{r}.weight" in held]
        norm = {"kind": "rms" if bias is None else "layer", "weight": name, "bias": bias}
        reads.append({"norm": norm, "readers": [_reader(r, held) for r in readers]})
    bias = "last.bias" if "last.bias" in held else None
    norm = {"kind": "rms" if bias is None else "layer", "weight": "last.weight", "bias": bias}
    reads.append({"norm": norm, "readers": [_reader("head", held)]})
    centre = any(read["norm"]["kind"] == "layer" for read in reads)
    size = held["table.weight"].shape[1]
    return Space.model_validate(
        {"name": "naive", "kind": "R1", "size": size, "centre": centre, "writers": writers, "reads": reads},
        strict=False,
    )


def _reader(path: str, held: dict[str, Tensor]) -> dict[str, Any]:
    bias = f"{path}.bias"
    size = held[f"{path}.weight"].shape[1]
    return {"path": f"{path}.weight", "dim": 1, "size": size, "bias": bias if bias in held else None}


logging.getLogger("torch").setLevel(logging.CRITICAL)
