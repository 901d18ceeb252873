"""From a checkpoint folder to one that computes the same, rotated and smoothed: what ``autoquant apply`` does.

Resolve once, load the model and rotate it, run the calibration text, make scales of the maxima, write tensor by tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoquant.algorithms.smoothquant import group_scales
from autoquant.calibration.group_maxima import GroupMaxima, collect_activation_maxima, load_maxima, save_maxima
from autoquant.calibration.media import read_media
from autoquant.calibration.windows import CalibrationOptions, calibration_windows
from autoquant.certificate.claims import ProofNote
from autoquant.checkpoint.apply import Stored, check_stored, open_stored, write_changed
from autoquant.checkpoint.finite import hide_unused_
from autoquant.checkpoint.quantize import load_float32
from autoquant.config.format import Config, SmoothingKind
from autoquant.errors import AutoQuantError
from autoquant.executor.apply import Applied
from autoquant.executor.plan import Scales, make_plan
from autoquant.executor.resolved import Resolved
from autoquant.io.files import check_target as check_file
from autoquant.io.folders import check_target
from autoquant.models.device import device_of
from autoquant.models.load import listed, load_skeleton
from autoquant.models.reading import Batch, check_reads_text, texts
from autoquant.models.structure import structure_of
from autoquant.models.tokenizer import load_tokenizer
from autoquant.pipeline.held import InMemory
from autoquant.pipeline.select import EVERYTHING, Transforms, resolve_transforms
from autoquant.pipeline.transform import Progress, silent


@dataclass(frozen=True, slots=True)
class TransformOptions:
    """What is applied and how its scales are found.

    ``calibration``: which part of which text, or batches of token ids [1, S]; ``media``: a folder of images or sounds
    that calibrate beside it; ``maxima``: activation maxima kept by an earlier ``save_maxima``, in place of both.
    ``seed`` replaces ``rotation.seed``; ``dtype``: of the weights written, None: as stored. ``device``: what calibrates
    and folds; ``workers``: how many threads fold, None: as many as there are cores. ``proof``: how the config's claims
    stand, which is recorded.
    """

    transforms: Transforms = EVERYTHING
    calibration: CalibrationOptions | Sequence[Batch] = field(default_factory=CalibrationOptions)
    media: Path | None = None
    maxima: Path | None = None
    save_maxima: Path | None = None
    seed: int | None = None
    dtype: torch.dtype | None = None
    device: str = "auto"
    workers: int | None = None
    proof: ProofNote | None = None


@dataclass(frozen=True, slots=True)
class Transformed:
    """What was done, and how many groups were smoothed (each layer's counts)."""

    applied: Applied
    smoothed: int


def transform_checkpoint(
    source: Path,
    config: Config,
    target: Path,
    options: TransformOptions,
    *,
    recorded: dict[str, Any] | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Transformed:
    """Write ``source`` rotated and smoothed by ``config`` to the folder ``target``, loadable with plain transformers.

    ``recorded`` is kept in the provenance file. Warns of dead channels. Raises AutoQuantError, with nothing left
    behind, where anything does not fit, where the result cannot be held by the model's class, and where a group needs
    maxima and there is neither text nor a file of them.
    """
    check_target(source, target, force)
    if options.save_maxima is not None:
        check_file(options.save_maxima, force=True)
    device = device_of(options.device)
    stored = open_stored(source, trust_remote_code=trust_remote_code)
    keys = SmoothingKind.NORM_LINEAR in options.transforms.alphas  # they are refused below, with what to do
    resolved = resolve_transforms(config, stored.inventory, options.transforms, options.seed, keys=keys)
    if not (resolved.spaces or resolved.groups or resolved.online):
        raise AutoQuantError("nothing to do: no smoothing group, rotation space or online rotation is selected")
    check_stored(stored, resolved)
    scales: Scales | None = None
    if resolved.groups:
        resolved, scales = _scales(stored, resolved, options, device, progress)
    applied = write_changed(
        stored,
        target,
        config,
        resolved,
        scales,
        dtype=options.dtype,
        options=recorded,
        proof=options.proof,
        device=device,
        workers=options.workers,
        progress=lambda *at: progress("apply", *at),
    )
    return Transformed(applied, len(resolved.groups))


@torch.no_grad()
def _scales(
    stored: Stored,
    resolved: Resolved,
    options: TransformOptions,
    device: torch.device,
    progress: Progress,
) -> tuple[Resolved, Scales]:
    """Scales of the groups, by the activations that the rotated model has, and what is left of ``resolved``: without
    groups of towers, of which nothing is reached.
    """
    found: GroupMaxima | None = None if options.maxima is None else load_maxima(options.maxima)
    windows = () if found is not None else _windows(stored, options)
    if found is None and not windows:
        raise AutoQuantError("smoothing needs --calibration TEXT or --maxima FILE; --transforms rotation goes without")
    progress("load", 0, 1)
    with warnings.catch_warnings():  # what is to be said of the stored weights was said
        warnings.simplefilter("ignore")
        model = _load(stored, device)
        hide_unused_(stored.source, model).check(windows)
    held = InMemory(model)
    plan = make_plan(replace(resolved, groups=()), structure_of(held.model), held.read, None)
    held.execute_(plan)
    if found is None:
        found = collect_activation_maxima(
            held.model, resolved, windows, progress=lambda *at: progress("calibrate", *at)
        )
        idle = dict.fromkeys(group.name for group in resolved.groups if (group.name, group.layer) not in found)
        if idle:
            reached = "text does not reach it" if options.media is None else "nothing that calibrates reaches it"
            warnings.warn(f"not smoothed, since {reached}: {listed(list(idle))}", stacklevel=2)
        kept = tuple(group for group in resolved.groups if (group.name, group.layer) in found)
        resolved = replace(resolved, groups=kept)
    if options.save_maxima is not None:
        save_maxima(options.save_maxima, found)
    return resolved, group_scales(resolved, found, held.read)


def _windows(stored: Stored, options: TransformOptions) -> Sequence[Batch]:
    """What calibrates: windows of text, images and sounds. Raises AutoQuantError where the model does not take them."""
    calibration, trust = options.calibration, stored.trust_remote_code
    skeleton = load_skeleton(stored.source, trust_remote_code=trust)
    batches: Sequence[Batch] = ()
    if not isinstance(calibration, CalibrationOptions):
        batches = calibration
        if texts(batches):
            check_reads_text(skeleton)
    elif calibration.text is not None:
        check_reads_text(skeleton)
        batches = calibration_windows(load_tokenizer(stored.source, trust_remote_code=trust), calibration)
    if options.media is not None:
        batches = (*read_media(options.media, stored.source, skeleton, trust_remote_code=trust), *batches)
    return batches


def _load(stored: Stored, device: torch.device) -> nn.Module:
    """The model in float32: its activations are those that smoothing will meet."""
    return load_float32(stored.source, trust_remote_code=stored.trust_remote_code).to(device)
