"""What a model is made of, without its weights: names, shapes, dtypes and ties. One definition for every command."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from autoquant.capture.identity import grouped
from autoquant.config.layers import LAYER

FLOATING = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
"""Parameters that can be folded. Narrower floats carry scales of their own and are refused."""


def structure_of(module: nn.Module) -> ModelStructure:
    """The structure of a module on any device, the meta device included. Names are those of ``state_dict``."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    canonical = {name: names[0] for names in grouped(parameters.items()).values() for name in names}
    owners = dict(module.named_modules(remove_duplicate=False))
    shared = (
        name
        for name, first in canonical.items()
        if first != name and owners[name.rpartition(".")[0]] is owners[first.rpartition(".")[0]]
    )
    return ModelStructure(
        shapes={name: tuple(parameter.shape) for name, parameter in parameters.items()},
        dtypes={name: parameter.dtype for name, parameter in parameters.items()},
        canonical={name: canonical[name] for name in parameters},
        modules=frozenset(owners),
        shared_modules=frozenset(shared),
        growable=_growable(owners),
    )


def fingerprint(shapes: Mapping[str, Sequence[int]], tied: Iterable[Sequence[str]]) -> str:
    """``'sha256:…'`` of every parameter's name and shape, and of the groups of names that share storage.

    Independent of the order of both, of dtypes, and of the versions of torch and transformers.
    """
    lines = sorted(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    ties = sorted(" = ".join(sorted(names)) for names in tied)
    return "sha256:" + hashlib.sha256("\n".join([*lines, "tied:", *ties]).encode()).hexdigest()


def record_untied_(model: nn.Module) -> None:
    """Models of transformers tie again when saved or loaded unless their config says otherwise."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "tie_word_embeddings"):
            config.tie_word_embeddings = False


def _growable(owners: Mapping[str, nn.Module]) -> frozenset[str]:
    """Bias names that do not exist yet but could: a plain ``nn.Linear`` built without one adds it when it is there."""
    return frozenset(
        f"{name}.bias" if name else "bias"
        for name, module in owners.items()
        if isinstance(module, nn.Linear) and module.bias is None and type(module).forward is nn.Linear.forward
    )


@dataclass(frozen=True)  # no slots: the views are cached
class ModelStructure:
    """``canonical`` maps each name to the first name of the same tensor; ``shared_modules`` are the names whose whole
    module is shared, so that they can never be untied; ``growable`` are absent biases that can be created.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    canonical: Mapping[str, str]
    modules: frozenset[str] = frozenset()
    shared_modules: frozenset[str] = frozenset()
    growable: frozenset[str] = frozenset()
    _depths: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def ties(self) -> tuple[tuple[str, ...], ...]:
        """Groups of names of one tensor, canonical name first."""
        groups: dict[str, list[str]] = {}
        for name, first in self.canonical.items():
            groups.setdefault(first, []).append(name)
        return tuple(tuple(group) for group in groups.values() if len(group) > 1)

    @cached_property
    def parameters(self) -> int:
        """Number of elements, tied ones counted once."""
        return sum(math.prod(self.shapes[name]) for name, first in self.canonical.items() if name == first)

    @cached_property
    def fingerprint(self) -> str:
        """What tells this structure from another, see :func:`fingerprint`."""
        return fingerprint(self.shapes, self.ties)

    @cached_property
    def templates(self) -> tuple[str, ...]:
        """All names, and all with ``{layer}`` for a number, to look for near ones."""
        numbered = (re.sub(r"(?<=\.)\d+(?=\.)", LAYER, name, count=1) for name in (*self.shapes, *self.modules))
        return tuple(dict.fromkeys((*self.shapes, *self.modules, *numbered)))

    @cached_property
    def stack_lengths(self) -> frozenset[int]:
        """How many numbered modules each list of the model holds, lists inside of layers included."""
        last: dict[str, int] = {}
        for name in (*self.shapes, *self.modules):
            parts = name.split(".")
            for i, part in enumerate(parts):
                if part.isdecimal():
                    head = ".".join(parts[:i])
                    last[head] = max(last.get(head, 0), int(part) + 1)
        return frozenset(last.values())

    def depth(self, path: str) -> int:
        """How many layers there are where ``path`` has ``{layer}``; 0 where it has none."""
        head, layer, _ = path.partition(LAYER)
        if layer and head not in self._depths:
            numbers = (name[len(head) :].partition(".")[0] for name in self.shapes if name.startswith(head))
            self._depths[head] = max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)
        return self._depths[head] if layer else 0
