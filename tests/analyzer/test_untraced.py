"""Why a part of a model is in no graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from autoquant.analyzer.analyze import analyze
from autoquant.analyzer.untraced import beside_unreached, unreached_parts, untraced
from autoquant.capture.routes import Captured, capture
from autoquant.models.repair import find_source


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


class Guided(nn.Module):
    """Text alone, or what something else says about it: an adapter that these inputs do not reach."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 8)
        self.adapter = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 8))
        self.pooled = nn.MultiheadAttention(8, 2)
        self.idle = nn.Linear(8, 8)
        self.codec = Codec()
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: torch.Tensor, guide: torch.Tensor | None = None) -> torch.Tensor:
        x = self.table(tokens)
        self.pooled(x, x, x)  # of which nothing is taken
        return self.head(self.guided(x, guide))

    def guided(self, x: torch.Tensor, guide: torch.Tensor | None) -> torch.Tensor:
        return x if guide is None else x + self.adapter(guide)

    def heard(self, sound: torch.Tensor) -> torch.Tensor:
        return self.forward(self.codec(sound))


class Codec(nn.Module):
    """Makes tokens of a sound."""

    main_input_name = "input_values"

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 8, 3)

    def forward(self, sound: torch.Tensor) -> torch.Tensor:
        return self.conv(sound).argmax(1)


def test_what_other_inputs_lead_to_is_not_reached() -> None:
    """Neither what runs for nothing, nor what no code names, nor what makes token ids."""
    module = Guided().eval()
    left_out = ["adapter", "pooled", "idle", "codec"]
    tokens, guide = torch.tensor([[1, 2]]), torch.zeros(1, 2, 6)
    assert unreached_parts(module, left_out, lambda: module(tokens)) == {"adapter": frozenset({6, 8, 16})}
    assert unreached_parts(module, left_out, lambda: module(tokens, guide)) == {}
    assert unreached_parts(module, ["codec"], lambda: module(tokens)) == {}
    module.codec.main_input_name = "hidden_states"  # then it may write anything
    assert unreached_parts(module, ["codec"], lambda: module(tokens)) == {"codec": frozenset({1, 3, 8})}
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_a_stream_as_wide_as_what_is_not_reached_is_not_rotated() -> None:
    found = analyze(find_source("llama", layers=2)).findings
    (residual,) = [space for space in found.spaces if space.kind == "R1"]
    assert beside_unreached(found, {"adapter": frozenset({residual.size + 1})}) == found
    left = beside_unreached(found, {"adapter": frozenset({residual.size, 16})})
    assert left.spaces == tuple(space for space in found.spaces if space is not residual)
    (*_, blocked) = left.blocked
    assert (blocked.what, blocked.operator, blocked.path) == ("rotation", "R1", "model.embed_tokens")
    assert blocked.reason == "adapter, which the inputs that could be made do not reach, may read or write it"


def test_cross_attention_that_text_does_not_reach_forbids_the_rotation_of_its_stream() -> None:
    """Whisper's decoder alone, of use behind an encoder: what the cross-attention writes would not be rotated."""
    found = analyze(replace(find_source("whisper", layers=2), kind="causal-lm")).findings
    assert not [space for space in found.spaces if space.kind == "R1"]
    reasons = [block.reason for block in found.blocked if block.operator == "R1"]
    assert reasons == [
        "model.decoder.layers.0.encoder_attn, which the inputs that could be made do not reach, may read or write it"
    ]
