"""From MODEL to a config: build on the meta device, trace representatives, read off the symmetries, fold."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from torch import nn

from autoquant.analyzer.analysis import Analysis, analyse
from autoquant.analyzer.findings import Findings
from autoquant.analyzer.layers import ends_apart, find_stacks, represent, whole
from autoquant.analyzer.lengths import common, longer_inputs
from autoquant.analyzer.replaced import without_replaced
from autoquant.analyzer.templates import StackMap, disagreement, fold, name_across_layers
from autoquant.analyzer.unlisted import unlisted
from autoquant.analyzer.untraced import (
    beside_unreached,
    unreached_parts,
    untraced,
    within_language_model,
    without_residual,
)
from autoquant.capture.fake_tensors import fakeify_, known_values, short_chunks, undisturbed
from autoquant.capture.routes import Captured, capture
from autoquant.config.format import (
    FORMAT_VERSION,
    SCHEMA_NAME,
    Blocked,
    Config,
    ModelFacts,
    Provenance,
    Quantization,
    Rotation,
    Smoothing,
)
from autoquant.config.places import json_path
from autoquant.errors import AutoQuantError
from autoquant.library_patches import FakeTensorMode, marked_as_compiling
from autoquant.models.build import build_meta, on_text
from autoquant.models.fit import structure_problems
from autoquant.models.inputs import NO_SHAPES, masks_beside
from autoquant.models.source import LoadedModel, ModelSource, text_config
from autoquant.models.structure import structure_of
from autoquant.threads import one_thread
from autoquant.version import __version__

How = Literal["auto", "dynamo", "export"]


@dataclass(frozen=True, slots=True)
class Analyzed:
    """A config with what it was read from."""

    config: Config
    findings: Findings
    """Folded: paths with ``{layer}``."""
    analysis: Analysis
    """Of the traced model, with concrete paths."""
    captured: Captured
    stacks: tuple[StackMap, ...]
    seconds: dict[str, float]
    """Wall-clock time per step: build, capture, analysis, in this order."""


@one_thread()
def analyze(
    source: ModelSource, *, how: How = "auto", full: bool = False, progress: Callable[[str], None] = lambda step: None
) -> Analyzed:
    """Analyse the architecture that ``source`` names; no weights are read or allocated.

    ``full`` traces every layer instead of representatives. ``progress`` is told each step before it starts.

    Raises AutoQuantError where the model cannot be built or captured.
    """
    started = time.perf_counter()
    progress("building on the meta device")
    loaded = build_meta(source)
    built = time.perf_counter()
    module = loaded.short or loaded.module
    stacks = find_stacks(module)
    seconds = {"build": built - started, "capture": 0.0, "analysis": 0.0}
    # Where the first and the last layer of a kind differ after all, the ends are taken apart; if depth still matters,
    # every layer is traced.
    attempts = [] if full else [stacks, ends_apart(stacks)]
    reason = None
    while True:
        if attempts:
            traced, maps = represent(module, attempts.pop(0), partial(run_without_weights, loaded=loaded))
        else:
            traced, maps = module, whole(stacks, reason)
        loaded, captured, analysis = _trace(loaded, traced, how, progress, seconds)
        analysis = replace(analysis, findings=_at_two_lengths(loaded, traced, analysis.findings, how))
        reason = disagreement(analysis.findings, maps)
        if reason is None:
            break
    analysis = replace(analysis, findings=without_replaced(analysis.findings, traced, loaded, run_without_weights))
    left_out = untraced(traced, captured, loaded.missing, loaded.uncaptured)
    forward = partial(run_without_weights, traced, loaded)
    if loaded.uncaptured is not None or (loaded.unseen and left_out):
        found = without_residual(analysis.findings)
        found = within_language_model(found, traced, text_config(loaded.config), forward)
        analysis = replace(analysis, findings=found)
    explained = bool(loaded.missing) and not loaded.unseen  # what could not be made writes nothing
    if loaded.config is not None and left_out and not explained:  # of a factory the inputs are what it is used for
        parts = list(dict.fromkeys(block.path for block in left_out))
        unreached = unreached_parts(traced, parts, forward)
        analysis = replace(analysis, findings=beside_unreached(analysis.findings, unreached))
    blocked = (*analysis.findings.blocked, *left_out)
    blocked = (*blocked, *unlisted(traced, captured, analysis, blocked))
    findings = name_across_layers(fold(replace(analysis.findings, blocked=blocked), maps), maps)
    findings = _under_listed_paths(findings)
    config = build_config(source, loaded.module, findings, analysis, captured, stacks_length(maps))
    if loaded.short is not None:
        problems = structure_problems(config, structure_of(loaded.module))
        if problems:  # what was found hangs on how many positions there are
            where = f"{json_path(problems[0].path)}: {problems[0].message}"
            raise AutoQuantError(f"{source.name}: what was read off a shorter version of it does not fit it: {where}")
    return Analyzed(config, findings, analysis, captured, tuple(maps), seconds)


def _under_listed_paths(found: Findings) -> Findings:
    """``found`` without online rotations before modules whose tied weight is listed as that of another path."""
    listed = {linear.path for linear in found.linears}
    kept = tuple(online for online in found.online if online.kind == "R3" or online.path in listed)
    reason = "its weight is that of another module, under whose path alone it is listed"
    blocked = tuple(
        Blocked(path=o.path, layers=o.layers, what="rotation", reason=reason, operator=o.kind, at=o.path)
        for o in found.online
        if o not in kept
    )
    return replace(found, online=kept, blocked=(*found.blocked, *blocked))


def _at_two_lengths(loaded: LoadedModel, traced: nn.Module, found: Findings, how: How) -> Findings:
    """What is found for longer inputs as well, where a factory's module takes them.

    Configurations are run at other lengths by the certificate alone: a second trace of their full size costs too much.
    """
    if loaded.config is not None:
        return found
    for longer in longer_inputs(loaded):
        try:
            run_without_weights(traced, longer)
            captured = captured_from(longer, traced, how)
        except Exception:  # the user's code: it takes no inputs of this shape
            continue
        try:
            return common(found, analyse(captured).findings)
        except IndexError:  # a table of positions ends before these inputs do, which shapes do not show
            continue
    return found


def run_without_weights(module: nn.Module, loaded: LoadedModel) -> object:
    """``module`` on the loaded model's inputs, without weights. Raises what the model says where it does not run."""
    if loaded.known:
        with undisturbed(module), short_chunks(module):
            (args, kwargs), mode = fakeify_(module, (loaded.args, loaded.kwargs))
            with mode, known_values():
                return _run(module, args, kwargs)
    with undisturbed(module), short_chunks(module), marked_as_compiling(), contextlib.suppress(Exception):
        return module(*loaded.args, **loaded.kwargs)  # on the meta device: fast, and not all models run so
    with undisturbed(module), short_chunks(module), FakeTensorMode(allow_non_fake_inputs=True):
        return _run(module, loaded.args, loaded.kwargs)


def _run(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> object:
    try:
        return module(*args, **kwargs)
    except RuntimeError as error:
        if not NO_SHAPES.search(str(error)):
            raise
        with marked_as_compiling():  # by other operators, as the library takes where it is traced
            return module(*args, **kwargs)


def captured_from(loaded: LoadedModel, module: nn.Module, how: How = "auto") -> Captured:
    """The graph of ``module``, which is a loaded model's or a shallower version of it, on that model's inputs."""
    configured = loaded.config is not None
    spare = masks_beside(module, loaded.kwargs) if configured else {}
    return capture(module, loaded.args, loaded.kwargs, how, known=loaded.known, first=configured, spare=spare)


def captured_with(loaded: LoadedModel, module: nn.Module, how: How = "auto") -> tuple[LoadedModel, Captured]:
    """The graph of ``module`` and the inputs that it is of: text alone where with images or sound there is none.

    Raises AutoQuantError where it cannot be captured at all: what was said of all of its inputs.
    """
    try:
        return loaded, captured_from(loaded, module, how)
    except AutoQuantError as error:
        text = on_text(loaded, error.message)
        if text is None:
            raise
        with contextlib.suppress(AutoQuantError):
            return text, captured_from(text, module, how)
        raise


def _trace(
    loaded: LoadedModel, traced: nn.Module, how: How, progress: Callable[[str], None], seconds: dict[str, float]
) -> tuple[LoadedModel, Captured, Analysis]:
    start = time.perf_counter()
    progress("capturing the graph")
    loaded, captured = captured_with(loaded, traced, how)
    middle = time.perf_counter()
    progress("reading off scales and rotations")
    analysis = analyse(captured)
    seconds["capture"] += middle - start
    seconds["analysis"] += time.perf_counter() - middle
    return loaded, captured, analysis


def stacks_length(maps: tuple[StackMap, ...]) -> int:
    """Number of layers of the longest stack, 0 where nothing repeats."""
    return max((1 + max(layer for group in stack.originals for layer in group) for stack in maps), default=0)


def build_config(
    source: ModelSource, module: nn.Module, findings: Findings, analysis: Analysis, captured: Captured, layers: int
) -> Config:
    """Put findings into the file format, with every knob at its default."""
    scores = analysis.scales.analysis.scores
    residual = next((space.size for space in findings.spaces if space.kind == "R1"), None)
    tables = [f for f in analysis.scales.analysis.axes.all() if f.role == "table"]
    structure = structure_of(module)
    facts = ModelFacts(
        layers=layers,
        hidden_size=residual or (tables[0].count if tables else None),
        heads=scores[0].heads if scores else None,
        kv_heads=scores[0].kv_heads if scores else None,
        head_size=scores[0].head_size if scores else None,
        parameters=structure.parameters,
        tied=structure.ties,
        linears=findings.linears,
    )
    return Config.model_validate(
        {
            "$schema": SCHEMA_NAME,
            "format_version": FORMAT_VERSION,
            "provenance": Provenance(
                autoquant=__version__,
                torch=version("torch").partition("+")[0],
                transformers=_version("transformers") if source.config is not None else None,
                model=source.name,
                capture=captured.how,
                fingerprint=structure.fingerprint,
            ),
            "model": facts,
            "smoothing": Smoothing(groups=findings.groups),
            "rotation": Rotation(spaces=findings.spaces, online=findings.online),
            "quantization": Quantization(
                exclude=tuple(linear.path for linear in findings.linears if linear.role != "linear")
            ),
            "blocked": findings.blocked,
        }
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
