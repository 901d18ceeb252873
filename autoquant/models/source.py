"""From MODEL, as a user names it, to a module of full size on the meta device."""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib
import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoquant.errors import AutoQuantError
from autoquant.library_patches import pytree
from autoquant.models.auto_classes import auto_class, class_by_name, kind_of, kinds_of, part_taken
from autoquant.models.checkpoint_source import ADAPTER, adapter_alone, read_settings_file
from autoquant.models.hub_errors import why_not
from autoquant.models.tasks import Kind
from autoquant.models.without_weights import WithoutWeights, drop_values_

PLACEHOLDER = re.compile(r"^(?:(?P<image>image|img|media)|(?P<audio>audio|sound)|(?P<video>video))\w*token_(id|index)$")
"""Fields that hold the token in whose place the features of an image, a sound or a film go."""

MAX_LAYERS = 10_000

HEADS = re.compile(r"heads?$|num_query_groups")
"""Fields that count heads."""

_WANTED = re.compile(r"requires the (\w+) library")
_NUMBERS = re.compile(r"layer_?(ids|idxs?|indices|numbers)$|_indexes$")
_DEPTH = re.compile(r"^(num_|n_)?(encoder_|decoder_|hidden_)?(layers?|blocks)$|^depth$")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What MODEL names: a transformers configuration, or a factory of modules."""

    name: str
    """MODEL as given."""
    config: Any = None
    """A transformers configuration, None for a factory. Copied before use: it never changes."""
    factory: Any = None
    """A callable returning ``(nn.Module, example_inputs)``, None for a configuration."""
    checkpoint: Path | None = None
    """The directory that MODEL names, where it names one."""
    trust_remote_code: bool = False
    repairs: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a default configuration that had to be changed for it to be built, with the new values."""
    kind: Kind | None = None
    """Which auto class builds it; None: the one that its configuration prefers."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A module in evaluation mode with inputs to call it by: ``module(*args, **kwargs)``."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    config: Any = None
    known: tuple[str, ...] = ()
    """Keyword inputs whose values are part of the structure: where images go, how they are cut."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Inputs that the model can take and that could not be made, each with the reason."""
    short: nn.Module | None = None
    """The same model with fewer positions, for which the inputs are; None: the module itself."""
    uncaptured: str | None = None
    """What capturing it with images or sound said, where the inputs are text alone for that."""
    unseen: bool = False
    """What some of the missing inputs would put into the model's stream is not seen."""


def named_source(model: str, *, trust_remote_code: bool = False) -> ModelSource:
    """What ``model`` names, as it is; see ``repair.find_source``. Nothing is built yet."""
    path = Path(model).expanduser()
    if path.is_file() or (path / "config.json").is_file():
        return _from_path(model, path, trust_remote_code)
    if ":" in model:
        return ModelSource(model, factory=_import_factory(model))
    return _from_name(model, trust_remote_code)


def named_type(model: str) -> str | None:
    """The model type that MODEL names, None where it is to be had from the hub alone, or is a factory."""
    from transformers import CONFIG_MAPPING

    path = Path(model).expanduser()
    with contextlib.suppress(OSError, ValueError):
        content = json.loads((path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8"))
        found = content.get("model_type") if isinstance(content, dict) else None
        return found if isinstance(found, str) else None
    return model if model in CONFIG_MAPPING else None


def limited(source: ModelSource, layers: int) -> ModelSource:
    """The first ``layers`` layers of a configuration. Raises AutoQuantError where it does not say how many it has."""
    if layers < 1:
        raise AutoQuantError(f"--layers: expected a positive number, got {layers}")
    if source.config is None:
        raise AutoQuantError(f"--layers: {source.name} is a factory, which alone decides its number of layers")
    config = copy.deepcopy(source.config)
    limit_layers(config, layers)
    return replace(source, config=config)


def build_structure(source: ModelSource) -> nn.Module:
    """The full-size module on the meta device: names, shapes and ties without weights. Raises AutoQuantError."""
    if source.config is None:
        return call_factory(source, torch.device("meta")).module
    module: nn.Module = build_module(source, source.config, torch.device("meta"), torch.float32)
    return module


def _from_path(model: str, path: Path, trust_remote_code: bool) -> ModelSource:
    from transformers import AutoConfig

    file = path / "config.json" if path.is_dir() else path
    content = read_settings_file(file)
    if not trust_remote_code:
        check_code(path, content)
        _require_known(f"{file}: model_type", content)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(
                file.parent if path.is_dir() else file, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # configuration classes check their values in many ways
        raise AutoQuantError(f"{file}: not a valid configuration: {one_line(error)}") from error
    _check_layers(file, config)
    return ModelSource(model, config, None, path if path.is_dir() else path.parent, trust_remote_code)


def _check_layers(file: Path, config: Any) -> None:
    """Raise AutoQuantError for more layers than a model has, of which the structure alone would take hours."""
    for part in sub_configs(config).values():
        for name in depths(part):
            if (layers := getattr(part, name)) > MAX_LAYERS:
                raise AutoQuantError(f"{file}: {name}: {layers:,}; at most {MAX_LAYERS:,} can be built")


def _from_name(model: str, trust_remote_code: bool) -> ModelSource:
    from transformers import CONFIG_MAPPING, AutoConfig

    if model in CONFIG_MAPPING:
        try:
            with quiet():
                return ModelSource(model, CONFIG_MAPPING[model](), trust_remote_code=trust_remote_code)
        except Exception as error:  # some defaults fail their own checks
            raise AutoQuantError(f"{model}: has no valid default configuration: {one_line(error)}") from error
    if Path(model).expanduser().is_dir():
        if (Path(model).expanduser() / ADAPTER).is_file():
            raise AutoQuantError(adapter_alone(Path(model)))
        raise AutoQuantError(f"{model}: expected a config.json in this directory, there is none")
    if model.startswith((".", "/", "~")) or model.endswith(".json"):
        raise AutoQuantError(f"{model}: no such file or directory")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # offline, unknown, gated, remote code: the hub client has many of its own
        nearest = _nearest(model.rpartition("/")[2])
        why = why_not(error) or one_line(error)
        raise AutoQuantError(
            f"{model}: not a folder, not a model type{nearest}, and not to be had from the hub: {why}"
        ) from error
    return ModelSource(model, config, trust_remote_code=trust_remote_code)


def check_code(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise AutoQuantError where the model of a ``config.json`` is code of its own."""
    from transformers import CONFIG_MAPPING

    code = settings.get("auto_map")
    if not isinstance(code, dict) or not code or settings["model_type"] in CONFIG_MAPPING:
        return
    files = sorted({str(name).partition(".")[0] + ".py" for name in code.values()})
    raise AutoQuantError(
        f"{path}: its model is code of its own ({', '.join(files)}); read it, and give --trust-remote-code to run it"
        f"{_known_class(settings)}"
    )


def _require_known(where: str, settings: Mapping[str, Any]) -> None:
    from transformers import CONFIG_MAPPING

    model_type = settings["model_type"]
    if model_type not in CONFIG_MAPPING:
        hint = _known_class(settings) or _nearest(model_type)
        raise AutoQuantError(f"{where}: transformers knows no {model_type!r}{hint}")


def _known_class(settings: Mapping[str, Any]) -> str:
    """A hint where transformers has the class that a ``config.json`` names, as that of another model type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = settings.get("architectures")
    types = {str(kind): name for name, kind in reversed(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())}
    found = next((kind for kind in named if kind in types), None) if isinstance(named, list) else None
    if found is None or types[found] == settings["model_type"]:
        return ""
    return f"; its class {found} is that of the model_type {types[found]!r}: a copy of the folder that says so may do"


def _nearest(model_type: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    close = difflib.get_close_matches(model_type.lower(), list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), 1)
    return f" (nearest: {close[0]!r})" if close else ""


def _import_factory(model: str) -> Any:
    module_name, _, name = model.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code
        raise AutoQuantError(f"{model}: cannot import {module_name}: {one_line(error)}") from error
    finally:
        sys.path.remove(here)
    factory = vars(module).get(name)
    if not callable(factory):
        close = difflib.get_close_matches(name, [key for key, value in vars(module).items() if callable(value)], 1)
        raise AutoQuantError(
            f"{model}: {module_name} has no callable {name!r}" + (f" (nearest: {close[0]!r})" if close else "")
        )
    return factory


def call_factory(source: ModelSource, device: torch.device) -> LoadedModel:
    """The module and inputs that a factory makes on ``device``. Raises AutoQuantError with what it said."""
    try:
        with torch.random.fork_rng(devices=()), WithoutWeights() if device.type == "meta" else device:
            made = source.factory()
    except Exception as error:  # the user's code
        raise AutoQuantError(f"{source.name}: {one_line(error)}") from error
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise AutoQuantError(f"{source.name}: expected (nn.Module, example_inputs), got {type(made).__name__}")
    module, example = made
    module.eval()
    if device.type == "meta":
        drop_values_(module)
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    if isinstance(example, Mapping):
        args, kwargs = (), dict(example)
    elif isinstance(example, tuple) and [type(part) for part in example] == [tuple, dict]:
        args, kwargs = example
    elif isinstance(example, tuple):
        args, kwargs = example, {}
    else:
        raise AutoQuantError(f"{source.name}: example inputs: expected a tuple or a dict, got {type(example).__name__}")
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), (args, kwargs))
    return LoadedModel(module, args, kwargs)


_CHUNK = 16
"""Tokens that a scan over the sequence takes at once, at most. It shapes no parameter and changes no result."""
LONGEST_SCAN = 65_536
"""Tokens that one chunk of a scan may have; longer ones are of the samples of a sound."""


def build_module(source: ModelSource, config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of ``config``, which is copied, by its auto class, in evaluation mode. Raises AutoQuantError."""
    config = copy.deepcopy(config)
    kind = source.kind or _kind(source, config)
    if kind == "causal-lm":
        for part in (config, text_config(config)):
            if "is_decoder" in vars(part):  # encoder types attend to the left only if told so
                part.is_decoder = True
    for part in sub_configs(config).values():
        part.use_cache = False
        if vars(part).get("num_key_value_heads", 0) is None:  # documented as "as many as num_attention_heads"
            part.num_key_value_heads = part.num_attention_heads
        for name, value in list(vars(part).items()):
            if name.endswith("chunk_size") and type(value) is int and value <= LONGEST_SCAN:
                setattr(part, name, min(value, _CHUNK))  # scans pad a few tokens to whole chunks
    for attention in ("sdpa", "eager"):
        try:
            with quiet(), torch.random.fork_rng(devices=()), device:
                module = _from_config(kind, copy.deepcopy(config), attention, dtype, source.trust_remote_code)
            break
        except Exception as error:  # construction runs the architecture's own code
            if attention == "sdpa" and isinstance(error, ValueError):
                continue  # how a class says that it has no such attention
            raise AutoQuantError(f"{source.name}: cannot be built ({kind}): {what_failed(error, config)}") from error
    return module.eval()


def _from_config(kind: Kind, config: Any, attention: str, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    part, named = part_taken(kind, config), class_by_name(kind, config)
    if part is not None or named is not None:
        architecture = named or auto_class(kind)._model_mapping[type(config)]
        return architecture._from_config(config if part is None else part, attn_implementation=attention, dtype=dtype)
    return auto_class(kind).from_config(
        config, attn_implementation=attention, dtype=dtype, trust_remote_code=trust_remote_code
    )


def _kind(source: ModelSource, config: Any) -> Kind:
    try:
        return kind_of(config)
    except AutoQuantError as error:
        raise AutoQuantError(f"{source.name}: {error.message}") from None


def sub_configs(config: Any) -> dict[str, Any]:
    """A configuration (``''``) and those that it holds, by dotted path."""
    found = {"": config}
    for name, value in vars(config).items():
        if callable(getattr(value, "to_dict", None)) and hasattr(value, "model_type"):
            found |= {f"{name}.{path}".rstrip("."): part for path, part in sub_configs(value).items()}
    return found


def limit_layers(config: Any, layers: int) -> None:
    """Cut encoder and decoder to the first ``layers`` layers, every per-layer list of the configuration with them."""
    config = text_config(config)
    before = layer_count(config)
    if before is None:
        raise AutoQuantError(f"--layers: a configuration of type {config.model_type!r} has no num_hidden_layers")
    if config.is_encoder_decoder:
        for name in depths(config):
            limit_depth(config, name, layers)
    layers = min(layers, before)
    try:
        limit_depth(config, _depth_field(config), layers)
    except NotImplementedError as error:  # a property that can be read alone: the fields behind it are cut
        for name in depths(config):
            limit_depth(config, name, layers)
        if layer_count(config) == layers:
            return
        raise AutoQuantError(f"--layers: a configuration of type {config.model_type!r}: {one_line(error)}") from error


def depths(config: Any) -> list[str]:
    """The fields of a configuration that count layers."""
    return [name for name, value in vars(config).items() if type(value) is int and _DEPTH.search(name)]


def limit_depth(config: Any, name: str, layers: int) -> None:
    """Cut one stack of layers, and every list that has an entry for each of them or holds numbers of them."""
    before = getattr(config, name)
    for key, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == before and key != "architectures":
            setattr(config, key, value[:layers])
        elif numbers_layers(key, value, before) and min(value) < layers:
            setattr(config, key, type(value)(number for number in value if number < layers))
        elif key.endswith("shared_layers") and type(value) is int:  # the last ones, which reuse what others made
            setattr(config, key, round(value * layers / before))
    setattr(config, name, min(layers, before))


def numbers_layers(key: str, value: Any, count: int) -> bool:
    """True if a field lists some of ``count`` layers by number: ``hybrid_layer_ids``, ``deepstack_visual_indexes``."""
    if not isinstance(value, list | tuple) or not value or _NUMBERS.search(key) is None:
        return False
    ascending = all(type(number) is int for number in value) and sorted(set(value)) == list(value)
    return ascending and value[0] >= 0 and value[-1] < count


def text_config(config: Any) -> Any:
    """The language model's part of a configuration of several, else the configuration itself.

    Where there are several language models, the one that the class registered for its type is made from.
    """
    try:
        return config.get_text_config()
    except ValueError as error:
        kinds = kinds_of(config)
        part = part_taken(kinds[0], config) if kinds else None
        if part is not None:
            return part
        raise AutoQuantError(
            f"a configuration of type {config.model_type!r} holds several language models and does not say which "
            f"one is meant: {one_line(error)}"
        ) from error


def layer_count(config: Any) -> int | None:
    """Number of layers; None where the configuration has no field for it, or several without the standard one."""
    config = text_config(config)
    found = getattr(config, _depth_field(config), None)
    return found if type(found) is int else None


def _depth_field(config: Any) -> str:
    """The field that counts the layers: the standard one, else the only one that counts layers at all."""
    counts = depths(config)
    standard = standard_field(config, "num_hidden_layers") is not None or len(counts) != 1
    return "num_hidden_layers" if standard else counts[0]


def standard_field(config: Any, name: str) -> int | None:
    """An integer field by its standard name, which the configuration's ``attribute_map`` translates."""
    value = vars(config).get(type(config).attribute_map.get(name, name))
    return value if type(value) is int else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings and no log lines from transformers and the hub client."""
    threshold = logging.root.manager.disable
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.CRITICAL)
            yield
    finally:
        logging.disable(threshold)


def what_failed(error: Exception, config: Any) -> str:
    """Why a model of a configuration cannot be built: the field whose value was looked up and not found, if it is one,
    or the packages that it wants, else the error in one line.
    """
    if isinstance(error, ImportError) and (wanted := dict.fromkeys(_WANTED.findall(str(error)))):
        return f"it needs {' and '.join(wanted)}: pip install 'autoquant[multimodal]', or these packages"
    if (unset := _unset(error, config)) is not None:
        return f"{unset} is not set, and has no default: give a config.json that sets it"
    if isinstance(error, KeyError) and error.args and isinstance(error.args[0], str):
        for path, part in sub_configs(config).items():
            for name, value in vars(part).items():
                held = value if isinstance(value, dict) else {name: value}
                for field_, one in held.items():
                    if one == error.args[0]:
                        where = ".".join(filter(None, (path, name if held is not value else f"{name}.{field_}")))
                        return f"{where}: {one!r} is none that transformers knows"
    return one_line(error)


def _unset(error: Exception, config: Any) -> str | None:
    """The field that a line of the model's own code looks into and that is None, if that is what failed."""
    line = (traceback.extract_tb(error.__traceback__) or [None])[-1]
    named = re.search(r"\bconfig\.([\w.]+)\[", line.line or "") if line is not None else None
    if named is None or not isinstance(error, TypeError):
        return None
    *path, name = named[1].split(".")
    part = sub_configs(config).get(".".join(path))
    return named[1] if part is not None and getattr(part, name, 0) is None else None


def one_line(error: BaseException | None) -> str:
    """An exception as one line of text, for a message of ours."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(str(error).split())[:300])
    return f"{type(error).__name__}: {text}"
