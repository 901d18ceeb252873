"""Brevitas' regions for graph equalization, as Python that its ``EqualizeGraph`` and ``apply_rotate`` understand.

A region names the tensors that make channels (sources) and those that read them (sinks), and a part of a tensor by
``EqualizationIndexes(start, end, offset)`` (``brevitas/graph/equalize.py``, 0.13.4).
"""

from __future__ import annotations

from autoquant.config.format import Config
from autoquant.errors import AutoQuantError
from autoquant.recipes.pairs import Refusal, scale_pairs

ALGORITHMS = ("equalize",)

_HEAD = '''"""Regions for brevitas.graph.equalize, written by AutoQuant: `regions(model)` gives them for a model."""

from brevitas.graph.equalize import EqualizationIndexes, Region

# Scaled module, and the linears that undo it: the names of modules.
PAIRS = {pairs}


def regions(model):
    """One region a pair: all rows of the first, all columns of the others."""
    modules = dict(model.named_modules())
    found = []
    for source, sinks in PAIRS:
        rows = modules[source].weight.shape[0]
        whole = EqualizationIndexes(0, rows, 0)
        found.append(
            Region.from_dicts(
                srcs={{f"{{source}}$0": whole}},
                sinks={{f"{{sink}}$0": whole for sink in sinks}},
                name_to_module={{name: modules[name] for name in (source, *sinks)}},
            )
        )
    return found
'''


def recipe(config: Config, algorithm: str = "equalize") -> tuple[str, list[Refusal]]:
    """The Python text, and what of the config it does not say. Raises AutoQuantError for another algorithm."""
    if algorithm not in ALGORITHMS:
        raise AutoQuantError(f"algorithm '{algorithm}': Brevitas' regions are for {', '.join(ALGORITHMS)}")
    pairs, refused = scale_pairs(config)
    rows = "".join(f"    {(smooth, balance)!r},\n" for pair in pairs for smooth, balance in pair.filled())
    spaces = [
        Refusal(f"{space.kind} {space.name}", "Brevitas finds what it rotates itself")
        for space in config.rotation.spaces
        if (config.rotation.enable if space.enable is None else space.enable)
    ]
    return _HEAD.format(pairs=f"[\n{rows}]"), [*refused, *spaces]
