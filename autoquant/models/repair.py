"""Default configurations that cannot be built or run, made usable by what their own fields and the errors say.

Many model types have no default size that anybody ever built: a number of experts is None, a check refuses the default,
one part of the configuration lacks what another part has. A repair is derived from the fields beside it. Only the
default configuration of a model type is ever repaired, never one that was given, and every repair is reported.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from autoquant.errors import AutoQuantError
from autoquant.library_patches import DataDependentOutputException, FakeTensorMode
from autoquant.models import source as naming
from autoquant.models.auto_classes import kinds_of
from autoquant.models.build import changed
from autoquant.models.defaults import changes_for_images, fit_parts_
from autoquant.models.inputs import make_inputs, reads_text
from autoquant.models.load import as_stored
from autoquant.models.source import (
    HEADS,
    ModelSource,
    build_module,
    build_structure,
    layer_count,
    limit_layers,
    quiet,
    standard_field,
    sub_configs,
    text_config,
)
from autoquant.models.structure import structure_of
from autoquant.models.tasks import Kind

_MOST = 8  # repairs of one configuration

_HEAD_SIZE = re.compile(r"head_?dim$|d_head|head_size|kv_channels|dim_head")
_EXPERTS = re.compile(r"experts?$|num_experts|expert_num")
_EXPERTS_PER_TOKEN = re.compile(r"per_tok$|moe_k$|moe_topk|top_k")
_DEMAND = re.compile(r"(\w+) must be (\w+), got")
_SPLIT = re.compile(r"split_sizes to sum exactly to (\d+) .* got split_sizes=\[([\d, ]+)\]")
_MISSING = re.compile(r"'(\w+)' object has no attribute '(\w+)'")
_NO_MAPPING = re.compile(r"'NoneType' object has no attribute '(get|keys|values|items)'")
_NO_LIST = re.compile(r"object of type 'NoneType' has no len\(\)|'NoneType' object is not iterable")
_LOOKED_UP = re.compile(r"\bconfig\.([\w.]+)\[[\"'](\w+)[\"']\]")
_NOT_SET = re.compile(r"Could not find a `(\w+)` argument in the config, or it is not set")
_UNEVEN = re.compile(
    r"must be divisible by|size of tensor a .* must match|Attempting to broadcast a dimension of length"
)


@dataclass(frozen=True, slots=True)
class Repair:
    """A field of a configuration, or of the part of it that ``part`` numbers, and its new value."""

    part: int
    name: str
    value: Any
    beside: Repair | None = None
    """Another one without which it does not help, and which does not help without it."""

    def apply(self, config: Any) -> Any:
        """A changed copy."""
        changed = copy.deepcopy(config) if self.beside is None else self.beside.apply(config)
        setattr(_parts(changed)[self.part], self.name, copy.deepcopy(self.value))
        return changed

    def changes(self) -> dict[str, Any]:
        """The new value of every field that it changes."""
        return {**({} if self.beside is None else self.beside.changes()), self.name: self.value}


def find_source(
    model: str, *, layers: int | None = None, trust_remote_code: bool = False, kind: Kind | None = None
) -> ModelSource:
    """Find out what ``model`` names.

    One of: a directory with a ``config.json`` or such a file, ``package.module:factory`` (imported with the working
    directory on the path), a transformers model type (its default configuration), a hub id. ``layers`` limits the
    number of layers of a configuration; ``kind`` names the auto class that builds it. A few layers of a default
    configuration are run without memory, and it is repaired where they refuse: ``repairs`` of the result says how.

    Raises :class:`AutoQuantError` with what was tried and the nearest model type.
    """
    try:
        source = _named(model, trust_remote_code, kind)
    except AutoQuantError as error:
        made = _as_demanded(model, error)
        if made is None:
            raise
        source = replace(made, kind=kind)
    source = as_stored(source)
    if source.config is not None and source.checkpoint is None and _is_type(model):
        for repair in find_repairs(source) if source.repairs else _type_repairs(model, kind):
            source = replace(
                source,
                config=repair.apply(source.config),
                repairs={**source.repairs, **repair.changes()},
            )
        if changes := changes_for_images(source):
            source = replace(source, config=changed(source.config, changes), repairs={**source.repairs, **changes})
    return source if layers is None else naming.limited(source, layers)


def of_structure(folder: str, fingerprint: str, *, trust_remote_code: bool = False) -> ModelSource:
    """The model of a checkpoint, of that kind whose structure has the ``fingerprint``; the preferred where none has."""
    source = find_source(folder, trust_remote_code=trust_remote_code)
    for kind in kinds_of(source.config):
        with contextlib.suppress(AutoQuantError):
            one = replace(source, kind=kind)
            if structure_of(build_structure(one)).fingerprint == fingerprint:
                return one
    return source


def _named(model: str, trust_remote_code: bool, kind: Kind | None) -> ModelSource:
    """What ``model`` names, the parts of a model type's default configuration made to fit."""
    source = replace(naming.named_source(model, trust_remote_code=trust_remote_code), kind=kind)
    if source.config is None or source.checkpoint is not None or not _is_type(model):
        return source
    return replace(source, repairs=fit_parts_(source.config))


def _is_type(model: str) -> bool:
    from transformers import CONFIG_MAPPING

    return model in CONFIG_MAPPING


def _as_demanded(model: str, refusal: AutoQuantError) -> ModelSource | None:
    """The default configuration with the values that its own checks demand; None where that is not what is wrong."""
    from transformers import CONFIG_MAPPING

    error, kind = refusal.__cause__, CONFIG_MAPPING[model] if _is_type(model) else None
    given: dict[str, Any] = {}
    demands: dict[str, Any] = {}
    while kind is not None and len(demands) < _MOST:
        demand = _DEMAND.search(str(error))
        owner = _owner(kind, demand[1]) if demand else None
        if demand is None or owner is None or demand[1] in demands:
            return None
        demands[demand[1]] = _literal(demand[2])
        (given if owner == "" else given.setdefault(owner, {}))[demand[1]] = demands[demand[1]]
        try:
            with quiet():
                return ModelSource(model, kind(**copy.deepcopy(given)), repairs=demands)
        except Exception as again:  # configuration classes check their values in many ways
            error = again
    return None


def _owner(kind: Any, name: str) -> str | None:
    """The part of a configuration class that has a field, '' for the class itself; None where none has it."""
    from transformers import CONFIG_MAPPING

    if name in _field_names(kind):
        return ""
    for part, described in getattr(kind, "sub_configs_defaults", {}).items():
        own = CONFIG_MAPPING[described.model_type] if _is_type(described.model_type) else described.config_class
        if name in _field_names(own):
            return str(part)
    return None


def _field_names(kind: Any) -> frozenset[str]:
    return frozenset(getattr(kind, "__dataclass_fields__", {}))


def _literal(text: str) -> Any:
    named = {"True": True, "False": False, "None": None}
    return named[text] if text in named else int(text) if text.isdigit() else text


@functools.cache
def _type_repairs(model: str, kind: Kind | None) -> tuple[Repair, ...]:
    """Repairs of a model type's default configuration, found once in a process."""
    return find_repairs(_named(model, False, kind))


def find_repairs(source: ModelSource) -> tuple[Repair, ...]:
    """What to change for a few layers to build and run; nothing where that is not enough.

    A change is kept if it removes what was in the way; what comes up next is treated alike.
    """
    config = source.config
    found: list[Repair] = []
    error = refusal(source, config)
    while error is not None and len(found) < _MOST:
        for repair in _proposals(config, error):
            try:
                trial = repair.apply(config)
            except Exception:  # configuration classes check their values in many ways
                continue
            left = refusal(source, trial)
            if left is None or (type(left), str(left)) != (type(error), str(error)):
                config, error = trial, left
                found.append(repair)
                break
        else:
            return ()
    return tuple(found) if error is None else ()


def refusal(source: ModelSource, config: Any) -> Exception | None:
    """Why a few layers of a configuration, of every kind, cannot be built and run without memory, None where they can.

    A RuntimeError says that values decide the way, or that there is no kernel, and nothing about the configuration,
    unless it is about the sizes that a tensor is to be cut into, or about heads that do not make up a width.
    """
    try:
        config = copy.deepcopy(config)
        if layer_count(config) is not None:
            limit_layers(config, _every_kind(text_config(config)))
        with FakeTensorMode():
            module = build_module(source, config, torch.device("cpu"), torch.float32)
            if not reads_text(module):
                return None
            inputs = make_inputs(module, torch.device("cpu"), (1, 3), torch.float32, media=False)
            with quiet(), torch.random.fork_rng(devices=()), torch.no_grad():
                module(**inputs.kwargs)
    except RuntimeError as error:
        return error if _SPLIT.search(str(error)) or any(_even(config, error)) else None
    except DataDependentOutputException:
        return None
    except AutoQuantError as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        return None if isinstance(cause, DataDependentOutputException) else cause
    except Exception as error:  # the architecture's own code
        return error
    return None


def _every_kind(config: Any) -> int:
    """How many layers hold every value of every list that has an entry for each layer, two at least."""
    count = layer_count(config)
    lists = [value for value in vars(config).values() if isinstance(value, list | tuple) and len(value) == count]
    return max([2, *(values.index(value) + 1 for values in lists for value in values)])


def _proposals(config: Any, error: Exception) -> Iterator[Repair]:
    """Whatever may help against ``error``."""
    missing, split = _MISSING.search(str(error)), _SPLIT.search(str(error))
    yield from _even(config, error)
    yield from _looked_up(config, error)
    for number, part in enumerate(_parts(config)):
        fields = vars(part)
        if missing and type(part).__name__ == missing[1]:
            for value in _elsewhere(config, missing[2]):
                yield Repair(number, missing[2], value)
        if _NO_LIST.search(str(error)):
            yield from _sections(number, part)
        if split:
            sections = [int(size) for size in split[2].split(",")]
            yield from _turned_in_part(number, fields, int(split[1]), sections)
            yield from _turned_in_whole(number, part, int(split[1]), sections)
        if isinstance(error, KeyError) and error.args:
            keys = next((v for v in fields.values() if isinstance(v, list) and error.args[0] in v), ())
            for name, value in fields.items():
                if keys and isinstance(value, dict):  # one for all, where one for each is looked up
                    yield Repair(number, name, dict.fromkeys(keys, value or _rotary(part)))
        for name, value in fields.items():
            if value is None:
                yield from (
                    Repair(number, name, derived) for derived in (*_empty(part, name, error), *_derived(part, name))
                )
        unset = _NOT_SET.search(str(error))
        if unset and fields.get(unset[1], 0) is None and (longest := fields.get("max_position_embeddings")):
            yield Repair(number, unset[1], longest)  # a window, of the whole text: it hides nothing
    for number, part in enumerate(_parts(config)):
        for name, value in vars(part).items():
            if name.endswith("_types") and isinstance(value, list):  # without the kind of layer that lacks a size
                for old, new in itertools.permutations(dict.fromkeys([*_layer_types(part), *value]), 2):
                    if old in value:
                        yield Repair(number, name, [new if kind == old else kind for kind in value])


def _looked_up(config: Any, error: Exception) -> Iterator[Repair]:
    """For a mapping that is None where a line of the model's code looks up a size in it: what a model of that part
    calls so itself. The part is as it is or, where it has no such size, what the mapping's description is about.
    """
    line = (traceback.extract_tb(error.__traceback__) or [None])[-1]
    found = _LOOKED_UP.search(line.line or "") if line is not None and isinstance(error, TypeError) else None
    if found is None:
        return
    path, _, name = found[1].rpartition(".")
    part, size_name = sub_configs(config).get(path), found[2]
    number = next((number for number, other in enumerate(_parts(config)) if other is part), None)
    if part is None or number is None or vars(part).get(name, 0) is not None:
        return
    if (size := _size_called(part, size_name)) is not None:
        yield Repair(number, name, {size_name: size})
    about = re.search(rf"`{name}=[^`]*`\s+for\s+`(?:[^`/]*/)?([^`/]+)`", type(part).__doc__ or "")
    others = [Repair(number, field, about[1]) for field in sorted(_own_texts(part))] if about is not None else []
    for other in others:
        if (size := _size_called(_parts(other.apply(config))[number], size_name)) is not None:
            yield Repair(number, name, {size_name: size}, other)


def _own_texts(part: Any) -> list[str]:
    """Fields of a configuration that hold a text, and that not every configuration has."""
    from transformers import PreTrainedConfig

    own = _field_names(type(part)) - _field_names(PreTrainedConfig)
    return [name for name in own if type(vars(part).get(name)) is str]


def _size_called(config: Any, name: str) -> int | None:
    """The size that a model of a part of a configuration calls ``name``; None where it has none, or cannot be built."""
    from transformers import AutoModel

    with contextlib.suppress(Exception), quiet(), torch.device("meta"):  # the architecture's own code
        sizes = (vars(module).get(name) for module in AutoModel.from_config(copy.deepcopy(config)).modules())
        return next((size for size in sizes if type(size) is int), None)
    return None


def _turned_in_part(number: int, fields: Mapping[str, Any], size: int, sections: Sequence[int]) -> Iterator[Repair]:
    """Rotary embeddings of a part of each head, where their sections are for that and take up less than the whole."""
    for name, value in fields.items():
        if isinstance(value, dict) and "rope_theta" in value and sum(sections) < size:
            yield Repair(number, name, {**value, "partial_rotary_factor": sum(sections) / size})


def _turned_in_whole(number: int, config: Any, size: int, sections: Sequence[int]) -> Iterator[Repair]:
    """Heads as large as the sections of their rotary embeddings ask for, where their size is not set."""
    turned = vars(config).get("rope_parameters")
    if isinstance(turned, dict) and sum(sections) > size and standard_field(config, "head_dim") is None:
        yield Repair(number, "head_dim", round(2 * sum(sections) / turned.get("partial_rotary_factor", 1)))


def _sections(number: int, config: Any) -> Iterator[Repair]:
    """Sections of rotary embeddings where the configuration knows the key and has none: four alike, for the place in
    the text, two in the image, and time.
    """
    head, known = standard_field(config, "head_dim"), getattr(type(config), "ignore_keys_at_rope_validation", None)
    for name, value in vars(config).items():
        if isinstance(value, dict) and "rope_theta" in value and head and head % 8 == 0:
            for key in sorted(key for key in known or () if key.endswith("_section") and key not in value):
                yield Repair(number, name, {**value, key: [head // 8] * 4})


def _even(config: Any, error: Exception) -> Iterator[Repair]:
    """The nearest number of heads that makes up a width, where a number that does not is what ``error`` is about."""
    said = {int(number) for number in re.findall(r"\d+", str(error))} if _UNEVEN.search(str(error)) else set()
    for number, part in enumerate(_parts(config) if said else ()):
        heads, hidden = standard_field(part, "num_attention_heads"), standard_field(part, "hidden_size")
        if not heads or not hidden or hidden % heads == 0 or standard_field(part, "head_dim"):
            continue
        if said >= {heads, hidden} or hidden // heads in said:
            keys = standard_field(part, "num_key_value_heads") or 1
            fitting = (count for count in range(1, hidden) if hidden % (2 * count) == 0 and count % keys == 0)
            name = type(part).attribute_map.get("num_attention_heads", "num_attention_heads")
            for nearest in sorted(fitting, key=lambda count: (abs(count - heads), -count))[:1]:
                yield Repair(number, name, nearest)


def _empty(config: Any, name: str, error: Exception) -> Iterator[Any]:
    """For a field that ``error`` misses: an empty list or mapping where it is declared as one, and for a text the
    example that its description gives.
    """
    from transformers import PreTrainedConfig

    field = getattr(type(config), "__dataclass_fields__", {}).get(name)
    if field is None or name in _field_names(PreTrainedConfig):
        return
    declared = str(field.type)
    if _NO_MAPPING.search(str(error)) and re.search(r"\bdict\b", declared):
        yield {}
    if _NO_LIST.search(str(error)) and re.search(r"\blist\b", declared):
        yield []
    if "NoneType" not in str(error):
        return
    described = re.search(rf"^( *){name} \(`?str\b.*\n((?:\1 +.*\n)+)", type(config).__doc__ or "", re.MULTILINE)
    example = re.search(r"e\.g\.,? `\"([^\"]+)\"`", described[2]) if described else None
    if example and re.search(r"\bstr\b", declared):
        yield example[1]


def _derived(config: Any, name: str) -> Iterator[Any]:
    """Values for a field that is not set, from what it is called and from the fields beside it."""
    heads, hidden = standard_field(config, "num_attention_heads"), standard_field(config, "hidden_size")
    layers = standard_field(config, "num_hidden_layers")
    if _HEAD_SIZE.search(name) and heads and hidden:
        yield hidden // heads
    elif HEADS.search(name) and heads:
        yield heads
    elif _EXPERTS_PER_TOKEN.search(name):
        yield 2
    elif _EXPERTS.search(name):
        yield 1 if "shared" in name else 8
    elif re.search(r"intermediate_size$|ffn_dim$", name) and hidden:
        yield 4 * hidden
    elif name.startswith("clip"):
        yield 8.0
    elif name.startswith("default_") and (choices := vars(config).get(f"{name.removeprefix('default_')}s")):
        yield next(iter(choices))
    elif name.endswith("_types") and layers and (kinds := _layer_types(config, name)):
        yield [kinds[layer % len(kinds)] for layer in range(layers)]


def _rotary(config: Any) -> dict[str, Any]:
    """What the library takes for rotary embeddings that nothing is said about."""
    return {"rope_type": "default", "rope_theta": getattr(config, "default_theta", 10_000.0)}


def _layer_types(config: Any, field: str = "") -> list[str]:
    """The library's kinds of layer that the architecture's own code names; where it has a list for ``field``, those."""
    from transformers import AutoModelForCausalLM, configuration_utils

    if field.startswith("mlp_"):
        return list(getattr(configuration_utils, "ALLOWED_MLP_LAYER_TYPES", ()))
    try:
        architecture = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        return []
    code = inspect.getsource(sys.modules[architecture.__module__])
    return [kind for kind in configuration_utils.ALLOWED_LAYER_TYPES if re.search(rf"""["']{kind}["']""", code)]


def _elsewhere(config: Any, name: str) -> Iterator[Any]:
    """Values that any part of a configuration has under ``name``."""
    for part in _parts(config):
        for key, value in vars(part).items():
            if key == name:
                yield value
            elif isinstance(value, Mapping) and name in value:
                yield value[name]


def _parts(config: Any) -> list[Any]:
    """The configuration and the ones inside it, each once."""
    from transformers import PreTrainedConfig

    found = [config]
    with contextlib.suppress(AutoQuantError):
        found.append(text_config(config))
    found += [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return list({id(part): part for part in found}.values())
