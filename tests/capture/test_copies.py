from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.analyzer.analyze import analyze
from autoquant.capture.copies import copied
from autoquant.certificate.certify import certify
from autoquant.certificate.claims import claims
from autoquant.models.source import ModelSource
from tests.certificate.modules import Unit

Patch = Callable[[nn.Linear], None]


def closure(part: nn.Linear) -> None:
    old = part.forward
    part.forward = lambda x: 2 * old(x)


def default(part: nn.Linear) -> None:
    part.forward = lambda x, old=part.forward: 2 * old(x)  # type: ignore[misc]  # the default is the old one


def nested(part: nn.Linear) -> None:
    old = {"it": part.forward}

    def again(x: Tensor, depth: int) -> Tensor:
        return old["it"](x) if depth == 0 else 2 * again(x, depth - 1)

    part.forward = partial(again, depth=1)


def hooked(part: nn.Linear) -> None:
    part.register_forward_hook(lambda _, args, output: output + part.weight.sum() * 0 + output)


def doubled(patch: Patch) -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    patch(module[0])  # type: ignore[arg-type]  # the first is a linear
    return module


def test_a_copy_runs_on_its_own_parameters() -> None:
    for patch in (closure, default, nested, hooked):
        module, x = doubled(patch), torch.randn(2, 3)
        before = module(x)
        other = copied(module)
        assert torch.equal(other(x), before)
        with torch.no_grad():
            other[0].weight.zero_()
            other[0].bias.fill_(1)
        assert torch.equal(module(x), before)
        assert torch.equal(other(x), torch.full((2, 4), 2.0)), patch.__name__


def test_what_holds_no_part_of_the_module_is_shared() -> None:
    calls: list[int] = []
    module: Any = nn.Linear(2, 2)
    module.count = lambda: calls.append(1)
    other = copied(module)
    other.count()
    assert other.count is module.count
    assert calls == [1]
    shared = copied(module, {id(module.weight): module.weight})
    assert shared.weight is module.weight
    assert shared.bias is not module.bias


def test_a_patched_forward_is_proved() -> None:
    """Two linears of a unit are called by closures over their own methods."""

    def factory() -> tuple[nn.Module, tuple[Tensor]]:
        unit = Unit(lambda unit, hidden: hidden.relu())
        closure(unit.up)
        closure(unit.down)
        return unit, (torch.arange(1, 4)[None],)

    source = ModelSource("patched", factory=factory)
    names = [name for name, _ in claims(certify(analyze(source), source))]
    assert "up -> down" in names
    assert "norm -> up" in names


class Normed(nn.Module):
    """Holds a weight that was computed from two parameters, as torch's older ``weight_norm`` does."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.direction = nn.Parameter(torch.ones(3)), nn.Parameter(torch.randn(3, 4))
        self.made = self.gain[:, None] * self.direction

    def forward(self, x: Tensor) -> Tensor:
        self.made = self.gain[:, None] * self.direction
        return x @ self.made.T


def test_a_tensor_with_a_history_is_copied_without_it() -> None:
    module = Normed()
    made = copied(module)
    assert made.made.is_leaf and not module.made.is_leaf
    assert torch.equal(made.made, module.made) and made.made is not module.made
    x = torch.randn(2, 4)
    assert torch.equal(made(x), module(x))
