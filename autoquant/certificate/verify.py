"""The certificate on demand: a config proved again, on a checkpoint's own weights or on a small random model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from autoquant.analyzer.analyze import Analyzed, analyze
from autoquant.certificate.certify import SmallClaims, small_claims
from autoquant.certificate.claims import check_claims, check_structure
from autoquant.certificate.prove import Proof, Trial, dtype_of, placeable, prove
from autoquant.config.format import Config
from autoquant.errors import AutoQuantError
from autoquant.io.safetensors_stream import open_shards
from autoquant.library_patches import pytree
from autoquant.models.load import load_weights
from autoquant.models.repair import find_source
from autoquant.models.source import LoadedModel, ModelSource
from autoquant.models.structure import structure_of
from autoquant.threads import one_thread

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Verified:
    """What was tried, and the online rotations that cannot be placed, with the reason."""

    proof: Proof
    refused: Mapping[str, str]

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Every trial, those that failed included."""
        return self.proof.trials

    @property
    def tolerance(self) -> float:
        """Largest relative change of an output that counts as none."""
        return self.proof.tolerance


def verify_weights(
    folder: Path,
    config: Config,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Progress = lambda step: None,
) -> Verified:
    """Try every claim of ``config`` on the weights in ``folder``, once the analysis is known to make it.

    Two sequences of 16 random tokens, further lengths, decoding, and a run in which every expert is chosen. Raises
    AutoQuantError where the checkpoint cannot be read or run, where the config is for another structure, and where a
    claim of ``config`` is not one that the analysis makes.
    """
    open_shards(folder)
    progress(f"loading {folder}")
    loaded = load_weights(folder, dtype, seed, trust_remote_code=trust_remote_code)
    structure = structure_of(loaded.module)
    check_structure(config, str(folder), structure.fingerprint, structure.parameters)
    source = find_source(str(folder), trust_remote_code=trust_remote_code)
    check_claims(config, analyze(source, progress=progress).config)
    return _verify(loaded, config, seed, progress)


@one_thread()
def verify_small(
    source: ModelSource,
    config: Config,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    progress: Progress = lambda step: None,
) -> Verified:
    """Analyse ``source``, check that it makes the claims of ``config``, and try these on a small random model.

    ``dtype`` applies where the small model runs in float64. Raises AutoQuantError where a claim of ``config`` differs
    from the analysis, naming the nearest one, and where the config is for another structure.
    """
    analyzed = analyze(source, progress=progress)
    config = check_claims(config, analyzed.config)
    carried = carried_over(analyzed, source, config, seed, progress)
    loaded = carried.loaded
    if dtype_of(loaded.module) is torch.float64:
        loaded.module.to(dtype)
        args, kwargs = pytree.tree_map_only(Tensor, partial(_in_dtype, dtype), (loaded.args, dict(loaded.kwargs)))
        loaded = replace(loaded, args=args, kwargs=kwargs)
    return _verify(loaded, carried.config, seed, progress)


def carried_over(analyzed: Analyzed, source: ModelSource, config: Config, seed: int, progress: Progress) -> SmallClaims:
    """A small model with the claims of ``config``, which are some of those that were ``analyzed``.

    Raises AutoQuantError where the small model does not allow one of them.
    """
    carried = small_claims(replace(analyzed, config=config), source, seed, progress, some=True)
    for why in carried.refused.values():
        raise AutoQuantError(f"{source.name}: {why}")
    return carried


def _in_dtype(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _verify(loaded: LoadedModel, config: Config, seed: int, progress: Progress) -> Verified:
    config, refused = placeable(loaded.module, config)
    proof = prove(loaded, config, seed=seed, progress=progress)
    if not proof.trials:
        raise AutoQuantError("nothing to verify: the config has no smoothing group, space or online rotation")
    return Verified(proof, refused)
