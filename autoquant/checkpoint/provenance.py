"""How a folder came about, the same format in every folder that is written here, and the names of the two files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from autoquant.certificate.claims import ProofNote
from autoquant.config.format import Config
from autoquant.errors import AutoQuantError
from autoquant.io.folders import PROVENANCE
from autoquant.version import __version__

CONFIG = "autoquant_config.json"
"""The config in a folder, as it was used."""


def make_provenance(
    command: str,
    source: Path | str,
    config: Config,
    options: Mapping[str, Any],
    rotations: Mapping[str, str],
    result: Mapping[str, Any],
    proof: ProofNote | None = None,
) -> dict[str, Any]:
    """What :func:`write_provenance` writes. ``config``: the one given; ``result``: what only this command says;
    ``proof``: how the claims stand, None where nobody asked.
    """
    return {
        "command": command,
        "versions": {"autoquant": __version__, "torch": torch.__version__, "transformers": version("transformers")},
        "source": str(source),
        "config_sha256": hashlib.sha256(config.model_dump_json(by_alias=True).encode()).hexdigest(),
        "fingerprint": config.provenance.fingerprint,
        "options": dict(options),
        "rotations": dict(rotations),
        "proof": None if proof is None else {"proved": proof.proved, "how": proof.how},
        "result": dict(result),
    }


def read_provenance(folder: Path) -> dict[str, Any]:
    """The record of a folder; empty where there is none, as in folders of version 0.1."""
    if (folder / PROVENANCE).exists() and not (folder / PROVENANCE).is_file():  # a pipe would be waited for
        raise AutoQuantError(f"{folder / PROVENANCE}: damaged: is no ordinary file")
    try:
        made = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise AutoQuantError(f"{folder / PROVENANCE}: damaged: {' '.join(str(error).split())[:200]}") from error
    return made if isinstance(made, dict) else {}


def write_provenance(folder: Path, made: Mapping[str, Any]) -> None:
    """Write the record into a folder, which is known by it as one of ours. Raises OSError as the system does."""
    (folder / PROVENANCE).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
