"""Why a part of a model is in no graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from autoquant.analyzer.analyze import analyze
from autoquant.analyzer.findings import Findings
from autoquant.analyzer.untraced import Widths, beside_unreached, unreached_parts, untraced, within_language_model
from autoquant.capture.routes import Captured, capture
from autoquant.config.format import Read, Reader, Slot, SmoothingGroup, SmoothingKind, Space, Writer
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
    assert unreached_parts(module, left_out, lambda: module(tokens)) == {
        "adapter": Widths(frozenset({6, 8, 16}), frozenset({6, 16}))
    }
    assert unreached_parts(module, left_out, lambda: module(tokens, guide)) == {}
    assert unreached_parts(module, ["codec"], lambda: module(tokens)) == {}
    module.codec.main_input_name = "hidden_states"  # then it may write anything
    assert unreached_parts(module, ["codec"], lambda: module(tokens)) == {
        "codec": Widths(frozenset({1, 3, 8}), frozenset({1}))
    }
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_a_stream_as_wide_as_what_is_not_reached_is_not_rotated() -> None:
    found = analyze(find_source("llama", layers=2)).findings
    (residual,) = [space for space in found.spaces if space.kind == "R1"]
    size, other = frozenset({residual.size}), frozenset({residual.size + 1})
    assert beside_unreached(found, {"adapter": Widths(other, other)}) == found
    assert beside_unreached(found, {"table": Widths(size | other, frozenset())}).groups == found.groups
    left = beside_unreached(found, {"adapter": Widths(size | other, size)})
    assert left.spaces == tuple(space for space in found.spaces if space is not residual)
    (*_, scaled, blocked) = left.blocked
    assert [group.name for group in found.groups if group not in left.groups] == ["model.norm -> lm_head"]
    assert (scaled.what, scaled.path, scaled.reason) == (
        "smoothing",
        "lm_head",
        "adapter, which the inputs that could be made do not reach, may read it",
    )
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


class Configured:
    """A configuration."""


class Gated(nn.Module):
    """A layer, of which a vector is read for an image alone where ``other`` is set."""

    def __init__(self, *, other: bool) -> None:
        super().__init__()
        self.norm, self.proj, self.out = nn.RMSNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.other = nn.RMSNorm(8) if other else None

    def forward(self, x: torch.Tensor, image: bool = False) -> torch.Tensor:
        normed = self.other(x) if image and self.other is not None else self.norm(x)
        return x + self.out(self.proj(normed))


class Text(nn.Module):
    """A language model."""

    def __init__(self, config: object, *, other: bool) -> None:
        super().__init__()
        self.config = config
        self.table, self.layers, self.norm = nn.Embedding(5, 8), nn.ModuleList([Gated(other=other)]), nn.RMSNorm(8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Seeing(nn.Module):
    """A language model, a head, a projector that a text goes through too, and a tower."""

    def __init__(self, *, other: bool = False) -> None:
        super().__init__()
        self.text_config = Configured()
        self.tower, self.projector = nn.Linear(8, 8), Gated(other=False)
        self.text, self.head = Text(self.text_config, other=other), nn.Linear(8, 5, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, tokens: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
        x = self.text(tokens)
        x = x + self.projector(self.text.table(tokens) if image is None else self.tower(image))
        return self.head(x)


def left_on_text(model: Seeing) -> tuple[set[str], Findings]:
    """Paths of the linears that smoothing groups of a model on text are left of, of those that could be made up."""
    smoothed = {"norm": "proj", "proj": "out"}
    groups = [
        SmoothingGroup(
            name=f"{part}.{source}",
            kind=SmoothingKind.NORM_LINEAR,
            channels=8,
            sources=(Slot(path=f"{part}.{source}.weight", dim=0, size=8),),
            targets=(Slot(path=f"{part}.{target}.weight", dim=1, size=8),),
        )
        for part in ("text.layers.0", "projector")
        for source, target in smoothed.items()
    ]
    final = (Slot(path="text.norm.weight", dim=0, size=8),), (Slot(path="head.weight", dim=1, size=8),)
    last = groups[0].model_copy(update={"name": "last", "sources": final[0], "targets": final[1]})
    spaces = tuple(
        Space(
            name=part,
            kind="other",
            size=8,
            writers=(Writer(path=f"{part}.proj.weight", dim=0, size=8),),
            reads=(Read(readers=(Reader(path=f"{part}.out.weight", dim=1, size=8),)),),
        )
        for part in ("text.layers.0", "projector")
    )
    found = Findings((), (*groups, last), spaces, (), (), ())
    left = within_language_model(found, model, model.text_config, lambda: model(torch.tensor([[1, 2]])))
    return {group.name for group in left.groups} | {f"space {space.name}" for space in left.spaces}, left


def test_beside_the_language_model_an_image_may_come_by_another_way() -> None:
    names, left = left_on_text(Seeing())
    assert names == {"text.layers.0.norm", "text.layers.0.proj", "last", "space text.layers.0"}
    said = "what images or sound become is not traced, and may come to it by another way than text does"
    assert {(b.path, b.what, b.operator) for b in left.blocked} == {
        ("projector.proj", "smoothing", "norm_linear"),
        ("projector.out", "smoothing", "norm_linear"),
        ("projector.proj", "rotation", "other"),
    }
    assert {b.reason for b in left.blocked} == {said}


def test_a_layer_that_calls_a_part_for_images_alone_is_such_a_way() -> None:
    names, _ = left_on_text(Seeing(other=True))
    assert names == {"last"}
