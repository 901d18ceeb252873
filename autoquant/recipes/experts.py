"""Experts taken apart: what transformers 5 stacks, the tools have as one linear an expert."""

from __future__ import annotations

from torch import Tensor, nn

from autoquant.errors import AutoQuantError

EXPERT_PARTS = {"up_proj": "gate_up_proj", "gate_proj": "gate_up_proj", "down_proj": "down_proj"}
"""The stacked parameter that holds each linear of an expert, in this order: rows of gate, then up."""


def stacked(name: str) -> str:
    """The stacked parameter that holds an expert's linear: ``experts.3.up_proj`` is in ``experts.gate_up_proj``."""
    parts = name.split(".")
    for at, part in enumerate(parts[:-1]):
        if part.isdecimal() and parts[-1] in EXPERT_PARTS and parts[at - 1 : at] == ["experts"]:
            return ".".join([*parts[:at], EXPERT_PARTS[parts[-1]]])
    return name


def modules_of(module: nn.Module) -> dict[str, str]:
    """The names of all modules in their order with their classes, experts taken apart as the tools do it."""
    found: dict[str, str] = {}
    for name, part in module.named_modules():
        found[name] = type(part).__name__
        stacks = [getattr(part, held, None) for held in EXPERT_PARTS.values()]
        if all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in stacks):
            found |= dict.fromkeys(experts_in(name, len(part.down_proj)), "Linear")
    return found


def experts_in(module: str, count: int) -> list[str]:
    """The linears of the ``count`` experts that ``module`` holds, one expert after the other."""
    return [f"{module}.{expert}.{leaf}" for expert in range(count) for leaf in EXPERT_PARTS]


def expert_weight(module: nn.Module, name: str) -> Tensor:
    """The weight of an expert's linear, ``[out, in]``: a view of the stack that holds it, whichever way that lies.

    Raises AutoQuantError where gate and up do not lie one behind the other.
    """
    owner, number, leaf = name.rsplit(".", 2)
    experts = module.get_submodule(owner)
    if not getattr(experts, "is_concatenated", True):
        raise AutoQuantError(f"'{owner}' holds gate and up interleaved, and is not taken apart here")
    stacks = [experts.get_parameter(held)[int(number)] for held in ("gate_up_proj", "down_proj")]
    if stacks[0].shape[1] == 2 * stacks[1].shape[0]:  # [in, out], not [out, in]
        stacks = [stack.mT for stack in stacks]
    return stacks[1] if leaf == "down_proj" else stacks[0].chunk(2)[leaf == "up_proj"]
