"""The certificate: no config is written that was not proved by the code that will apply it.

The same architecture is built small, with random norm weights, biases, routers and buffers, and analysed in the same
way. The claims of the full-size model are carried over to it, layer sets included, and applied by the real executor
with random scales and rotations; the outputs of several runs are compared.

Right configs land below 1e-6 relative and wrong ones above 1e-2, so that 1e-5 separates them. A claim that fails is
taken out and listed as blocked; the rest is proved again and written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from autoquant.analyzer.analysis import analyse
from autoquant.analyzer.analyze import Analyzed, build_config, captured_from, stacks_length
from autoquant.analyzer.layers import find_stacks, whole
from autoquant.analyzer.templates import fold, name_across_layers
from autoquant.capture.routes import Captured, check_against_eager
from autoquant.certificate.claims import REFUSED, Claim, claims, digest_of, keep, plain
from autoquant.certificate.depth import DEEP, hangs_on_depth
from autoquant.certificate.match import match
from autoquant.certificate.prove import TOLERANCE, Proof, Trial, dtype_of, fitting, placeable, prove
from autoquant.certificate.runs import with_short_windows
from autoquant.certificate.state import randomise_buffers_
from autoquant.config.format import Blocked, Certificate, CertificateRow, Config, edited
from autoquant.errors import AutoQuantError
from autoquant.models.reduce import grouped_experts, small, widened
from autoquant.models.settings import settings_digest
from autoquant.models.source import LoadedModel, ModelSource, layer_count, sub_configs
from autoquant.threads import one_thread


@dataclass(frozen=True, slots=True)
class SmallClaims:
    """A small random model, the claims of a full-size one carried over to it, and those that could not be."""

    loaded: LoadedModel
    config: Config
    refused: Mapping[Claim, str]


@one_thread()
def certify(
    analyzed: Analyzed, source: ModelSource, *, seed: int = 0, progress: Callable[[str], None] = lambda step: None
) -> Config:
    """The config of all claims that hold, with its certificate. The others are listed as blocked (:data:`REFUSED`), as
    are online rotations that the executor cannot place.

    Raises AutoQuantError where no claim holds, and where the small model cannot be built or captured.
    """
    carried = small_claims(analyzed, source, seed, progress)
    refused = dict(carried.refused)
    config, unfit = fitting(carried.loaded.module, carried.config)
    config, unplaceable = placeable(carried.loaded.module, config)
    proof = prove(carried.loaded, config, seed=seed, progress=progress)
    refused |= unfit | {(trial.name, trial.kind): _too_much(trial) for trial in proof.failed()}
    gone = {(plain(name), kind): why for (name, kind), why in refused.items()}
    config = analyzed.config
    held = [claim for claim in claims(config) if (plain(claim[0]), claim[1]) not in gone]
    if gone and not any(name not in unplaceable for name, _ in held):
        (name, kind), why = next(iter(refused.items()))
        raise AutoQuantError(f"{source.name}: '{name}' ({kind}) {_said(why, name)}; no claim holds, nothing is written")
    blocked = [
        *_unplaceable(config, unplaceable),
        *_refused(config, gone),
    ]
    kept = keep(config, [claim for claim in held if claim[0] not in unplaceable])
    kept = edited(kept, blocked=(*config.blocked, *blocked))
    return edited(kept, certificate=certificate_of(proof, dtype_of(carried.loaded.module), seed, kept, source))


def _too_much(trial: Trial) -> str:
    if trial.unreached:
        return trial.why()
    return f"changes the logits of the small model by {trial.change:.2g}, more than {TOLERANCE:g}"


def _said(why: str, name: str) -> str:
    return why.removeprefix(f"'{name}' ")


def small_claims(
    analyzed: Analyzed, source: ModelSource, seed: int, progress: Callable[[str], None], *, some: bool = False
) -> SmallClaims:
    """A small random model and the claims of the full-size one, carried over. Raises AutoQuantError.

    Its windows are shorter than its longest run. Where one layer of every kind is too few, two are taken: layers that
    share parameters, or that all read one tensor from outside, make a claim across them, which one of them alone does
    not show. Where what a layer does may hang on its number, there are eight. ``some``: the full-size config holds some
    of the analysis's claims only.
    """
    progress("building the small model")
    shorter = with_short_windows(source)
    first, failure = None, None
    for tried in dict.fromkeys((1, 2)):
        if tried > 1:
            progress("building a deeper small model")
        try:
            found = _carried(analyzed, (source, shorter), tried, seed, some)
        except AutoQuantError as error:
            failure = failure or error
            continue
        if not found.refused:
            return found
        first = found if first is None or len(found.refused) < len(first.refused) else first
        if source.config is None:
            break
    if first is None:
        assert failure is not None
        raise failure
    return first


def _carried(
    analyzed: Analyzed, sources: tuple[ModelSource, ModelSource], each: int, seed: int, some: bool
) -> SmallClaims:
    source, shorter = sources
    loaded = _small(source, shorter, seed, each)
    if source.config is not None and hangs_on_depth(loaded):
        loaded = _small(source, shorter, seed, max(each, DEEP))
    config, captured = _analysed(source, loaded)
    randomise_buffers_(loaded, captured, seed)
    held = [name for name, _ in loaded.module.named_parameters(remove_duplicate=False)]
    matched = match(analyzed.config, config, held, aligned=_aligned(source, loaded), some=some)
    return SmallClaims(widened(loaded), matched.config, matched.refused)


def _small(source: ModelSource, shorter: ModelSource, seed: int, each: int) -> LoadedModel:
    if shorter is not source:
        try:
            return small(shorter, seed, each=each)
        except AutoQuantError:  # a class may want its windows as long as they were
            pass
    return small(source, seed, each=each)


def _aligned(source: ModelSource, loaded: LoadedModel) -> bool:
    """True if layer i of the small model stands for layer i: not where the last ones share what earlier ones made."""
    if source.config is None:
        return True
    fields = [name for part in sub_configs(source.config).values() for name, v in vars(part).items() if v]
    shared = any(name.endswith("shared_layers") for name in fields)
    return not shared or layer_count(source.config) == layer_count(loaded.config)


def small_config(source: ModelSource, loaded: LoadedModel) -> Config:
    """Analyse a small model with real weights, every layer of it; its graph is checked against eager execution."""
    return _analysed(source, loaded)[0]


def _analysed(source: ModelSource, loaded: LoadedModel) -> tuple[Config, Captured]:
    with grouped_experts(loaded):
        captured = captured_from(loaded, loaded.module)
    difference = check_against_eager(loaded.module, loaded.args, loaded.kwargs, captured)
    if not difference <= TOLERANCE:
        raise AutoQuantError(
            f"{source.name}: the captured graph differs from the model by {difference:.2g}; nothing read off it holds"
        )
    analysis = analyse(captured)
    maps = whole(find_stacks(loaded.module))
    findings = name_across_layers(fold(analysis.findings, maps), maps)
    config = build_config(source, loaded.module, findings, analysis, captured, stacks_length(maps))
    return config, captured


def certificate_of(proof: Proof, dtype: torch.dtype, seed: int, config: Config, source: ModelSource) -> Certificate:
    """What a ``proof`` on a small model of ``source`` shows of all that ``config`` claims."""
    failed = proof.failed()
    trials = [trial for trial in proof.trials if trial not in failed]
    return Certificate(
        proved=True,
        tolerance=TOLERANCE,
        dtype=str(dtype).removeprefix("torch."),
        seed=seed,
        rows=tuple(_rows(trials)),
        coverage=proof.coverage,
        digest=digest_of(config),
        settings=None if source.config is None else settings_digest(source.config),
    )


def _rows(trials: Sequence[Trial]) -> list[CertificateRow]:
    rows = []
    for kind in dict.fromkeys(trial.kind for trial in trials):
        same = [trial for trial in trials if trial.kind == kind]
        worst = max(same, key=lambda trial: trial.change)
        name = worst.name if kind != "all" else None
        rows.append(CertificateRow(kind=kind, count=len(same), worst=float(f"{worst.change:.1e}"), worst_name=name))
    return rows


def _unplaceable(config: Config, refused: Mapping[str, str]) -> list[Blocked]:
    return [
        Blocked(path=o.path, layers=o.layers, what="rotation", reason=refused[o.path], operator=o.kind, at=o.path)
        for o in config.rotation.online
        if o.path in refused
    ]


def _refused(config: Config, gone: Mapping[Claim, str]) -> list[Blocked]:
    """An entry for each claim of ``config`` whose plain name and kind are ``gone``, at the first that reads it."""
    found = []
    for group in config.smoothing.groups:
        why = gone.get((plain(group.name), group.kind.value))
        if why is not None:
            path = group.targets[0].path.rpartition(".")[0]
            found.append(_entry(path, group.layers, "smoothing", group.name, group.kind.value, why))
    for space in config.rotation.spaces:
        why = gone.get((plain(space.name), space.kind))
        if why is not None:
            read = space.reads[0]
            path = read.readers[0].path.rpartition(".")[0]
            found.append(_entry(path, read.layers or space.layers, "rotation", space.name, space.kind, why))
    for online in config.rotation.online:
        why = gone.get((plain(online.path), online.kind))
        if why is not None:
            found.append(_entry(online.path, online.layers, "rotation", online.path, online.kind, why))
    return found


def _entry(path: str, layers: str | None, what: str, name: str, kind: str, why: str) -> Blocked:
    reason = f"{REFUSED} ('{name}' {_said(why, name)}): please report"
    return Blocked.model_validate(
        {"path": path, "layers": layers, "what": what, "reason": reason, "operator": kind, "at": path}
    )
