"""The certificate on demand: a config proved again, on a checkpoint's own weights or on a small random model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from autoquant.analyzer.analyze import analyze
from autoquant.certificate.certify import TOLERANCES, Trial, claims, dtype_of, keep, placeable, prove, small_claims
from autoquant.config.format import Config
from autoquant.config.spelling import did_you_mean
from autoquant.errors import AutoQuantError
from autoquant.io.safetensors_stream import open_shards
from autoquant.library_patches import pytree
from autoquant.models.load import load_weights
from autoquant.models.source import LoadedModel, ModelSource
from autoquant.models.structure import structure_of
from autoquant.threads import one_thread

# What a claim says, as opposed to what a person chooses of it.
_SAID = {
    "smoothing group": ("kind", "layers", "channels", "sources", "targets"),
    "rotation space": ("kind", "layers", "size", "blocks", "centre", "writers", "reads"),
    "online rotation": ("kind", "layers", "size"),
}

Progress = Callable[[str], None]
Verified = tuple[tuple[Trial, ...], dict[str, str], float]
"""Every trial; the online rotations that cannot be placed, and why; the tolerance."""


def verify_weights(
    folder: Path,
    config: Config,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Progress = lambda step: None,
) -> Verified:
    """Try every claim of ``config`` on the weights in ``folder``, two sequences of 16 random tokens.

    Raises AutoQuantError where the checkpoint cannot be read or run, or the config is for another structure.
    """
    open_shards(folder)
    progress(f"loading {folder}")
    loaded = load_weights(folder, dtype, seed, trust_remote_code=trust_remote_code)
    structure = structure_of(loaded.module)
    _check_structure(config, str(folder), structure.fingerprint, structure.parameters)
    return _verify(loaded, config, seed, progress)


@one_thread()
def verify_small(
    source: ModelSource,
    config: Config,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    progress: Progress = lambda step: None,
) -> Verified:
    """Analyse ``source``, check that it makes the claims of ``config``, and try these on a small random model.

    ``dtype`` applies where the small model runs in float64. Raises AutoQuantError where a claim of ``config`` differs
    from the analysis, naming the nearest one, and where the config is for another structure.
    """
    analyzed = analyze(source, progress=progress)
    check_claims(config, analyzed.config)
    loaded, reduced = small_claims(analyzed, source, seed, progress)
    wanted = {(_plain(name), kind) for name, kind in claims(config)}
    reduced = keep(reduced, [(name, kind) for name, kind in claims(reduced) if (_plain(name), kind) in wanted])
    if dtype_of(loaded.module) is torch.float64:
        loaded.module.to(dtype)
        args, kwargs = pytree.tree_map_only(Tensor, partial(_in_dtype, dtype), (loaded.args, dict(loaded.kwargs)))
        loaded = replace(loaded, args=args, kwargs=kwargs)
    return _verify(loaded, reduced, seed, progress)


def _in_dtype(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def check_claims(config: Config, found: Config) -> None:
    """Raise AutoQuantError where ``config`` claims what the analysis ``found`` does not, sizes and indices included.

    Claims that were left out of ``config`` and everything that is a choice (enable, alpha, method, ...) are free.
    """
    model = found.provenance.model
    _check_structure(config, model, found.provenance.fingerprint, found.model.parameters)
    allowed = {(what, name): claim for what, name, claim in _claims(found)}
    problems = []
    for what, name, claim in _claims(config):
        if (what, name) not in allowed:
            names = [n for w, n in allowed if w == what]
            problems.append(f"'{name}' is no {what} of {model}{did_you_mean(name, names)}")
            continue
        for key, value in claim.items():
            if value != allowed[what, name][key]:
                problems.append(f"'{name}': its {key} differ from the analysis of {model}")
    if problems:
        more = tuple(problems[:20]) if len(problems) > 1 else ()
        raise AutoQuantError(f"the config claims what the model does not: {problems[0]}", more)


def _check_structure(config: Config, model: str, theirs: str, parameters: int) -> None:
    mine = config.provenance
    if mine.fingerprint != theirs:
        raise AutoQuantError(
            f"the config is for another structure: {mine.model} with {config.model.layers} layers and "
            f"{config.model.parameters:,} parameters; {model} has {parameters:,} parameters"
            + (", of other names, shapes or ties" if config.model.parameters == parameters else "")
        )


def _plain(name: str) -> str:
    """Without the layers that tell apart claims of one name: those of a small model are others."""
    return name.partition(" @")[0]


def _verify(loaded: LoadedModel, config: Config, seed: int, progress: Progress) -> Verified:
    config, refused = placeable(loaded.module, config)
    trials = prove(loaded, config, seed=seed, progress=progress)
    if not trials:
        raise AutoQuantError("nothing to verify: the config has no smoothing group, space or online rotation")
    return trials, refused, TOLERANCES[dtype_of(loaded.module)]


def _claims(config: Config) -> Iterator[tuple[str, str, dict[str, object]]]:
    """(sort, name, what it says) of every claim; online rotations go by their path."""
    for what, found in (
        ("smoothing group", [(group.name, group) for group in config.smoothing.groups]),
        ("rotation space", [(space.name, space) for space in config.rotation.spaces]),
        ("online rotation", [(online.path, online) for online in config.rotation.online]),
    ):
        for name, claim in found:
            yield what, name, {key: getattr(claim, key) for key in _SAID[what]}
