"""What a target serves, as a search has to know it: which configs can be written for it as they stand."""

from __future__ import annotations

from pathlib import Path

from autoquant.checkpoint.formats import refusals
from autoquant.checkpoint.quantize import foreseen
from autoquant.checkpoint.targets import readers, target_named
from autoquant.config.format import Config, Strategy, edited
from autoquant.models.load import load_skeleton
from autoquant.models.structure import structure_of
from autoquant.pipeline.quantize import select
from autoquant.pipeline.select import EVERYTHING
from autoquant.searcher.judge import Served


def served_by(
    target: str, folder: Path, config: Config, strategy: Strategy, *, trust_remote_code: bool = False
) -> Served:
    """What ``target`` asks of configs of the model in ``folder``, quantized by ``strategy``.

    Raises AutoQuantError for a name that is none, and where the model cannot be built.
    """
    asked = target_named(target)
    skeleton = load_skeleton(folder, trust_remote_code=trust_remote_code)
    structure = structure_of(skeleton)

    def refused(changed: Config) -> tuple[str, ...]:
        used = edited(changed, quantization=edited(changed.quantization, strategy=strategy))
        return refusals(target, used, foreseen(select(used, structure, EVERYTHING), used), skeleton)

    return Served(refused, readers(config) if asked.readers_alike else ())
