"""Formats of quantized checkpoints: what one is, and which there are.

A format is an object that fits :class:`CheckpointFormat`, registered by :func:`register`; nothing else names it. A
driver makes :class:`Contents`, whose tensors may come one at a time, and calls :func:`write_checkpoint`. Tensors that
stay in floating point come in their stored dtype (``checkpoint.dtypes`` says which that is, by ``Shards.entries``), and
a format keeps it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from autoquant.checkpoint.provenance import write_provenance
from autoquant.checkpoint.targets import DEFAULT_TARGET, reasons_against, target_named
from autoquant.config.format import Config
from autoquant.config.spelling import did_you_mean_or
from autoquant.errors import AutoQuantError
from autoquant.executor.resolved import ResolvedOnline
from autoquant.io.folders import finished_folder
from autoquant.io.safetensors_writer import Described
from autoquant.models.own_code import copy_code
from autoquant.models.reading import reads_in_halves
from autoquant.pipeline.of_text import quantized_towers

NATIVE = "native"
COMPRESSED_TENSORS = "compressed-tensors"
ONNX = "onnx"
PREFERRED = (COMPRESSED_TENSORS, NATIVE)
"""Without a wish, the first of these that can hold the result."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What of a model's structure differs from its class: biases that it lacks, norms that are gone, rotations,
    parameters that are tied no longer.
    """

    created: tuple[str, ...] = ()
    identities: tuple[str, ...] = ()
    online: tuple[ResolvedOnline, ...] = ()
    untied: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Contents:
    """A quantized model as it is written.

    ``model``: of it only the configs are used. ``config``: its strategy is the one used. ``tensors``: each described
    one once, in any order, its dtype and shape as described; ``shared``: further names of some of them. ``dtype``: that
    of most of what stays in floating point. ``provenance``: see ``checkpoint.provenance``. ``processor``: files of what
    lays out images and sounds, which are copied.
    """

    model: Any
    config: Config
    described: Described
    tensors: Iterable[tuple[str, Tensor]]
    dtype: torch.dtype
    shared: Mapping[str, str] = field(default_factory=dict)
    changes: Changes = field(default_factory=Changes)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    processor: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Wish:
    """What a user asks for: ``form``, a format by its name, and ``target``, what is to serve it; None: no wish."""

    form: str | None = None
    target: str | None = None

    def __post_init__(self) -> None:
        """Raise AutoQuantError for names that are none, and for a target of a format that nothing serves."""
        if self.form is not None:
            format_named(self.form)
        if self.target is not None:
            read = target_named(self.target).form
            if self.form == NATIVE:
                raise AutoQuantError(f"the format '{self.form}' runs in autoquant alone: leave the target out")
            if self.form not in (None, read):
                raise AutoQuantError(f"the target '{self.target}' reads the format '{read}', not '{self.form}'")

    @property
    def wanted(self) -> str | None:
        """The format that is wished for, by its own name or by that of a target that reads no other."""
        read = None if self.target is None else target_named(self.target).form
        return self.form or (None if read == COMPRESSED_TENSORS else read)


class CheckpointFormat(Protocol):
    """One format. ``name``: what users call it."""

    name: str

    def reasons_against(self, config: Config, changes: Changes, model: Any = None) -> tuple[str, ...]:
        """Why the format cannot hold such a model, a sentence each; none where it can.

        Asked before the work, with the model's structure in ``model``, and again with all changes before the writing.
        """

    def write(self, folder: Path, contents: Contents) -> None:
        """Write all files but the provenance into an empty folder. Raises OSError as the system does."""

    def is_mine(self, folder: Path) -> bool:
        """True if the folder is of this format."""

    def contents(self, folder: Path, *, trust_remote_code: bool = False) -> Contents:
        """What a folder holds, as it would be written. Raises AutoQuantError where that cannot be told."""

    def load(self, folder: Path, dtype: torch.dtype | None, *, trust_remote_code: bool = False) -> Any:
        """A runnable model in evaluation mode. Raises AutoQuantError where the folder is damaged."""


_formats: dict[str, CheckpointFormat] = {}


def register(checkpoint_format: CheckpointFormat) -> None:
    """Make a format known by its name. Raises ValueError where there is one of that name."""
    if checkpoint_format.name in _formats:
        raise ValueError(f"there is a format {checkpoint_format.name!r} already")
    _formats[checkpoint_format.name] = checkpoint_format


def formats() -> Mapping[str, CheckpointFormat]:
    """All formats by their names."""
    import autoquant.checkpoint.formats.compressed_tensors
    import autoquant.checkpoint.formats.native
    import autoquant.checkpoint.formats.onnx  # noqa: F401  # they register themselves, and import this module

    return dict(_formats)


def format_named(name: str) -> CheckpointFormat:
    """A format by its name. Raises AutoQuantError with the nearest name where there is none."""
    known = formats()
    if name not in known:
        raise AutoQuantError(f"no format '{name}'{did_you_mean_or(name, list(known))}")
    return known[name]


def format_of(folder: Path) -> CheckpointFormat | None:
    """The format of a folder; None for what is no quantized checkpoint of ours."""
    return next((known for known in formats().values() if known.is_mine(folder)), None)


def check_format(name: str, config: Config, changes: Changes, model: Any = None) -> CheckpointFormat:
    """The format of that name. Raises AutoQuantError where it cannot hold such a model, with its reasons."""
    found = format_named(name)
    if reasons := found.reasons_against(config, changes, model):
        raise AutoQuantError(f"the format '{name}' cannot hold the result; choose another or disable it", reasons[:20])
    return found


@dataclass(frozen=True, slots=True)
class Chosen:
    """A format by its name, and why none that is preferred to it can be had."""

    form: str
    against: tuple[str, ...] = ()


def choose_format(wish: Wish, config: Config, changes: Changes, model: Any = None) -> Chosen:
    """The format that was wished for, or the best one that can hold the result for the target.

    Raises AutoQuantError where the wish cannot be met, with the reasons and the nearest thing that could be.
    """
    wanted = wish.wanted
    if wanted not in (None, COMPRESSED_TENSORS):
        check_format(wanted, config, changes, model)
        return Chosen(wanted)
    reasons = refusals(wish.target or DEFAULT_TARGET, config, changes, model)
    if not reasons:
        return Chosen(COMPRESSED_TENSORS)
    if wish.form is None and wish.target is None:
        return Chosen(NATIVE, reasons)
    what = f"the target '{wish.target}'" if wish.target is not None else f"the format '{wish.form}'"
    raise AutoQuantError(
        f"{what} cannot take the result; change this, or go without it (--format native)", reasons[:20]
    )


def refusals(target: str, config: Config, changes: Changes, model: Any = None) -> tuple[str, ...]:
    """Why a target, or the format that it loads, does not take such a model, a sentence each; none where it does."""
    kind = None if model is None else type(model).__name__
    in_two = model is not None and reads_in_halves(model)
    towers = () if model is None else quantized_towers(config, model)
    served = reasons_against(target, config, kind, untied=_untied(changes, model), in_two=in_two, towers=towers)
    held = format_named(target_named(target).form).reasons_against(config, changes, model)
    return tuple(dict.fromkeys((*served, *held)))


def _untied(changes: Changes, model: Any) -> bool:
    """True if the model's head is not the embedding table, as far as a model is given."""
    return model is not None and (bool(changes.untied) or getattr(model.config, "tie_word_embeddings", True) is False)


def write_checkpoint(target: Path, contents: Contents, name: str = NATIVE, *, force: bool = False) -> None:
    """Write a quantized model so that the folder is there whole or not at all.

    Raises AutoQuantError where the format cannot hold it, where the folder may not be replaced, and where it cannot be
    written.
    """
    chosen = check_format(name, contents.config, contents.changes)
    with finished_folder(target, force=force) as folder:
        chosen.write(folder, contents)
        copy_code(contents.model, folder)
        write_provenance(folder, contents.provenance)
