"""Apply a config to a module in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoquant.config.format import Config
from autoquant.errors import AutoQuantError
from autoquant.executor.online import check_installable, install_
from autoquant.executor.pieces import execute
from autoquant.executor.plan import Plan, Scales, make_plan
from autoquant.executor.resolve import Smooth, resolve
from autoquant.executor.resolved import Resolved, check_not_learned
from autoquant.models.structure import record_untied_, structure_of


@torch.no_grad()
def apply_(
    model: nn.Module,
    config: Config,
    *,
    rotate: bool = True,
    smooth: Smooth = "all",
    scales: Scales | None = None,
    only: Collection[str] | None = None,
    seed: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Applied:
    """Change a model by a config so that its function stays the same.

    ``scales``: per smoothing group and layer, see ``plan.Scales``; needed where a group is selected. ``only``: names of
    groups and spaces (and paths of online rotations) to apply, alone and whatever is enabled. ``seed`` replaces
    ``rotation.seed``. ``progress(done, total)`` is called after each parameter.

    Parameters keep their identity, dtype and device; each is computed in float64 and rounded once. Raises
    AutoQuantError with nothing changed where the config does not fit, would change nothing, or a parameter holds a NaN
    or an infinity.
    """
    inventory = structure_of(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise AutoQuantError("the model has no weights (it is on the meta device); load a checkpoint first")
    resolved = resolve(config, inventory, rotate=rotate, smooth=smooth, only=only, seed=seed)
    check_not_learned(resolved)
    check_installable(model, resolved.online)
    plan = make_plan(resolved, inventory, model.get_parameter, scales)
    for name in plan.operations:
        if name not in plan.created:
            check_finite(name, model.get_parameter(name))
    execute_(model, plan, progress)
    return summarise(plan, resolved)


def execute_(model: nn.Module, plan: Plan, progress: Callable[[int, int], None] | None = None) -> None:
    """Carry out a plan. Untying and new biases come first, so that each name is a parameter of its own."""
    for name in plan.untied:
        old = model.get_parameter(name)
        _set_parameter_(model, name, nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))
    if plan.untied:
        record_untied_(model)
    for name, weight_name in plan.created.items():
        weight = model.get_parameter(weight_name)
        _set_parameter_(
            model, name, nn.Parameter(weight.new_zeros(weight.shape[0]), requires_grad=weight.requires_grad)
        )
    for done, (name, operations) in enumerate(plan.operations.items(), 1):
        parameter = model.get_parameter(name)
        changed = execute(operations, parameter.detach())
        check_finite(name, changed, f"overflows {parameter.dtype} when transformed; load the model in a wider type")
        parameter.copy_(changed)
        if progress is not None:
            progress(done, len(plan.operations))
    for path in plan.identities:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())
    install_(model, plan.online)


def check_finite(name: str, tensor: Tensor, problem: str = "holds a NaN or an infinity") -> None:
    """Raise AutoQuantError where a tensor has a NaN or an infinity."""
    if not is_finite(tensor):
        raise AutoQuantError(f"{name} {problem}")


def is_finite(tensor: Tensor) -> bool:
    """True if no element is a NaN or an infinity, by the extremes: a pass without a temporary of the tensor's size."""
    return not tensor.numel() or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def summarise(plan: Plan, resolved: Resolved) -> Applied:
    """What a plan did, for reports and provenance."""
    return Applied(
        tuple(dict.fromkeys(space.name for space in resolved.spaces)),
        tuple(dict.fromkeys(group.name for group in resolved.groups)),
        tuple(online.path for online in resolved.online),
        plan.untied,
        tuple(plan.created),
        plan.constructions,
        len(plan.operations),
    )


def _set_parameter_(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, parameter)


@dataclass(frozen=True, slots=True)
class Applied:
    """Names of what was applied; ``constructions``: rotation in words per space; ``tensors``: number of parameters
    changed.
    """

    spaces: tuple[str, ...]
    groups: tuple[str, ...]
    online: tuple[str, ...]
    untied: tuple[str, ...]
    created: tuple[str, ...]
    constructions: dict[str, str]
    tensors: int
