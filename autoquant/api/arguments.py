"""What users may give in several forms, as the one form that is worked with."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from autoquant.api.configs import load_config
from autoquant.errors import AutoQuantError
from autoquant.models.tasks import Kind
from autoquant.steps import Progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from autoquant.certificate.claims import ProofNote
    from autoquant.config.format import Config
    from autoquant.models.source import ModelSource
    from autoquant.pipeline.select import Transforms

P = ParamSpec("P")
R = TypeVar("R")

IMPORTING = "importing torch and transformers"


def config_of(config: str | Path | Config) -> Config:
    """The config of a file, or the one given."""
    return load_config(config) if isinstance(config, str | Path) else config


def by_line(function: Callable[P, R]) -> Callable[P, R]:
    """A function of a ``model`` and a ``config``, its problems told by line and column where that is a file's."""

    @functools.wraps(function)
    def told(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except AutoQuantError as error:
            given = inspect.signature(function).bind(*args, **kwargs).arguments
            config, model = given.get("config"), given["model"]
            if not error.problems or not isinstance(config, str | Path):
                raise
            from autoquant.models.fit import problems_error

            raise problems_error(Path(config), name_of(model, type(model).__name__), error.problems) from error

    return told


def analyzed_config(
    config: str | Path | Config | None, model: str | Path, trust_remote_code: bool, progress: Progress
) -> Config:
    """The config given; where there is none that of ``model``, analyzed and proved now."""
    if config is not None:
        return config_of(config)
    from autoquant.checkpoint.quantize import config_for

    return config_for(str(model), steps_of(progress), trust_remote_code=trust_remote_code)


def name_of(given: object, otherwise: str) -> str:
    """What was given by name or path, in words; ``otherwise`` for all else."""
    return str(given) if isinstance(given, str | Path) else otherwise


def transforms_of(transforms: str | Transforms) -> Transforms:
    """The transforms of an expression, or those given."""
    from autoquant.pipeline.select import Transforms

    return Transforms.parse(transforms) if isinstance(transforms, str) else transforms


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype by its name in torch; None for 'auto' and 'as-stored', which leave it."""
    import torch

    if not isinstance(dtype, str):
        return dtype
    found = None if dtype in ("auto", "as-stored") else getattr(torch, dtype, dtype)
    if isinstance(found, str):
        raise AutoQuantError(f"dtype '{found}': expected a floating-point dtype of torch, as 'bfloat16'")
    return found


def steps_of(progress: Progress) -> Callable[[str], None]:
    """What is told of a step alone, where a progress wants the step and how far it is."""
    return lambda step: progress(step, 0, 0)


def source_of(
    model: str | Path | nn.Module, example_inputs: Any, layers: int | None, task: Kind | None, trust_remote_code: bool
) -> ModelSource:
    """The model to analyze: one named, or a module with inputs to call it by."""
    if isinstance(model, str | Path):
        from autoquant.models.repair import find_source

        return find_source(str(model), layers=layers, trust_remote_code=trust_remote_code, kind=task)
    from autoquant.models.example import module_source

    return module_source(model, example_inputs)


def proof_of(
    config: Config,
    model: str | Path | nn.Module,
    example_inputs: Any,
    unproved: bool,
    trust_remote_code: bool,
    progress: Progress,
) -> ProofNote:
    """How the claims of a config that is about to be applied to ``model`` stand, a folder or a module; they are proved
    now where they were edited. Raises AutoQuantError where they do not hold, unless ``unproved`` asks for them anyway.
    """
    from autoquant.certificate.ensure import ensure_proved
    from autoquant.models.settings import settings_digests
    from autoquant.models.source import named_source, named_type

    if isinstance(model, str | Path):
        found = named_type(str(model))
        settings = named_source(str(model), trust_remote_code=trust_remote_code).config
    else:
        settings = getattr(model, "config", None)
        found = getattr(settings, "model_type", None)
    digests = () if found is None else settings_digests(settings)

    def source() -> ModelSource:
        if not isinstance(model, str | Path):
            return source_of(model, example_inputs, None, None, False)
        from autoquant.models.repair import of_structure

        return of_structure(str(model), config.provenance.fingerprint, trust_remote_code=trust_remote_code)

    return ensure_proved(config, source, found, settings=digests, unproved=unproved, progress=steps_of(progress))


def batches_of(
    calibration: str | Path | Sequence[Tensor] | None,
    tokenizer: Any,
    field: str,
    sequences: int,
    length: int,
    seed: int | None,
) -> tuple[Tensor, ...]:
    """Calibration windows of a text, or the batches that were given."""
    if calibration is None:
        return ()
    if not isinstance(calibration, str | Path):
        return tuple(calibration)
    if tokenizer is None:
        raise AutoQuantError(f"{calibration}: a text needs the tokenizer that reads it; or give batches of token ids")
    from autoquant.calibration.windows import CalibrationOptions, calibration_windows

    return calibration_windows(tokenizer, CalibrationOptions(Path(calibration), sequences, length, seed, field))
