"""Log-probabilities of given tokens in transformers, by its own loader of compressed-tensors.

``python -m autoquant.models.transformers_scores REQUEST ANSWER``, in an environment that has compressed-tensors; see
``evaluation.serving``.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def main(request: Path, answer: Path) -> None:
    """Score each folder of the request, and write what came of it."""
    asked = json.loads(request.read_text(encoding="utf-8"))
    found = [_scores(folder, asked["windows"], asked["dtype"]) for folder in asked["folders"]]
    versions = installed("torch", "transformers", "compressed-tensors")
    answer.write_text(json.dumps({"versions": versions, "scores": found}), encoding="utf-8")


def installed(*packages: str) -> dict[str, str]:
    """The versions of those of the packages that are there."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@torch.no_grad()
def _scores(folder: str, windows: list[list[int]], dtype: str) -> Any:
    """A list for each window, of the log-probability of each token but the first; what went wrong as ``error``."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        scores = []
        for window in windows:
            ids = torch.tensor([window])
            predicted = model(ids).logits[:, :-1].float().log_softmax(-1)
            scores.append(predicted.gather(-1, ids[:, 1:, None]).flatten().tolist())
        return scores
    except Exception as error:  # whatever transformers says to a folder
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
