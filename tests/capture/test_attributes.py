"""Tensors in plain attributes: those that a call writes to are captured as buffers, and put back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autoquant.capture.attributes import attributes_as_buffers
from autoquant.capture.routes import capture, check_against_eager

X = torch.arange(6.0).view(2, 3)


class Cached(nn.Module):
    """Keeps what it saw, reads a table that nothing writes to, and replaces a third tensor."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3, device=device)
        self.seen = torch.zeros(4, 3, device=device)
        self.table = torch.ones(3, device=device)
        self.last = torch.zeros(2, 3, device=device)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen.to(x)
        self.seen[: len(x)] = self.lin(x)
        self.last = x
        return self.seen[: len(x)] * self.table


def kinds(device: str) -> dict[str, str]:
    module = Cached(device)
    captured = capture(module, (X.to(device),), {})
    assert captured.how == "dynamo"
    (subgraph,) = captured.subgraphs
    return {what.name: what.kind for what in subgraph.inputs.values()}


def test_what_is_written_is_a_buffer_and_the_rest_a_constant() -> None:
    found = kinds("cpu")
    assert (found["seen"], found["table"]) == ("buffer", "constant")


def test_on_the_meta_device_all_are_buffers() -> None:
    found = kinds("meta")
    assert (found["seen"], found["table"]) == ("buffer", "buffer")


def test_the_graph_computes_what_the_module_does() -> None:
    module = Cached()
    assert check_against_eager(module, (X,), {}, capture(module, (X,), {})) == 0.0


def test_the_module_is_left_as_it_was() -> None:
    module = Cached()
    held = module.seen
    with attributes_as_buffers(module, (X,), {}):
        assert sorted(dict(module.named_buffers())) == ["last", "seen"]
    assert vars(module)["seen"] is held and not dict(module.named_buffers())
    assert not held.any() and not module.last.any()
