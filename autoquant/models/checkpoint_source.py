"""What a checkpoint's folder holds, judged before anything of it is built or run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from autoquant.config.spelling import did_you_mean
from autoquant.errors import AutoQuantError
from autoquant.io.safetensors_stream import Shards, open_shards
from autoquant.io.scaled import FLOAT8
from autoquant.io.scaled_shards import METHODS, as_numbers
from autoquant.models.hub_errors import why_not

ADAPTER = "adapter_config.json"
_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_FACTORY = re.compile(r"[\w.]+:\w+")


def checkpoint_folder(source: str | Path, *, weights: bool = True, trust_remote_code: bool = False) -> Path:
    """The local folder of a checkpoint: ``source`` itself, or a snapshot of the hub id that it is.

    Of a hub id only the files that can be used are fetched: weights where ``weights`` says so, code where it is
    trusted. Raises AutoQuantError where there is neither such a folder nor such a hub id.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    name = str(source)
    if path.exists():
        raise AutoQuantError(f"{name}: is a file; name the checkpoint's folder")
    if _FACTORY.fullmatch(name):
        raise AutoQuantError(f"{name}: is a factory's, which has no weights in a file; name a folder or a hub id")
    if not _may_be_hub_id(source):
        near = did_you_mean(path.name, [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else [])
        raise AutoQuantError(f"{name}: no such folder{near or '; expected a checkpoint of transformers'}")
    from transformers import CONFIG_MAPPING

    if name in CONFIG_MAPPING:
        raise AutoQuantError(f"{name}: is a model type, which has no weights; name a folder or a hub id")
    import huggingface_hub

    patterns = [*_PATTERNS, *["*.safetensors"] * weights, *["*.py"] * trust_remote_code]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # offline, unknown, gated: the hub client has many exceptions of its own
        why = why_not(error) or f"{type(error).__name__}; check the spelling, the network and your access to it"
        raise AutoQuantError(f"{name}: not a folder, and not to be had from the hub: {why}") from error


def _may_be_hub_id(source: str | Path) -> bool:
    name = str(source)
    owner, _, rest = name.partition("/")
    return not (
        Path(source).is_absolute() or name.startswith((".", "~")) or "/" in rest or (rest and Path(owner).exists())
    )


def check_ordinary(folder: Path) -> None:
    """Raise AutoQuantError where a pipe or a device stands among a checkpoint's files: reading it would not end."""
    for path in folder.iterdir():
        if path.exists() and not path.is_file() and not path.is_dir():
            raise AutoQuantError(f"{path}: is no ordinary file; remove it")


def read_settings(folder: Path) -> dict[str, Any]:
    """A checkpoint's ``config.json``. Raises AutoQuantError where it is missing or no object."""
    if folder.is_dir():
        check_ordinary(folder)
    if not (folder / "config.json").is_file():
        if (folder / ADAPTER).is_file():
            raise AutoQuantError(adapter_alone(folder))
        raise AutoQuantError(f"{folder}: no config.json; expected a checkpoint folder of transformers")
    return read_settings_file(folder / "config.json")


def adapter_alone(folder: Path) -> str:
    """What is said of a folder that holds an adapter and nothing else."""
    return f"{folder}: holds an adapter (LoRA) and no model; merge it into its base first (merge_and_unload)"


def read_settings_file(file: Path) -> dict[str, Any]:
    """A configuration by its file. Raises AutoQuantError where it is no object with a model type."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise AutoQuantError(f"{file}: cannot be read as JSON: {reason}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("model_type"), str):
        raise AutoQuantError(f"{file}: expected a JSON object with a model_type")
    return settings


def quantization_method(settings: dict[str, Any]) -> str | None:
    """The method that a ``config.json`` says its weights are quantized by; None for plain ones."""
    for section in (settings, *(value for value in settings.values() if isinstance(value, dict))):
        found = section.get("quantization_config")
        if found is not None:
            return str(found.get("quant_method", "unknown")) if isinstance(found, dict) else "unknown"
    return None


def is_scaled(settings: dict[str, Any]) -> bool:
    """True if the weights are stored in a form that is read as the numbers that it stands for."""
    return quantization_method(settings) in METHODS


def without_scales(settings: dict[str, Any]) -> dict[str, Any]:
    """A ``config.json`` without what it says of scales that are multiplied into the weights."""
    if not is_scaled(settings):
        return settings
    sections = {
        key: {k: v for k, v in value.items() if k != "quantization_config"} if isinstance(value, dict) else value
        for key, value in settings.items()
    }
    return {key: value for key, value in sections.items() if key != "quantization_config"}


def _declared_dtype(settings: dict[str, Any]) -> torch.dtype:
    """What a ``config.json`` says that the weights are of, bfloat16 where it does not say."""
    for section in (settings, *(value for value in settings.values() if isinstance(value, dict))):
        found = getattr(torch, str(section.get("dtype") or section.get("torch_dtype")), None)
        if isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize > 1:
            return found
    return torch.bfloat16


def open_checkpoint(folder: Path, *, quantized: bool = False) -> Shards:
    """The tensors of a checkpoint whose weights are as they are: the first check of every command, no model is built.

    Float8 in blocks and MXFP4 are read as the numbers that they stand for (:func:`is_scaled`). ``quantized``: one that
    transformers dequantizes will do too. Raises AutoQuantError for a folder that is not a
    checkpoint, holds an adapter alone or pickles, is quantized already, or whose ``config.json`` names other files.
    """
    settings = read_settings(folder)
    method = quantization_method(settings)
    refusal = (
        f"{folder}: is quantized already ({method}); its weights cannot be folded: start from the original model, or "
        "dequantize it first"
    )
    if method is not None and not quantized and method not in METHODS:
        raise AutoQuantError(refusal)
    if settings.get("transformers_weights") is not None:
        raise AutoQuantError(f"{folder}: its config.json names its weights (transformers_weights); remove that entry")
    shards = open_shards(folder)
    if method in METHODS:
        block = (settings.get("quantization_config") or {}).get("weight_block_size")
        numbers = as_numbers(shards, method, block, _declared_dtype(settings))
        if not numbers.scaled and not quantized:
            raise AutoQuantError(refusal)
        return numbers
    scaled = [name for name, entry in shards.entries.items() if entry.dtype in FLOAT8]
    if scaled and method is None:
        raise AutoQuantError(
            f"{folder}: {scaled[0]} and {len(scaled) - 1} more are float8, whose scales its config.json does not "
            "declare; they cannot be folded: start from the original model"
        )
    return shards
