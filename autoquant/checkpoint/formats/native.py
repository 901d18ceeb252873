"""Quantized models on disk, and models from disk.

A folder holds ``autoquant.safetensors`` (int8 values, float32 scales, a prefix's keys, values and logits in the
dtype that they were computed in, everything else in its own dtype),
``autoquant.json`` (the AutoQuant config, its strategy being the one used), ``quantized.json`` (provenance and what
else is needed to read the tensors), and transformers' own ``config.json`` and tokenizer files. The tensors' file has
a name of its own so that plain transformers says that it finds no weights, instead of filling int8 linears with
noise.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from autoquant.config.file import config_text, load_config
from autoquant.config.format import Config
from autoquant.errors import AutoQuantError
from autoquant.io.safetensors_writer import Described, write_tensors
from autoquant.models.load import build_empty, load_causal_lm
from autoquant.quantizer.kv_cache import MODULE, KVScales, install_
from autoquant.quantizer.linear import replace_with_empty_
from autoquant.quantizer.prefix import install_prefix_, stored_prefix
from autoquant.quantizer.strategies import kv_granularity, plan_linears

TENSORS = "autoquant.safetensors"
CONFIG = "autoquant.json"
FACTS = "quantized.json"

Prepare = Callable[[nn.Module, Config], None]


@dataclass(frozen=True, slots=True)
class Ready:
    """A quantized model as it is written: of ``model`` only the configs, tensors that may come one at a time, and the
    names that share another's tensor.
    """

    model: Any
    described: Described
    shared: Mapping[str, str]
    tensors: Iterable[tuple[str, Tensor]]


def ready(model: Any) -> Ready:
    """A quantized model that is in memory, as it is written."""
    tensors, shared = _unshared(model.state_dict(keep_vars=True))
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return Ready(model, described, shared, tensors.items())


def save_quantized(
    model: Any,
    directory: Path,
    config: Config,
    provenance: Mapping[str, Any],
    tokenizer: Any = None,
    *,
    force: bool = False,
) -> None:
    """Write a quantized transformers model so that the folder is there whole or not at all.

    ``config`` is the one that :func:`plan_linears` was given, its ``quantization.strategy`` the one used. The folder
    is written under a temporary name beside ``directory`` and renamed. Raises AutoQuantError where it exists and
    ``force`` is false, and where it cannot be written.
    """
    made = ready(model)
    facts = {"dtype": _name(_float_dtype(model)), "shared": dict(made.shared), "provenance": dict(provenance)}
    write_folder(model, directory, config, facts, made.described, made.tensors, tokenizer, force=force)


def write_folder(
    model: Any,
    directory: Path,
    config: Config,
    facts: Mapping[str, Any],
    described: Described,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: Any = None,
    *,
    force: bool = False,
) -> None:
    """What :func:`save_quantized` does, for tensors that come one at a time; of ``model`` only the configs are used."""
    if directory.exists() and not force:
        raise AutoQuantError(f"{directory}: exists already; give --force to replace it")
    temporary = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
        temporary.chmod(0o755)  # mkdtemp's is private
        write_tensors(temporary / TENSORS, described, tensors)
        (temporary / CONFIG).write_text(config_text(config), encoding="utf-8")
        (temporary / FACTS).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        model.config.save_pretrained(temporary)
        if model.generation_config is not None:
            # As it is: save_pretrained refuses what many released models have (sampling values without sampling).
            model.generation_config.to_json_file(temporary / "generation_config.json")
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(temporary, directory)
    except OSError as error:
        raise AutoQuantError(f"{directory}: cannot be written: {error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)  # gone already where all went well


def is_quantized(directory: str | Path) -> bool:
    """Whether the folder is one that :func:`save_quantized` wrote."""
    return (Path(directory) / FACTS).is_file()


def load_quantized(directory: str | Path, prepare: Prepare | None = None) -> Any:
    """A runnable model from a folder of :func:`save_quantized`, in evaluation mode.

    The architecture is built without weights; ``prepare(model, config)`` then makes the modules that a transformation
    added (online rotations), and the tensors are put in. Raises AutoQuantError for a folder that is not one of these,
    is damaged, or whose tensors do not fit.
    """
    directory = Path(directory)
    if not is_quantized(directory):
        raise AutoQuantError(f"{directory}: not a quantized model, there is no {FACTS}")
    config = load_config(directory / CONFIG)
    try:
        facts = json.loads((directory / FACTS).read_text(encoding="utf-8"))
        tensors = load_file(directory / TENSORS)
        dtype = getattr(torch, facts["dtype"])
        shared: dict[str, str] = facts["shared"]
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise AutoQuantError(f"{directory}: damaged: {error}") from error
    model = build_empty(directory, dtype)
    if prepare is not None:
        prepare(model, config)
    replace_with_empty_(model, plan_linears(config))
    granularity = kv_granularity(config)
    if granularity is not None:
        install_(model, KVScales(granularity, *(tensors.get(f"{MODULE}.{name}") for name in ("key", "value"))))
    if config.quantization.prefix:
        try:
            install_prefix_(model, stored_prefix(tensors, config.quantization.prefix))
        except AutoQuantError as error:
            raise AutoQuantError(f"{directory}: {error.message}") from error
    try:
        model.load_state_dict({**tensors, **{name: tensors[source] for name, source in shared.items()}}, assign=True)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise AutoQuantError(f"{directory}: its tensors do not fit its config: {reason}") from error
    for name, source in shared.items():  # one parameter again, not two that share memory
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, model.get_parameter(source))
    return model.eval()


def load_model(model: str | Path, dtype: torch.dtype | None = None, prepare: Prepare | None = None) -> Any:
    """A quantized folder, or any causal LM that transformers loads from a folder or a hub id, in evaluation mode.

    ``dtype`` is that of everything that is not int8; None: the checkpoint's, as transformers loads it. Raises
    AutoQuantError where there is no such model.
    """
    if is_quantized(model):
        quantized = load_quantized(model, prepare)
        # Buffers are left alone: rotary frequencies stay float32, as transformers has it.
        for name, parameter in quantized.named_parameters():
            parameter.data = parameter.data.to(dtype or _loaded_dtype(quantized, name, parameter))
        return quantized
    return load_causal_lm(model, dtype=dtype, quantized=True)


def _unshared(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, and for every further name of one the name that it is stored under."""
    first: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    kept, shared = {}, {}
    for name, tensor in tensors.items():
        source = first.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), name)
        if source == name or not tensor.numel():
            kept[name] = tensor.detach().contiguous()
        else:
            shared[name] = source
    return kept, shared


def _loaded_dtype(model: Any, name: str, parameter: Tensor) -> torch.dtype:
    """What transformers loads a parameter as: the checkpoint's dtype, whatever the tensor's own, since the code around
    may take one dtype only; its own where the class keeps the module in float32.
    """
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    own: torch.dtype = parameter.dtype
    wanted: torch.dtype = model.config.dtype
    return own if kept.intersection(name.split(".")) or not own.is_floating_point else wanted


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _float_dtype(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
