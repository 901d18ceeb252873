"""The one loader of models: a checkpoint's own weights as a module, every weight of it accounted for.

Whatever reads weights goes through here, so that every command and ``autoquant.load`` refuse the same folders in the
same words: weights that are missing or of another shape (transformers would make them random numbers), sources that are
quantized already, code of their own that is not trusted, pickles, adapters without their model.
"""

from __future__ import annotations

import copy
import math
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoquant.capture.identity import ties_of
from autoquant.config.spelling import did_you_mean
from autoquant.errors import AutoQuantError
from autoquant.io.safetensors_stream import Shards
from autoquant.models.auto_classes import auto_class, kinds_of
from autoquant.models.build import with_inputs
from autoquant.models.checkpoint_source import (
    ADAPTER,
    checkpoint_folder,
    is_scaled,
    open_checkpoint,
    quantization_method,
    read_settings,
)
from autoquant.models.reduce import failure_of
from autoquant.models.source import (
    LoadedModel,
    ModelSource,
    build_structure,
    depths,
    named_source,
    one_line,
    quiet,
    sub_configs,
    what_failed,
)
from autoquant.models.structure import record_untied_, structure_of

BATCH, TOKENS = 2, 16


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model, and the stored tensors that its class has no place for."""

    model: Any
    unplaced: tuple[str, ...]


_SMALL = 1_000_000
"""Parameters that are of no matter, whatever a file holds."""
_NAMED = 5
"""Weights named in a message; of the others the number is said."""
OLD_BUFFER = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$")
"""Names of what classes kept in checkpoints once and now compute."""
_LEFT_OUT = (ADAPTER, ".metadata", "*.distcp")
"""What transformers would load in place of the weights, or beside them, and what of it is a pickle."""


def load_language_model(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    quantized: bool = False,
) -> Any:
    """A folder's or hub id's model, by its own auto class, in evaluation mode; ``dtype`` None: as its config says.

    ``quantized``: take also what is quantized already and transformers can load. Warns of tensors that the class has no
    place for, of a wrapper's prefix, and of embeddings that are tied by the config and not in the file.

    Raises AutoQuantError where it cannot be loaded, and where a weight is missing or has another shape.
    """
    folder = checkpoint_folder(source, trust_remote_code=trust_remote_code)
    return _load(folder, dtype, device, trust_remote_code, quantized).model


def load_checkpoint(folder: Path, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False) -> Any:
    """What :func:`load_language_model` does, by the checkpoint's own auto class."""
    return load_with_unplaced(folder, dtype, trust_remote_code=trust_remote_code).model


def load_with_unplaced(folder: Path, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False) -> Loaded:
    """The model of a folder, and which of its tensors the class has no place for."""
    return _load(folder, dtype, None, trust_remote_code, quantized=False)


def load_weights(
    folder: Path, dtype: torch.dtype = torch.float64, seed: int = 0, *, trust_remote_code: bool = False
) -> LoadedModel:
    """The checkpoint in ``folder``, by its own auto class, on the CPU and in evaluation mode, with inputs to call it.

    Inputs are random: token ids [2, 16], or one such sequence with an image or a sound. Raises AutoQuantError where it
    cannot be loaded or run.
    """
    model = load_checkpoint(folder, dtype, trust_remote_code=trust_remote_code)
    model.config.use_cache = False
    made = with_inputs(model, torch.device("cpu"), dtype, (BATCH, TOKENS), seed)
    failure = None
    # Grouped matrix products, the default for experts, have no float64 kernel everywhere.
    for experts in (None, "batched_mm", "eager"):
        model.set_experts_implementation(experts)
        failure = failure_of(made)
        if failure is None:
            return made
    raise AutoQuantError(f"{folder}: cannot be run in {dtype}: {one_line(failure)}") from failure


def load_skeleton(folder: Path, *, trust_remote_code: bool = False) -> nn.Module:
    """The checkpoint's model on the meta device: names, shapes and ties without weights.

    Parameters that the config ties and the file holds different values of are untied, as :func:`load_checkpoint` has
    them. Raises AutoQuantError as that does, except for weights, which are not compared.
    """
    shards = open_checkpoint(folder)
    config = load_settings(folder, trust_remote_code=trust_remote_code)
    check_depth(folder, config, shards)
    module = build_structure(ModelSource(str(folder), config, None, folder, trust_remote_code))
    for name in _differing(module, shards):
        owner, _, last = name.rpartition(".")
        empty = torch.empty_like(module.get_parameter(name))
        module.get_submodule(owner)._parameters[last] = nn.Parameter(empty, requires_grad=False)
        _say_untied_(module, folder, name)
    return module


def as_stored(source: ModelSource) -> ModelSource:
    """A checkpoint's source whose configuration ties embeddings only where the file holds no different ones.

    Any other source, and a folder without readable weights, is returned as it is.
    """
    folder = source.checkpoint
    parts = sub_configs(source.config).values() if source.config is not None else ()
    if folder is None or not any(vars(part).get("tie_word_embeddings") for part in parts):
        return source
    try:
        shards = open_checkpoint(folder)
    except AutoQuantError:  # a configuration alone, or weights that only their reader has to understand
        return source
    differing = _differing(build_structure(source), shards)
    if not differing:
        return source
    config = copy.deepcopy(source.config)
    for part in sub_configs(config).values():
        if hasattr(part, "tie_word_embeddings"):
            part.tie_word_embeddings = False
    _warn_untied(folder, differing[0])
    return replace(source, config=config)


def _differing(module: nn.Module, shards: Shards) -> list[str]:
    """Names of tied parameters of which the file holds other values than of the first of their group."""
    found: list[str] = []
    for group in ties_of(module):
        first, *others = [name for name in group if name in shards.entries] or [""]
        found += [name for name in others if not _same(shards.read(first), shards.read(name))]
    return found


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True if two tensors hold the same values, NaNs included, in whatever dtypes."""
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=0, atol=0, equal_nan=True)


def load_settings(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """A checkpoint's configuration. Kernels that it names are not fetched: its attention is left to transformers.

    Raises AutoQuantError where it cannot be read, and where it is code of its own that is not trusted.
    """
    scaled = is_scaled(read_settings(folder))
    config = named_source(str(folder), trust_remote_code=trust_remote_code).config
    for part in sub_configs(config).values() if scaled else ():
        vars(part).pop("quantization_config", None)  # the weights are read as the numbers that they stand for
    for part in sub_configs(config).values():
        named = getattr(part, "_attn_implementation", None)
        if named not in (None, "sdpa", "eager"):
            warnings.warn(f"{folder}: its attention {named!r} is not fetched; that of torch is used", stacklevel=2)
            config._attn_implementation = None
            part._attn_implementation = None
    return config


def check_depth(folder: Path, config: Any, shards: Shards) -> None:
    """Raise AutoQuantError for more layers than the file has tensors: to build them would take for ever."""
    for part in sub_configs(config).values():
        for name in depths(part):
            if getattr(part, name) > len(shards.entries):
                raise AutoQuantError(
                    f"{folder}: config.json says {name} {getattr(part, name)}, the file holds {len(shards.entries)} "
                    "tensors: they do not belong together"
                )


def _check_size(folder: Path, config: Any, shards: Shards, trust_remote_code: bool, most: int) -> None:
    """Raise AutoQuantError for a configuration of ``most`` times what the file holds: transformers would make it."""
    try:
        described = structure_of(build_structure(ModelSource(str(folder), config, None, folder, trust_remote_code)))
    except AutoQuantError:  # the loading itself says what is wrong
        return
    held = sum(math.prod(entry.shape) for entry in shards.entries.values())
    if described.parameters > most * held + _SMALL:
        raise AutoQuantError(
            f"{folder}: config.json describes {described.parameters:,} parameters, the file holds {held:,}: they do "
            "not belong together"
        )


def build_empty(folder: Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """The folder's model without weights, by its own auto class, in evaluation mode: parameters on the meta device,
    buffers with their values, generation settings as the folder has them. Raises AutoQuantError.
    """
    config = load_settings(folder, trust_remote_code=trust_remote_code)
    kind = auto_class((kinds_of(config) or ("causal-lm",))[0])
    try:
        with quiet(), parameters_on_meta():
            model: Any = kind.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
            _take_generation_settings_(model, folder)
    except Exception as error:  # construction runs the architecture's own code
        raise AutoQuantError(f"{folder}: its model cannot be built: {what_failed(error, config)}") from error
    return model.eval()


def _take_generation_settings_(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def built_anew(model: Any) -> Any:
    """Another model of the class and configuration of ``model``, as :func:`build_empty` has it."""
    with quiet(), parameters_on_meta():
        made: Any = type(model)(copy.deepcopy(model.config))
    return made.eval()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built in this context have their parameters on the meta device; buffers keep their real values."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    patched: Any = nn.Module
    patched.register_parameter = register_on_meta
    try:
        yield
    finally:
        patched.register_parameter = register


def hide_progress() -> None:
    """Switch off the progress bars of transformers, one for each model's weights."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _load(
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    trust_remote_code: bool,
    quantized: bool,
) -> Loaded:
    shards = open_checkpoint(folder, quantized=quantized)
    config = load_settings(folder, trust_remote_code=trust_remote_code)
    check_depth(folder, config, shards)
    _check_size(folder, config, shards, trust_remote_code, most=16 if quantized else 4)
    tasks = kinds_of(config)
    hide_progress()
    prefix = {f"^{re.escape(shards.prefix)}": ""} if shards.prefix else None
    try:
        with _plain_view(folder) as view, quiet():
            numbers, kind = None, auto_class((tasks or ("causal-lm",))[0])
            if shards.scaled:  # transformers takes tensors in place of a folder by the class itself alone
                numbers = {name: shards.read(name) for name in shards.entries}
                kind = type(build_structure(ModelSource(str(folder), config, None, folder, trust_remote_code)))
            model, info = kind.from_pretrained(
                view if numbers is None else None,
                config=config,
                dtype=dtype or "auto",
                use_safetensors=True,
                weights_only=True,
                state_dict=numbers,
                ignore_mismatched_sizes=True,  # told below, with the others
                output_loading_info=True,
                key_mapping=prefix,
                **({"trust_remote_code": trust_remote_code} if numbers is None else {}),
            )
            if numbers is not None:
                _take_generation_settings_(model, folder)
    except Exception as error:  # the checkpoint's format, its configuration, or the architecture's own code
        raise AutoQuantError(f"{folder}: cannot be loaded: {what_failed(error, config)}") from error
    if prefix is not None:  # else it would be put before the names again when the model is saved
        kept = [c for c in model._weight_conversions if prefix.keys().isdisjoint(c.source_patterns)]
        model._weight_conversions = kept
    model.config.name_or_path = model.name_or_path = str(folder)
    declared = quantized and quantization_method(read_settings(folder)) is not None
    left = _check_weights(folder, shards, model, info, declared)
    return Loaded(model.eval() if device is None else model.eval().to(device), left)


@contextmanager
def _plain_view(folder: Path) -> Iterator[Path]:
    """The folder, or where it holds what is not to be loaded a temporary one with links to everything else."""
    hidden = {path.name for pattern in _LEFT_OUT for path in folder.glob(pattern)}
    if not hidden:
        yield folder
        return
    warnings.warn(f"{folder}: {', '.join(sorted(hidden))}: left out; the model's own weights are loaded", stacklevel=5)
    with tempfile.TemporaryDirectory(prefix="autoquant-") as temporary:
        view = Path(temporary, folder.resolve().name)
        view.mkdir()
        for path in folder.iterdir():
            if path.name not in hidden:
                (view / path.name).symlink_to(path.resolve())
        yield view


def _check_weights(
    folder: Path, shards: Shards, model: Any, info: Mapping[str, Any], quantized: bool
) -> tuple[str, ...]:
    """Raise AutoQuantError for weights that would be random numbers; warn of tensors that are not used, and return
    their names.
    """
    stored = shards.entries
    unused = sorted(info["unexpected_keys"])
    wrong = {
        str(name): f" ({list(there)}, stored as {list(here)})" for name, here, there in sorted(info["mismatched_keys"])
    }
    missing = sorted(str(name) for name in info["missing_keys"])
    wrong |= {name: did_you_mean(name, unused).replace("; did", ", did") for name in missing if name not in wrong}
    if wrong:
        named = [f"{name}{what}" for name, what in wrong.items()]
        held = f"; the file holds {listed(unused)} instead" if unused else ""
        number = f"{len(wrong)} weights are" if len(wrong) > 1 else f"{named[0]} is"
        which = f": {listed(named)}" if len(wrong) > 1 else ""
        raise AutoQuantError(f"{folder}: {number} missing or of another shape{which}{held}")
    if not quantized:
        for name, parameter in model.named_parameters():
            if name in stored and parameter.is_floating_point() and not stored[name].dtype.is_floating_point:
                raise AutoQuantError(
                    f"{folder}: {name} is stored as {stored[name].dtype}: is quantized already, in a way that its "
                    "config.json does not declare; start from the original model"
                )
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    patterns.append(OLD_BUFFER)
    own = model.state_dict().keys()
    dropped = [name for name in stored if name not in own and any(p.search(name) for p in patterns)]
    if left := sorted({*unused, *dropped}, key=lambda name: (OLD_BUFFER.search(name) is not None, name)):
        warnings.warn(f"{folder}: the model's class has no place for {listed(left)}: not loaded", stacklevel=2)
    _check_ties_(folder, shards, model)
    return tuple(left)


def _check_ties_(folder: Path, shards: Shards, model: Any) -> None:
    """Say, and record in its configuration, that a model whose config ties its embeddings holds different ones."""
    tied = any(vars(part).get("tie_word_embeddings") for part in sub_configs(model.config).values())
    given, taken = model.get_output_embeddings(), model.get_input_embeddings()
    if not tied or not isinstance(given, nn.Module) or not isinstance(taken, nn.Module):
        return
    weight = given._parameters.get("weight")
    if weight is None or weight is taken._parameters.get("weight"):
        return
    name = next(name for name, parameter in model.named_parameters() if parameter is weight)
    if name in shards.entries:
        _say_untied_(model, folder, name)


def _say_untied_(model: nn.Module, folder: Path, name: str) -> None:
    record_untied_(model)
    _warn_untied(folder, name)


def _warn_untied(folder: Path, name: str) -> None:
    warnings.warn(f"{folder}: config.json ties {name}, the file holds another one: taken as untied", stacklevel=4)


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
