"""What a model allows: found, checked and proved, without changing it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from autoquant.api.arguments import IMPORTING, config_of, name_of, source_of, steps_of
from autoquant.errors import AutoQuantError
from autoquant.models.tasks import Kind
from autoquant.steps import Progress, silent

if TYPE_CHECKING:
    from torch import nn

    from autoquant.config.format import Config
    from autoquant.report.results import Analysis, Checked, Verification


def analyze(
    model: str | Path | nn.Module,
    *,
    example_inputs: Any = None,
    layers: int | None = None,
    full: bool = False,
    capture: Literal["auto", "dynamo", "export"] = "auto",
    task: Kind | None = None,
    trust_remote_code: bool = False,
    verify: bool = True,
    progress: Progress = silent,
) -> Analysis:
    """What can be smoothed and rotated in a model, read off its graph and proved on a small one; no weights are read.

    ``model``: a model type of transformers, a folder or config.json, a hub id, ``package.module:factory``, or a module,
    with ``example_inputs`` (a tuple, a dict or ``(args, kwargs)``) unless it is one of transformers. ``layers``: so
    many only; ``full``: trace every layer; ``task``: where a type has several; ``verify`` False leaves the proof out.

    Raises AutoQuantError where the model cannot be built or captured, or a claim does not hold.
    """
    progress(IMPORTING, 0, 0)
    from autoquant.analyzer.analyze import analyze as find
    from autoquant.analyzer.explain import explain
    from autoquant.certificate.certify import certify
    from autoquant.config.format import Certificate, edited
    from autoquant.report.explanation import explanation_text
    from autoquant.report.results import Analysis

    source = source_of(model, example_inputs, layers, task, trust_remote_code)
    tell = steps_of(progress)
    found = find(source, how=capture, full=full, progress=tell)
    unproved = edited(found.config, certificate=Certificate(proved=False))
    config = certify(found, source, progress=tell) if verify else unproved
    return Analysis(
        config,
        found.captured.how,
        found.seconds,
        tuple(found.findings.unknown_operators),
        lambda path: explanation_text(explain(found.analysis, found.stacks, path), path),
    )


def check(
    config: str | Path | Config,
    model: str | Path | nn.Module | None = None,
    *,
    example_inputs: Any = None,
    layers: int | None = None,
    task: Kind | None = None,
    trust_remote_code: bool = False,
) -> Checked:
    """Check a config and, given a ``model`` (as for :func:`analyze`; no weights), every path, shape, range and tie.

    Raises AutoQuantError with all problems, each as one line.
    """
    from autoquant.report.results import Checked

    file, loaded = name_of(config, "config"), config_of(config)
    if model is None:
        return Checked(loaded, file)
    from autoquant.config.places import json_path
    from autoquant.config.spelling import counted
    from autoquant.executor.resolve import problems
    from autoquant.models.fit import MAX_EXPLAINED, problems_error
    from autoquant.models.source import build_structure
    from autoquant.models.structure import structure_of

    name = name_of(model, type(model).__name__)
    source = source_of(model, example_inputs, layers, task, trust_remote_code)
    found = problems(loaded, structure_of(build_structure(source)))
    if found and isinstance(config, str | Path):
        raise problems_error(Path(config), name, found)
    if found:  # no file, so no lines to point to
        details = tuple(f"{json_path(problem.path)}: {problem.message}" for problem in found[:MAX_EXPLAINED])
        raise AutoQuantError(f"the config does not fit {name}: {counted(len(found), 'problem')}", details)
    return Checked(loaded, file, name)


def verify(
    model: str | Path | nn.Module,
    config: str | Path | Config,
    *,
    example_inputs: Any = None,
    dtype: Literal["float64", "float32"] = "float64",
    seed: int = 0,
    small: bool = False,
    layers: int | None = None,
    task: Kind | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Verification:
    """Try every claim of a config alone and all together, with random scales and rotations, and compare the logits.

    On a folder's own weights where it has some, else (and with ``small``) on a small random model of the same
    structure. Whether all hold is in the result. Raises AutoQuantError where the config is for another structure.
    """
    loaded = config_of(config)
    progress(IMPORTING, 0, 0)
    import torch

    from autoquant.certificate.verify import verify_small, verify_weights
    from autoquant.report.results import Verification

    name, tell, precision = name_of(model, type(model).__name__), steps_of(progress), getattr(torch, dtype)
    folder = Path(name).expanduser()
    own = not small and isinstance(model, str | Path) and folder.is_dir() and any(folder.glob("*.safetensors*"))
    if own:
        verified = verify_weights(
            folder, loaded, dtype=precision, seed=seed, trust_remote_code=trust_remote_code, progress=tell
        )
    else:
        source = source_of(model, example_inputs, layers, task, trust_remote_code)
        verified = verify_small(source, loaded, dtype=precision, seed=seed, progress=tell)
    proof = verified.proof
    return Verification(name, own, proof.trials, verified.refused, proof.tolerance, proof.coverage)


def init_group(
    config: str | Path | Config,
    sources: Sequence[str],
    targets: Sequence[str],
    *,
    layers: str | None = None,
    name: str | None = None,
    offset: Literal[0, 1] = 0,
    model: str | Path | nn.Module | None = None,
    example_inputs: Any = None,
    task: Kind | None = None,
    trust_remote_code: bool = False,
    verify: bool = True,
    progress: Progress = silent,
) -> Config:
    """A config with one more smoothing group, which need not be one that the analysis finds: the proof decides.

    ``sources``: weights whose rows make the channels, biases, or gains of norms (``offset`` 1: the gain is 1 + weight);
    ``targets``: weights whose columns read them; ``layers`` None: those of the first target. All claims of the config
    are proved on a small random ``model`` (None: the config's own), those by hand at further scales, which gives a new
    certificate; ``verify`` False leaves it out. Raises AutoQuantError where the group does not fit or not hold.
    """
    from autoquant.config.handmade import with_group

    changed = with_group(config_of(config), sources, targets, layers, name, offset)
    if not verify:
        return changed
    progress(IMPORTING, 0, 0)
    from autoquant.certificate.ensure import proved_anew

    given = changed.provenance.model if model is None else model
    source = source_of(given, example_inputs, None, task, trust_remote_code)
    return proved_anew(changed, source, progress=steps_of(progress))
