"""The native format: int8 values and float32 scales that ``autoquant.load`` makes a runnable model of.

A folder holds ``autoquant.safetensors`` (int8 values, float32 scales, a prefix's keys, values and logits in the
dtype that they were computed in, everything else in its own dtype), ``autoquant_config.json`` (the AutoQuant config,
its strategy being the one used), ``autoquant_provenance.json``, ``quantized.json`` (what else is needed to read the
tensors), and transformers' own ``config.json`` and tokenizer files. The tensors' file has a name of its own so that
plain transformers says that it finds no weights, instead of filling int8 linears with noise.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from autoquant.checkpoint.formats import NATIVE, Changes, Contents, register, write_checkpoint
from autoquant.checkpoint.formats.assembled import as_loaded_, change_, fill_
from autoquant.checkpoint.formats.surroundings import stored_tokenizer, write_surroundings
from autoquant.checkpoint.provenance import CONFIG, read_provenance
from autoquant.config.file import load_config
from autoquant.config.format import Config
from autoquant.errors import AutoQuantError
from autoquant.executor.resolved import ResolvedOnline
from autoquant.io.safetensors_stream import open_file
from autoquant.io.safetensors_writer import Described, write_tensors
from autoquant.models.checkpoint_source import check_ordinary
from autoquant.models.load import build_empty, check_depth, load_settings
from autoquant.models.structure import FLOATING
from autoquant.models.tokenizer import processor_files
from autoquant.quantizer.kv_cache import MODULE, KVScales, install_
from autoquant.quantizer.linear import replace_with_empty_
from autoquant.quantizer.prefix import install_prefix_, stored_prefix
from autoquant.quantizer.strategies import kv_granularity, plan_linears

TENSORS = "autoquant.safetensors"
FACTS = "quantized.json"
_OLD_CONFIG = "autoquant.json"
"""The config's name up to 0.1; read for one release more. Its facts are what "provenance" held."""


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
    changes: Changes | None = None,
    form: str = NATIVE,
    force: bool = False,
) -> None:
    """Write a quantized transformers model that is in memory; see ``write_checkpoint``.

    ``config`` is the one that :func:`plan_linears` was given, its ``quantization.strategy`` the one used.
    """
    made = ready(model)
    contents = Contents(
        model,
        config,
        made.described,
        made.tensors,
        _float_dtype(model),
        made.shared,
        changes or Changes(),
        provenance,
        tokenizer,
    )
    write_checkpoint(directory, contents, form, force=force)


class Native:
    """The format of this module. It holds every model."""

    name = NATIVE

    def reasons_against(self, config: Config, changes: Changes, model: Any = None) -> tuple[str, ...]:
        return ()

    def write(self, folder: Path, contents: Contents) -> None:
        changes = contents.changes
        facts = {
            "dtype": _name(contents.dtype),
            "shared": dict(contents.shared),
            "created": list(changes.created),
            "identities": list(changes.identities),
            "online": [{"kind": o.kind, "path": o.path, "size": o.size} for o in changes.online],
        }
        write_tensors(folder / TENSORS, contents.described, contents.tensors)
        (folder / FACTS).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_surroundings(folder, contents)

    def is_mine(self, folder: Path) -> bool:
        return (folder / FACTS).is_file()

    def load(self, folder: Path, dtype: torch.dtype | None, *, trust_remote_code: bool = False) -> Any:
        return as_loaded_(load_quantized(folder, trust_remote_code=trust_remote_code), dtype)

    def contents(self, folder: Path, *, trust_remote_code: bool = False) -> Contents:
        facts, shards = read_facts(folder), open_file(folder / TENSORS)
        described = {name: (entry.dtype, entry.shape) for name, entry in shards.entries.items()}
        return Contents(
            build_empty(folder, facts.dtype, trust_remote_code=trust_remote_code),
            read_config(folder),
            described,
            ((name, shards.read(name)) for name in described),
            facts.dtype,
            facts.shared,
            facts.changes,
            read_provenance(folder),
            stored_tokenizer(folder, trust_remote_code=trust_remote_code),
            processor_files(folder),
        )


register(Native())


@dataclass(frozen=True, slots=True)
class Facts:
    """What ``quantized.json`` says."""

    dtype: torch.dtype
    shared: Mapping[str, str]
    changes: Changes


class _Online(BaseModel):
    kind: Literal["R3", "R4", "input"]
    path: str = Field(min_length=1)
    size: int = Field(gt=0, strict=True)


class _Facts(BaseModel):
    """The file as it is written; further keys are of other versions."""

    dtype: str
    shared: dict[str, str]
    created: tuple[Annotated[str, Field(min_length=1)], ...]
    identities: tuple[Annotated[str, Field(min_length=1)], ...]
    online: tuple[_Online, ...]


_MADE = ("created", "identities", "online")
_MISFITS = (AttributeError, KeyError, TypeError, ValueError, IndexError, RuntimeError, AssertionError)
"""What torch says where a model is changed in a way that it does not allow."""


def load_quantized(directory: str | Path, *, trust_remote_code: bool = False) -> Any:
    """A runnable model from a native folder, in evaluation mode, every tensor in the dtype that it is stored in.

    The architecture is built without weights and changed as the folder says, then the tensors are put in. Raises
    AutoQuantError for a folder that is not one of these, is damaged, or whose tensors do not fit.
    """
    directory = Path(directory)
    if not (directory / FACTS).is_file():
        raise AutoQuantError(f"{directory}: not a quantized model, there is no {FACTS}")
    check_ordinary(directory)
    config, facts, shards = read_config(directory), read_facts(directory), open_file(directory / TENSORS)
    check_depth(directory, load_settings(directory, trust_remote_code=trust_remote_code), shards)
    try:
        tensors = load_file(directory / TENSORS)
    except (OSError, SafetensorError) as error:
        raise AutoQuantError(f"{directory}: damaged: {' '.join(str(error).split())[:200]}") from error
    model = build_empty(directory, facts.dtype, trust_remote_code=trust_remote_code)
    granularity = kv_granularity(config)
    try:
        change_(model, facts.changes)
        replace_with_empty_(model, plan_linears(config))
        if granularity is not None:
            install_(model, KVScales(granularity, *(tensors.get(f"{MODULE}.{name}") for name in ("key", "value"))))
    except (AutoQuantError, *_MISFITS) as error:
        reason = " ".join(str(error).split())[:200]
        raise AutoQuantError(f"{directory}: damaged: its files do not belong together ({reason})") from error
    if config.quantization.prefix:
        try:
            install_prefix_(model, stored_prefix(tensors, config.quantization.prefix))
        except AutoQuantError as error:
            raise AutoQuantError(f"{directory}: {error.message}") from error
    return fill_(model, tensors, facts.shared, directory)


def read_config(directory: Path) -> Config:
    """The config in a native folder. Raises AutoQuantError."""
    old = not (directory / CONFIG).is_file() and (directory / _OLD_CONFIG).is_file()
    file = directory / (_OLD_CONFIG if old else CONFIG)
    if not file.is_file():  # a pipe would be waited for
        raise AutoQuantError(f"{directory}: damaged: there is no file {file.name}")
    return load_config(file)


def read_facts(directory: Path) -> Facts:
    """What a native folder says of its tensors. Raises AutoQuantError."""
    try:
        facts = json.loads((directory / FACTS).read_text(encoding="utf-8"))
        made = facts if "online" in facts else facts["provenance"]
        known = _Facts.model_validate({**{key: made.get(key, []) for key in _MADE}, **facts})
        dtype = next((dtype for dtype in FLOATING if _name(dtype) == known.dtype), None)
        if dtype is None:
            raise ValueError(f"{known.dtype!r} is no dtype of a model")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise AutoQuantError(f"{directory / FACTS}: damaged: {where}: {first['msg']}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AutoQuantError(f"{directory / FACTS}: damaged: {' '.join(str(error).split())[:200]}") from error
    online = tuple(ResolvedOnline(one.kind, one.path, one.size, None) for one in known.online)
    return Facts(dtype, known.shared, Changes(known.created, known.identities, online))


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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _float_dtype(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
