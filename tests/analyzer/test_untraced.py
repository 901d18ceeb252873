"""Why a part of a model is in no graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autoquant.analyzer.untraced import untraced
from autoquant.capture.routes import Captured, capture


class Step(nn.Module):
    """Breaks the graph after its product."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj(x)
        torch._dynamo.graph_break()
        return torch.relu(x)


class Stepped(nn.Module):
    """Steps in a loop, which Dynamo leaves to Python, and so a table, a tied head, and a part that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 8)
        self.steps = nn.ModuleList([Step(), Step()])
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.table.weight
        self.idle = nn.Linear(8, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        for step in self.steps:
            x = x + step(x)
        return self.head(x)


class Straight(Stepped):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(tokens))


def reasons(module: nn.Module, missing: dict[str, str] | None = None) -> tuple[Captured, dict[str, str]]:
    captured = capture(module.eval(), (torch.tensor([[1, 2, 4]]),), {}, "dynamo")
    blocked = untraced(module, captured, missing or {})
    assert len(blocked) == 2 * len({b.path for b in blocked})  # of both symmetries
    return captured, {b.path: b.reason for b in blocked}


@pytest.mark.usefixtures("_fresh_dynamo")
def test_what_code_between_pieces_uses_is_not_said_to_be_without_effect() -> None:
    captured, why = reasons(Stepped())
    assert captured.how == "dynamo-pieces"
    assert captured.hidden == ("table.weight", "head.weight")
    between = (
        "it is not traced: code between the pieces that Dynamo compiles uses it, and what feeds or reads it is unseen"
    )
    assert why == {
        "table": between,
        "head": between,
        "idle": "it is not traced: nothing that it computes reaches the logits",
    }


@pytest.mark.usefixtures("_fresh_dynamo")
def test_a_whole_graph_has_no_hidden_parameters() -> None:
    captured, why = reasons(Straight(), {"pictures": "no processor"})
    assert captured.how == "dynamo"
    assert captured.hidden == ()
    assert set(why) == {"steps", "idle"}
    assert set(why.values()) == {"it is not traced: no pictures could be made (no processor)"}


@pytest.fixture
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
