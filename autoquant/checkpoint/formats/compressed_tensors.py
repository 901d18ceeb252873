"""The format of compressed-tensors, ``int-quantized``: what vLLM, SGLang and transformers load.

Of a linear P a folder holds ``P.weight`` int8 [O, I], ``P.weight_scale`` float32 [O, 1] or [1], ``P.input_scale``
float32 [1] where it is static, and ``P.bias``, all under the names that the hub has: experts one by one, in two
dimensions. ``config.json`` says in ``quantization_config`` what is quantized how and what is not. The AutoQuant config
and the record of how the folder was made lie beside it, so that nothing is lost on the way back to the native format.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.checkpoint.formats import COMPRESSED_TENSORS, Changes, Contents, register
from autoquant.checkpoint.formats.model_card import model_card
from autoquant.checkpoint.formats.quantization_config import REGEX, Group, section_of
from autoquant.checkpoint.formats.stored import is_stored, load_stored, stored_contents
from autoquant.checkpoint.formats.surroundings import write_surroundings
from autoquant.checkpoint.formats.transposed import transposed_reasons
from autoquant.config.format import Config, Strategy, edited
from autoquant.errors import AutoQuantError
from autoquant.io.safetensors_writer import write_checkpoint_tensors
from autoquant.models.hub_names import HubTensor, Layout, hub_layout
from autoquant.models.structure import structure_of
from autoquant.quantizer.strategies import Granularity, PlannedLinear, kv_granularity, plan_linears

Shape = tuple[int, ...]
_ONLINE = {
    "R3": ", whose rotations of queries and keys servers ignore",
    "R4": ": its transform_config ends in an error in vLLM 0.32 on a CPU, and was run nowhere else",
}
"""Why servers cannot be given these."""
_KINDS = ("values", "scale", "input_scale")
"""The tensors of an int8 weight, by what follows the weight's name."""


class CompressedTensors:
    """The format of this module."""

    name = COMPRESSED_TENSORS

    def reasons_against(self, config: Config, changes: Changes, model: Any = None) -> tuple[str, ...]:
        planned = plan_linears(config)
        reasons = [*_config_reasons(config), *_structure_reasons(changes), *transposed_reasons(planned)]
        if model is not None and not reasons:
            reasons += _layout_reasons(model, planned)
        return tuple(reasons)

    def write(self, folder: Path, contents: Contents) -> None:
        planned = {linear.weight: linear for linear in plan_linears(contents.config)}
        layout = hub_layout(contents.model, _shapes(contents.described, planned))
        copies = _copies(contents, planned)
        described = {
            hub: described
            for name, described in contents.described.items()
            for hub, described in _described(name, *described, planned, layout, copies)
        }
        tensors = (made for name, tensor in contents.tensors for made in _made(name, tensor, planned, layout, copies))
        write_checkpoint_tensors(folder, described, tensors)
        section = section_of(_groups(planned.values(), layout), _ignored(contents, planned, layout))
        settings: dict[str, Any] = {"quantization_config": section}
        if not contents.model.config.architectures:
            settings["architectures"] = [type(contents.model).__name__]
        write_surroundings(folder, contents, **settings)
        (folder / "README.md").write_text(model_card(contents), encoding="utf-8")

    def is_mine(self, folder: Path) -> bool:
        return is_stored(folder)

    def contents(self, folder: Path, *, trust_remote_code: bool = False) -> Contents:
        return stored_contents(folder, trust_remote_code=trust_remote_code)

    def load(self, folder: Path, dtype: torch.dtype | None, *, trust_remote_code: bool = False) -> Any:
        return load_stored(folder, dtype, trust_remote_code=trust_remote_code)


register(CompressedTensors())


def _config_reasons(config: Config) -> list[str]:
    """What a config asks for that has no place in the format."""
    reasons = []
    strategy = config.quantization.strategy
    if kv_granularity(config) is not None:
        base = Strategy(strategy.value.partition("_kv_cache")[0])
        reasons.append(
            "quantization.strategy: no server reads an int8 key/value cache from a checkpoint; the nearest is "
            f"{base.value}, served with --kv-cache-dtype int8_per_token_head (vLLM, on a GPU)"
        )
    if config.quantization.prefix:
        reasons.append("quantization.prefix: a prefix has no place in a served checkpoint; set it to []")
    if not plan_linears(config):
        reasons.append("quantization: no linear is quantized")
    return reasons


def _structure_reasons(changes: Changes) -> list[str]:
    """What makes the model another than its class builds."""
    online = [
        f"{o.path}: the online rotation {o.kind} has no place in the format{_ONLINE.get(o.kind, '')}; disable it"
        for o in changes.online
    ]
    gone = [
        f"{path}: this norm was folded away, and the model's class has it; disable its space"
        for path in changes.identities
    ]
    made = [f"{name}: a bias that the model's class does not have; disable what makes it" for name in changes.created]
    return [*online, *gone, *made]


def _layout_reasons(model: Any, planned: Sequence[PlannedLinear]) -> list[str]:
    """What transformers' own names do not allow."""
    shapes = structure_of(model).shapes
    try:
        layout = hub_layout(model, shapes)
    except AutoQuantError as error:
        return [error.message]
    reasons = []
    for linear in planned:
        parts = layout[linear.weight]
        if any(len(part.shape) != 2 or not part.name.endswith(".weight") for part in parts):
            reasons.append(f"{linear.path}: the hub has its matrices in one tensor, {parts[0].name}; exclude it")
        elif len(parts) > 1 and not linear.scheme.weight_per_channel:
            reasons.append(
                f"{linear.path}: several matrices with one scale have no place in the format; use per channel"
            )
        elif linear.stack is not None and linear.scheme.is_static:
            reasons.append(f"{linear.path}: static inputs of experts have no place in the format; use per token")
    return reasons


def _split(name: str, planned: Mapping[str, PlannedLinear]) -> tuple[str, str | None]:
    """The parameter that a stored tensor belongs to, and which of the tensors of an int8 weight it is."""
    parameter, _, kind = name.rpartition(".")
    return (parameter, kind) if kind in _KINDS and parameter in planned else (name, None)


def _shapes(
    described: Mapping[str, tuple[torch.dtype, Shape]], planned: Mapping[str, PlannedLinear]
) -> dict[str, Shape]:
    """The model's parameters and buffers, int8 weights under the names that their parameters had."""
    split = {name: _split(name, planned) for name in described}
    return {split[name][0]: shape for name, (_, shape) in described.items() if split[name][1] in (None, "values")}


def _copies(contents: Contents, planned: Mapping[str, PlannedLinear]) -> Mapping[str, tuple[str, ...]]:
    """Further names of parameters that the model's class does not tie by itself: each is written."""
    tied = getattr(contents.model, "all_tied_weights_keys", None) or {}
    copies: dict[str, tuple[str, ...]] = {}
    for name, source in contents.shared.items():
        parameter, kind = _split(source, planned)
        further = name if kind is None else name.removesuffix(f".{kind}")
        if tied.get(name) != source and further not in copies.get(parameter, ()):
            copies[parameter] = (*copies.get(parameter, ()), further)
    return copies


def _parts(name: str, layout: Layout, copies: Mapping[str, tuple[str, ...]]) -> Iterator[HubTensor]:
    yield from layout[name]
    for further in copies.get(name, ()):
        yield from (HubTensor(further, part.shape, part.rows) for part in layout[name])


def _described(
    name: str,
    dtype: torch.dtype,
    shape: Shape,
    planned: Mapping[str, PlannedLinear],
    layout: Layout,
    copies: Mapping[str, tuple[str, ...]],
) -> Iterator[tuple[str, tuple[torch.dtype, Shape]]]:
    """What a tensor of the model is in the folder."""
    parameter, kind = _split(name, planned)
    for part in _parts(parameter, layout, copies):
        if kind in (None, "values"):
            yield part.name, (dtype, part.shape)
        elif kind == "input_scale":
            yield f"{_base(part.name)}.input_scale", (dtype, (1,))
        else:
            rows = (part.shape[0], 1) if planned[parameter].scheme.weight_per_channel else (1,)
            yield f"{_base(part.name)}.weight_scale", (dtype, rows)


def _made(
    name: str,
    tensor: Tensor,
    planned: Mapping[str, PlannedLinear],
    layout: Layout,
    copies: Mapping[str, tuple[str, ...]],
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that :func:`_described` announces."""
    parameter, kind = _split(name, planned)
    for part in _parts(parameter, layout, copies):
        if kind in (None, "values"):
            yield part.name, part.taken(tensor)
        elif kind == "input_scale":
            yield f"{_base(part.name)}.input_scale", tensor.reshape(1)
        elif planned[parameter].scheme.weight_per_channel:
            yield f"{_base(part.name)}.weight_scale", part.taken(tensor)
        else:
            yield f"{_base(part.name)}.weight_scale", tensor.reshape(1)


def _base(hub: str) -> str:
    return hub.removesuffix(".weight")


def _groups(planned: Iterable[PlannedLinear], layout: Layout) -> tuple[Group, ...]:
    """Linears by their scheme, in the order in which the schemes come; the names are those of the hub."""
    found: dict[tuple[bool, Granularity], list[str]] = {}
    for linear in planned:
        key = (linear.scheme.weight_per_channel, linear.scheme.activation)
        found.setdefault(key, []).extend(_targets(linear, layout))
    return tuple(Group(*key, tuple(targets)) for key, targets in found.items())


def _targets(linear: PlannedLinear, layout: Layout) -> list[str]:
    """A linear's names on the hub; of a stack that is apart there one expression for all numbers of each matrix."""
    names = [_base(part.name) for part in layout.get(linear.weight, ())]
    if linear.stack is None or len(names) == 1:
        return names
    numbered = (re.sub(r"(.*)\\\.\d+\\\.", r"\1\\.\\d+\\.", re.escape(name)) for name in names)
    return list(dict.fromkeys(f"{REGEX}{expression}$" for expression in numbered))


def _ignored(contents: Contents, planned: Mapping[str, PlannedLinear], layout: Layout) -> list[str]:
    """Every linear that stays in floating point, by its name in the model and, where that differs, on the hub."""
    section = edited(contents.config.quantization, exclude=(), overrides=())
    products = [one for one in plan_linears(edited(contents.config, quantization=section)) if one.weight not in planned]
    names = [name for linear in products for name in (_base(linear.weight), *_targets(linear, layout))]
    names += _numbered(products, planned, layout)
    modules = contents.model.named_modules()
    names += [name for name, module in modules if isinstance(module, nn.Linear) and f"{name}.weight" not in planned]
    return list(dict.fromkeys(names))


def _numbered(products: Iterable[PlannedLinear], planned: Iterable[str], layout: Layout) -> Iterator[str]:
    """Expressions for all that servers ask of experts: by a number behind their module, and names of their own.

    The module is the hub's, or the model's where a server runs the class of transformers itself.
    """
    kept = {weight.rpartition(".")[0] for weight in planned}
    for linear in products:
        module, names = linear.weight.rpartition(".")[0], [part.name for part in layout.get(linear.weight, ())]
        if linear.stack is not None and module not in kept:
            apart = re.match(r"(.*)\.\d+\.", names[0]) if len(names) > 1 else None
            yield from (f"{REGEX}{re.escape(at)}\\.\\d+\\." for at in (module, *([] if apart is None else [apart[1]])))
