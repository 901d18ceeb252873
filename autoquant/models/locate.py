"""Where in a module a named weight is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from autoquant.config.spelling import did_you_mean
from autoquant.errors import AutoQuantError

WRAPPED = "linear"


def present_name(model: nn.Module, weight: str) -> str:
    """The name that a parameter has in the model now: inside the wrappers that :func:`locate` looks into."""
    path, _, name = weight.rpartition(".")
    owner = locate(model, weight).owner
    while model.get_submodule(path) is not owner:
        path = f"{path}.{WRAPPED}"
    return f"{path}.{name}"


@dataclass(frozen=True, slots=True)
class Location:
    """``parent`` holds ``owner`` as ``child``, and that holds ``parameter`` as ``name``."""

    parent: nn.Module
    child: str
    owner: nn.Module
    name: str
    parameter: Tensor


def locate(model: nn.Module, weight: str) -> Location:
    """Find a parameter by the name that it has in a config.

    A linear may meanwhile be in a wrapper, which holds it as ``linear`` (online rotations are put in so): the name is
    then that of the wrapper. Raises AutoQuantError, with the nearest name, where there is no such parameter.
    """
    path, _, name = weight.rpartition(".")
    above, _, child = path.rpartition(".")
    try:
        parent, owner = model.get_submodule(above), model.get_submodule(path)
        while _wraps(owner, name):
            parent, child, owner = owner, WRAPPED, owner.get_submodule(WRAPPED)
        return Location(parent, child, owner, name, owner.get_parameter(name))
    except AttributeError:
        names = [known for known, _ in model.named_parameters()]
        message = f"{weight}: the model has no such parameter{did_you_mean(weight, names)}"
        raise AutoQuantError(message) from None


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter or buffer, named as for :func:`locate`, and what it is called there.

    Raises AttributeError where the model has no such module.
    """
    owner = model
    *path, last = name.split(".")
    for child in path:
        owner = _inside(owner, child).get_submodule(child)
    return _inside(owner, last), last


def _inside(module: nn.Module, name: str) -> nn.Module:
    """The module, or what its wrappers hold, that has something of this name."""
    while _wraps(module, name):
        module = module.get_submodule(WRAPPED)
    return module


def _wraps(module: nn.Module, name: str) -> bool:
    """True if what has this name is not the module's own, and it may be that of a linear inside."""
    owned = name in module._modules or name in module._parameters or name in module._buffers
    return not owned and WRAPPED in module._modules
