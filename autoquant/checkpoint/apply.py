"""Apply a config to a checkpoint on disk, tensor by tensor, all or nothing.

The result is written to a hidden folder beside the target and renamed at the end, its ``config.json`` last: whatever
interrupts the work, no folder that looks finished is left.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoquant.certificate.claims import ProofNote, as_proved
from autoquant.checkpoint.dtypes import restore_dtypes_, stored_names
from autoquant.checkpoint.finite import find_unused, hide_unused_, show_unused_
from autoquant.checkpoint.folding import Folding, Output, fold
from autoquant.checkpoint.provenance import CONFIG, make_provenance, write_provenance
from autoquant.checkpoint.side_files import check_links, copy_side_files
from autoquant.checkpoint.unplaced import buffer_names, check_unturned, unplaced, weights_among
from autoquant.config.file import config_text
from autoquant.config.format import Config
from autoquant.errors import AutoQuantError
from autoquant.executor.apply import Applied, execute_, is_finite, summarise
from autoquant.executor.plan import Plan, Scales, make_plan
from autoquant.executor.resolve import Smooth, resolve
from autoquant.executor.resolved import Resolved, check_not_learned
from autoquant.io.folders import check_target, finished_folder, resumable_folder
from autoquant.io.safetensors_stream import INDEX, Shards
from autoquant.models.checkpoint_source import is_scaled, open_checkpoint, without_scales
from autoquant.models.device import device_said
from autoquant.models.load import listed, load_skeleton, load_with_unplaced
from autoquant.models.structure import ModelStructure, structure_of
from autoquant.models.vocabulary import token_tables
from autoquant.version import __version__

ALTERNATIVE = "disable it in the config, or use --no-rotate"

CPU = torch.device("cpu")

Progress = Callable[[int, int], None]


def apply_checkpoint(
    source: Path,
    config: Config,
    target: Path,
    *,
    rotate: bool = True,
    smooth: Smooth = "none",
    scales: Scales | None = None,
    only: Collection[str] | None = None,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    options: dict[str, Any] | None = None,
    device: torch.device = CPU,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Applied:
    """Write ``source`` changed by ``config`` to the folder ``target``, loadable with plain transformers.

    Tensors are read, folded in float64 on ``device`` and written by ``workers`` (None: one for each core). A checkpoint
    whose tensor names are not the model's own (transformers converts some on loading) is loaded and changed in memory
    instead. ``options`` is recorded in the provenance file. Raises AutoQuantError, with nothing left behind, where
    anything does not fit, where the result cannot be held by the model's class, and where ``target`` exists and
    ``force`` is false.
    """
    check_target(source, target, force)
    stored = open_stored(source, trust_remote_code=trust_remote_code)
    resolved = resolve(config, stored.inventory, rotate=rotate, smooth=smooth, only=only, seed=seed)
    check_stored(stored, resolved)
    return write_changed(
        stored,
        target,
        config,
        resolved,
        scales,
        dtype=dtype,
        options=options,
        device=device,
        workers=workers,
        progress=progress,
    )


@dataclass(frozen=True, slots=True)
class Stored:
    """A checkpoint folder and what its model is. ``names``: the stored names by the model's, None where transformers
    converts tensors on loading; ``tables``: the parameters with a row for each token; ``unplaced``: tensors that the
    class has no place for, unknown without names; ``trust_remote_code``: its model may be code of its own.
    """

    source: Path
    shards: Shards
    inventory: ModelStructure
    names: dict[str, str] | None
    tables: frozenset[str] = frozenset()
    unplaced: tuple[str, ...] = ()
    trust_remote_code: bool = False


def open_stored(source: Path, *, trust_remote_code: bool = False) -> Stored:
    """A checkpoint folder, from headers alone. Raises AutoQuantError where there is none that can be changed."""
    shards = open_checkpoint(source)
    check_links(source)
    skeleton = load_skeleton(source, trust_remote_code=trust_remote_code)
    inventory = structure_of(skeleton)
    names = match_names(inventory, shards)
    left: tuple[str, ...] = ()
    if names is not None:
        inventory = _with_stored_dtypes(inventory, shards, names)
        left = unplaced(shards, {*names.values(), *buffer_names(skeleton)})
    return Stored(source, shards, inventory, names, token_tables(skeleton), left, trust_remote_code)


def check_stored(stored: Stored, resolved: Resolved) -> None:
    """What can be told before the work; errors as of :func:`check_plain_resolved`, and for tensors that would not be
    changed with the others (of a converted checkpoint these when it is loaded, and that all are finite now).
    """
    check_plain_resolved(resolved)
    source, shards = stored.source, stored.shards
    if stored.names is None:
        find_unused(source, shards.entries, shards.read, stored.tables)
        return
    check_unturned(source, shards, stored.unplaced, resolved)
    if left := weights_among(shards, stored.unplaced):
        warnings.warn(f"{source}: the model's class has no place for {listed(left)}: copied as is", stacklevel=2)


def write_changed(
    stored: Stored,
    target: Path,
    config: Config,
    resolved: Resolved,
    scales: Scales | None,
    *,
    dtype: torch.dtype | None = None,
    options: dict[str, Any] | None = None,
    proof: ProofNote | None = None,
    device: torch.device = CPU,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Applied:
    """Carry out what was resolved, tensor by tensor, into the folder ``target``; errors as of ``apply_checkpoint``.

    Tensors are found to be finite where they are folded: with one that is not, all that was written goes.
    """
    source, shards, inventory, names = stored.source, stored.shards, stored.inventory, stored.names
    if names is None:
        return _apply_loaded(stored, config, target, resolved, scales, dtype, options, proof, progress)
    first = [name for name in inventory.shapes if inventory.canonical[name] == name]

    def read(name: str) -> Tensor:
        tensor = shards.read(names[name])
        if tensor.is_floating_point() and not is_finite(tensor):  # told of with all others that are not
            found = find_unused(source, first, lambda name: shards.read(names[name]), stored.tables)
            return found.tied(inventory.canonical).hidden(name, tensor)
        return tensor

    plan = make_plan(resolved, inventory, read, scales)
    check_plain_plan(plan)
    applied = summarise(plan, resolved)
    folding = _folding(stored, names, plan, dtype)
    digest = _digest(stored, config, resolved, scales, dtype, device)
    with resumable_folder(target, digest) as (folder, journal):
        copy_side_files(source, folder)
        fold(folding, folder, device, workers, journal, progress)
        _write_index(folder, folding)
        _write_provenance(folder, source, config, applied, options, proof, device)
        _write_config(source, folder, bool(plan.untied), dtype)
    return applied


def _digest(
    stored: Stored,
    config: Config,
    resolved: Resolved,
    scales: Scales | None,
    dtype: torch.dtype | None,
    device: torch.device,
) -> str:
    """What stands for all that decides the bytes of the shards; of the source's files size and time do."""
    found = hashlib.sha256(config.model_dump_json(by_alias=True).encode())
    files = stored.shards.stamps()
    spaces = [(one.name, one.layer, one.method.value, one.seeds) for one in resolved.spaces]
    groups = [(one.name, one.layer) for one in resolved.groups]
    said = (__version__, torch.__version__, str(stored.source.resolve()), files, spaces, groups, dtype, device.type)
    found.update(repr(said).encode())
    for key, values in (scales or {}).items():
        found.update(repr(key).encode() + values.double().cpu().numpy().tobytes())
    return found.hexdigest()


def match_names(inventory: ModelStructure, shards: Shards) -> dict[str, str] | None:
    """Parameter name -> stored name, or None where some parameter is stored under no name that is known."""
    names = stored_names(inventory, shards)
    return None if names.keys() < inventory.shapes.keys() else names


def _with_stored_dtypes(inventory: ModelStructure, shards: Shards, names: dict[str, str]) -> ModelStructure:
    dtypes = {name: shards.entries[stored].dtype for name, stored in names.items()}
    return dataclasses.replace(inventory, dtypes=dtypes)


def check_plain_resolved(resolved: Resolved) -> None:
    """Raise AutoQuantError for what no plain transformers checkpoint can hold, and for a rotation that must be learned,
    before anything is read.
    """
    check_not_learned(resolved)
    problems = [f"{o.kind} {o.path}: an online rotation needs autoquant's modules" for o in resolved.online]
    for space in resolved.spaces:
        for writer in space.writers:
            if writer.fold_norm is not None:
                norm = writer.fold_norm.weight or writer.fold_norm.bias
                problems.append(f"{space.name}: {norm} is folded into {writer.name}, yet the class keeps the norm")
    if problems:
        raise AutoQuantError(f"plain transformers cannot hold the result; {ALTERNATIVE}", tuple(problems[:20]))


def check_plain_plan(plan: Plan) -> None:
    """Raise AutoQuantError for a new bias, which the model's class does not have."""
    if plan.created:
        details = tuple(f"{bias}: a LayerNorm's bias has to move there (its gain has zeros)" for bias in plan.created)
        raise AutoQuantError(f"plain transformers cannot hold new biases; {ALTERNATIVE}", details[:20])


def _folding(stored: Stored, names: dict[str, str], plan: Plan, dtype: torch.dtype | None) -> Folding:
    """The plan in terms of the files of the source; untied parameters join the file of the tensor they came from."""
    shards, inventory = stored.shards, stored.inventory
    by_stored: dict[str, str] = {}
    for name, at in names.items():
        if inventory.canonical[name] == name or at not in by_stored:
            by_stored[at] = name
    outputs: dict[str, dict[str, Output]] = {file: {} for file in shards.files}

    def add(out: str, name: str, at: str) -> None:
        entry = shards.entries[at]
        wanted = dtype if dtype is not None and name else entry.dtype
        outputs[entry.file][out] = Output(out, name, at, wanted, plan.operations.get(name, ()) if name else ())

    for at in shards.entries:
        add(at, by_stored.get(at, ""), at)
    for name in plan.untied:
        if by_stored[names[name]] != name:
            add(name, name, names[name])
    first = {name: names[name] for name in inventory.shapes if inventory.canonical[name] == name}
    files = {file: tuple(found.values()) for file, found in outputs.items()}
    return Folding(shards, files, first, inventory.canonical, stored.tables)


def _write_index(folder: Path, folding: Folding) -> None:
    """The index of the files, where the source has one or there are several."""
    if len(folding.files) == 1 and not (folding.shards.folder / INDEX).is_file():
        return
    weight_map = {output.name: file for file, outputs in folding.files.items() for output in outputs}
    described = [one for file in folding.files for one in folding.described(file).values()]
    size = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in described)
    _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})


def _apply_loaded(
    stored: Stored,
    config: Config,
    target: Path,
    resolved: Resolved,
    scales: Scales | None,
    dtype: torch.dtype | None,
    options: dict[str, Any] | None,
    proof: ProofNote | None,
    progress: Progress | None,
) -> Applied:
    """For checkpoints whose tensors transformers renames or stacks on loading: change the loaded model and save it."""
    source, shards = stored.source, stored.shards
    loaded = load_with_unplaced(source, trust_remote_code=stored.trust_remote_code)
    model = loaded.model
    restore_dtypes_(model, shards)
    check_unturned(source, shards, loaded.unplaced, resolved)
    unused = hide_unused_(source, model)
    if dtype is not None:  # widened before the folding, narrowed after it
        model.to(torch.promote_types(model.dtype, dtype))
    plan = make_plan(resolved, structure_of(model), model.get_parameter, scales)
    check_plain_plan(plan)
    with torch.no_grad():
        execute_(model, plan, progress)
    applied = summarise(plan, resolved)
    if dtype is not None:
        model.to(dtype)
    show_unused_(model, unused)
    with finished_folder(target) as folder:
        copy_side_files(source, folder)
        model.save_pretrained(folder)
        _write_provenance(folder, source, config, applied, options, proof)
        _write_config(source, folder, bool(applied.untied), dtype)
    return applied


def _write_config(source: Path, folder: Path, untied: bool, dtype: torch.dtype | None) -> None:
    """The source's config.json, byte for byte unless parameters were untied, converted or stored with scales."""
    text = (source / "config.json").read_text()
    settings = json.loads(text)
    if untied or dtype is not None or is_scaled(settings):
        settings = without_scales(settings)
        for section in (settings, *(value for value in settings.values() if isinstance(value, dict))):
            if untied and (section is settings or "tie_word_embeddings" in section):
                section["tie_word_embeddings"] = False
            for key in ("dtype", "torch_dtype"):
                if dtype is not None and key in section:
                    section[key] = str(dtype).removeprefix("torch.")
        if dtype is not None:
            settings["dtype"] = str(dtype).removeprefix("torch.")
        text = json.dumps(settings, indent=2) + "\n"
    with open(folder / "config.json", "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _write_provenance(
    folder: Path,
    source: Path,
    config: Config,
    applied: Applied,
    options: dict[str, Any] | None,
    proof: ProofNote | None,
    device: torch.device = CPU,
) -> None:
    (folder / CONFIG).write_text(config_text(as_proved(config, proof)), encoding="utf-8")
    result = {"smoothed": list(applied.groups), "untied": list(applied.untied), "tensors_changed": applied.tensors}
    result["device"] = device_said(device)
    made = make_provenance("apply", source, config, options or {}, applied.constructions, result, proof)
    write_provenance(folder, made)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
