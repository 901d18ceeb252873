"""A folder of compressed-tensors read back: ours, and what other tools write as symmetric W8A8 int8.

What is int8 is told by the tensors (``P.weight_scale`` beside ``P.weight``), how its input is rounded by the group of
``config.json`` that it belongs to. Their names are the hub's; the model's own come from the layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.checkpoint.formats import Changes, Contents
from autoquant.checkpoint.formats.assembled import as_loaded_, fill_
from autoquant.checkpoint.formats.quantization_config import Group, group_for, groups_in
from autoquant.checkpoint.formats.surroundings import stored_tokenizer
from autoquant.checkpoint.provenance import CONFIG, read_provenance
from autoquant.config.file import load_config
from autoquant.errors import AutoQuantError
from autoquant.io.safetensors_stream import Shards, open_shards
from autoquant.io.safetensors_writer import Described
from autoquant.models.checkpoint_source import read_settings
from autoquant.models.hub_names import HubTensor, Layout, hub_layout
from autoquant.models.load import build_empty
from autoquant.models.structure import structure_of
from autoquant.models.tokenizer import processor_files
from autoquant.quantizer.linear import replace_with_empty_
from autoquant.quantizer.strategies import PlannedLinear, Scheme

SECTION = "quantization_config"
_SIDES = ("weight_scale", "input_scale", "weight_zero_point", "input_zero_point")
"""What may lie beside an int8 weight."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A folder, its tensors unread. ``planned``: its int8 linears by weight; ``layout``: what the file holds of each
    tensor of the model; ``shared``: further names of some.
    """

    folder: Path
    model: Any
    shards: Shards
    layout: Layout
    shapes: Mapping[str, tuple[int, ...]]
    planned: Mapping[str, PlannedLinear]
    shared: Mapping[str, str]


def is_stored(folder: Path) -> bool:
    """True for a folder of symmetric W8A8 int8 in the format of compressed-tensors."""
    try:
        return (folder / "config.json").is_file() and groups_in(read_settings(folder).get(SECTION)) is not None
    except AutoQuantError:
        return False


def load_stored(folder: Path, dtype: torch.dtype | None, *, trust_remote_code: bool = False) -> Any:
    """A runnable model. Raises AutoQuantError where the folder is damaged or its tensors do not fit."""
    stored = open_stored(folder, trust_remote_code=trust_remote_code)
    replace_with_empty_(stored.model, tuple(stored.planned.values()))
    return as_loaded_(fill_(stored.model, dict(_tensors(stored)), stored.shared, folder), dtype)


def stored_contents(folder: Path, *, trust_remote_code: bool = False) -> Contents:
    """The folder as it would be written anew. Raises AutoQuantError where it has no AutoQuant config."""
    if not (folder / CONFIG).is_file():
        raise AutoQuantError(
            f"{folder}: has no {CONFIG}: another tool wrote it, which says nothing of the model's parts"
        )
    stored = open_stored(folder, trust_remote_code=trust_remote_code)
    return Contents(
        stored.model,
        load_config(folder / CONFIG),
        _described(stored),
        _tensors(stored),
        stored.model.config.dtype,
        stored.shared,
        Changes(),
        read_provenance(folder),
        stored_tokenizer(folder, trust_remote_code=trust_remote_code),
        processor_files(folder),
    )


def open_stored(folder: Path, *, trust_remote_code: bool = False) -> Stored:
    """Match a folder's tensors with its model's. Raises AutoQuantError where they do not fit."""
    settings = read_settings(folder)
    groups = groups_in(settings.get(SECTION))
    if groups is None:
        raise AutoQuantError(f"{folder}: is no symmetric int8 checkpoint of compressed-tensors")
    shards = open_shards(folder)
    dtype = getattr(torch, str(settings.get("dtype") or settings.get("torch_dtype") or "float32"), None)
    if not isinstance(dtype, torch.dtype):
        raise AutoQuantError(f"{folder / 'config.json'}: its dtype {settings.get('dtype')!r} is none")
    model = build_empty(folder, dtype, trust_remote_code=trust_remote_code)
    vars(model.config).pop(SECTION, None)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    layout = hub_layout(model, shapes)
    here = {name for name, parts in layout.items() if all(part.name in shards.entries for part in parts)}
    shared = _shared(folder, model, shapes, here)
    kept = {name: layout[name] for name in shapes if name not in shared}
    planned = {
        name: _planned(folder, name, shapes[name], parts, model, shards, groups)
        for name, parts in kept.items()
        if f"{_base(parts[0])}.weight_scale" in shards.entries
    }
    stored = Stored(folder, model, shards, kept, shapes, planned, shared)
    _check(stored)
    return stored


def _base(part: HubTensor) -> str:
    return part.name.removesuffix(".weight")


def _shared(folder: Path, model: nn.Module, shapes: Mapping[str, Any], here: set[str]) -> dict[str, str]:
    """Name -> the one in the file that it is tied to. Raises AutoQuantError for what is neither there nor tied."""
    shared, missing = {}, []
    ties = {name: group for group in structure_of(model).ties for name in group}
    for name in shapes:
        if name in here:
            continue
        source = next((other for other in ties.get(name, ()) if other in here), None)
        if source is None:
            missing.append(name)
        else:
            shared[name] = source
    if missing:
        raise AutoQuantError(f"{folder}: {len(missing)} tensors are missing: {', '.join(missing[:5])}")
    return shared


def _planned(
    folder: Path,
    name: str,
    shape: tuple[int, ...],
    parts: Sequence[HubTensor],
    model: nn.Module,
    shards: Shards,
    groups: Sequence[Group],
) -> PlannedLinear:
    """How one int8 weight is quantized."""
    owner = name.rpartition(".")[0]
    path = owner if name.endswith(".weight") else name
    group = group_for(groups, [path, *map(_base, parts)])
    if group is None:
        raise AutoQuantError(f"{folder}: {path} has a scale, and no group of its config.json is for it")
    plain = isinstance(model.get_submodule(owner), nn.Linear)
    if not plain and len(shape) != 3:
        raise AutoQuantError(f"{folder}: {path} is int8 and no linear")
    for part in parts:
        entry = shards.entries[part.name]
        if entry.dtype is not torch.int8 or entry.shape != part.shape:
            raise AutoQuantError(
                f"{folder}: {part.name} is {entry.dtype} {list(entry.shape)}, not int8 {list(part.shape)}"
            )
        scale = shards.entries.get(f"{_base(part)}.weight_scale")
        if scale is None or math.prod(scale.shape) != (part.shape[0] if group.weight_per_channel else 1):
            held = "no" if scale is None else list(scale.shape)
            raise AutoQuantError(f"{folder}: {_base(part)} has {held} weight_scale, which is not what its group says")
        if group.activation.is_static and f"{_base(part)}.input_scale" not in shards.entries:
            raise AutoQuantError(f"{folder}: {_base(part)} has no input_scale, which static activations need")
    if len(parts) > 1 and (group.activation.is_static or not group.weight_per_channel):
        raise AutoQuantError(f"{folder}: {path}: several matrices in one run in int8 per channel and per token only")
    return PlannedLinear(
        path=path,
        weight=name,
        bias=None,
        in_features=shape[-1],
        out_features=shape[-2],
        stack=shape[0] if len(shape) == 3 else None,
        in_dim=len(shape) - 1,
        scheme=Scheme(group.weight_per_channel, group.activation, None),
    )


def _check(stored: Stored) -> None:
    """Raise AutoQuantError for tensors that have no place, and for zero points."""
    entries = stored.shards.entries
    known = {part.name for parts in stored.layout.values() for part in parts}
    bases = [_base(part) for name in stored.planned for part in stored.layout[name]]
    sides = {f"{base}.{side}" for base in bases for side in _SIDES}
    unknown = sorted(set(entries) - known - sides)
    if unknown:
        raise AutoQuantError(
            f"{stored.folder}: its model has no place for {len(unknown)} tensors: {', '.join(unknown[:5])}"
        )
    for name in sorted(sides & set(entries)):
        if name.endswith("zero_point") and bool(stored.shards.read(name).any()):
            raise AutoQuantError(f"{stored.folder}: {name} is not zero; only symmetric int8 runs here")


def _described(stored: Stored) -> Described:
    """Every tensor under the model's names."""
    described: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, parts in stored.layout.items():
        shape, linear = stored.shapes[name], stored.planned.get(name)
        if linear is None:
            described[name] = (stored.shards.entries[parts[0].name].dtype, shape)
            continue
        rows = linear.out_features if linear.scheme.weight_per_channel else 1
        described[f"{name}.values"] = (torch.int8, shape)
        described[f"{name}.scale"] = (torch.float32, (*shape[:-2], rows, 1))
        if linear.scheme.is_static:
            described[f"{name}.input_scale"] = (torch.float32, ())
    return described


def _tensors(stored: Stored) -> Iterator[tuple[str, Tensor]]:
    """Every described tensor once."""
    read = stored.shards.read
    for name, parts in stored.layout.items():
        shape, linear = stored.shapes[name], stored.planned.get(name)
        if linear is None:
            yield name, _joined(shape, parts, [read(part.name) for part in parts])
            continue
        yield f"{name}.values", _joined(shape, parts, [read(part.name) for part in parts])
        scales = [read(f"{_base(part)}.weight_scale").float() for part in parts]
        if linear.scheme.weight_per_channel:
            yield f"{name}.scale", _joined((*shape[:-1], 1), parts, [scale.reshape(-1, 1) for scale in scales])
        else:
            yield f"{name}.scale", scales[0].reshape(1, 1)
        if linear.scheme.is_static:
            yield f"{name}.input_scale", read(f"{_base(parts[0])}.input_scale").float().reshape(())


def _joined(shape: tuple[int, ...], parts: Sequence[HubTensor], given: Sequence[Tensor]) -> Tensor:
    """The model's tensor out of its parts on the hub."""
    if len(parts) == 1 and parts[0].rows is None:
        return given[0].reshape(shape)
    whole = torch.empty(shape, dtype=given[0].dtype)
    for part, tensor in zip(parts, given, strict=True):
        part.put_(whole, tensor)
    return whole
