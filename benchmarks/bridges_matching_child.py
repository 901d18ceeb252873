"""Run by bridges_matching.py in LLM Compressor's environment: PYTHON bridges_matching_child.py CASES.json

Resolves each mapping by the tool's own function on empty modules of the names. Imports nothing of this project.
"""

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.utils import match_modules_set


def tree(modules: dict[str, str]) -> torch.nn.Module:
    """Empty modules of these names and classes, in their order."""
    root = torch.nn.Module()
    for name, kind in modules.items():
        at, parts = root, name.split(".") if name else []
        for depth, part in enumerate(parts):
            if part not in at._modules:  # of an expert the middle is not named
                last = depth == len(parts) - 1
                at.add_module(part, type(kind, (torch.nn.Module,), {})() if last else torch.nn.Module())
            at = at._modules[part]
    return root


def sets_of(case) -> list[list[list[str]]] | None:
    model = tree(case["modules"])
    names = {id(module): name for name, module in model.named_modules()}
    try:
        found = match_modules_set(model, case["targets"])
        return [[[names[id(module)] for module in part] for part in parts] for parts in found]
    except ValueError:
        return None


def main(path: str) -> None:
    print(json.dumps([sets_of(case) for case in json.loads(Path(path).read_text())]))


main(*sys.argv[1:])
