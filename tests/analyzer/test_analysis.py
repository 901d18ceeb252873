"""From a graph to findings: a model from outside transformers, and what findings promise as a whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention_graphs import cat_heads, heads, projections, rotary_complex
from oracle import analysed, outcomes, randomised
from readable import text
from small_graphs import Graph, X
from torch import Tensor, nn

from autoquant.analyzer.analysis import NO_MODULE, qualified
from autoquant.analyzer.analyze import analyze
from autoquant.certificate.certify import certify
from autoquant.errors import AutoQuantError
from autoquant.models.build import build_meta, changed
from autoquant.models.repair import find_source
from autoquant.models.source import LoadedModel, ModelSource, build_module

EXAMPLES = Path(__file__).parent.parent / "examples"

ODD = """\
norm_linear 24 layers 0-1
    stages.{layer}.tame_a.weight.0
 -> stages.{layer}.vkq.weight.1
query_key 24 layers 0-1
    stages.{layer}.vkq.weight.0[24..47] stages.{layer}.vkq.bias.0[24..47]
 -> stages.{layer}.vkq.weight.0[48..71] stages.{layer}.vkq.bias.0[48..71]
linear_linear 24 layers 0-1
    stages.{layer}.vkq.weight.0[0..23] stages.{layer}.vkq.bias.0[0..23]
 -> stages.{layer}.glue.0[0:2x2x6/12,6,1>12+6,-12,1]
norm_linear 24 layers 0-1
    stages.{layer}.tame_b.weight.0
 -> stages.{layer}.puff.weight.1
linear_linear 40 layers 0-1
    stages.{layer}.puff.weight.0[1:40/2>1]
 -> stages.{layer}.squeeze.weight.1
norm_linear 24
    last.weight.0
 -> voice.weight.1
R1 1 x 24
    words.weight.1
    stages.{layer}.glue.1 layers 0-1
    stages.{layer}.squeeze.weight.0 layers 0-1
 -> rms(stages.{layer}.tame_a.weight) stages.{layer}.vkq.weight.1 +bias layers 0-1
 -> rms(stages.{layer}.tame_b.weight) stages.{layer}.puff.weight.1 layers 0-1
 -> rms(last.weight) voice.weight.1
R2 4 x 6 layers 0-1
    stages.{layer}.vkq.weight.0[0..23]
    stages.{layer}.vkq.bias.0[0..23]
 -> stages.{layer}.glue.0[0:2x2x6/12,6,1>12+6,-12,1]"""


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(EXAMPLES)
    return "odd_model:build"


def test_a_model_with_names_that_nobody_uses(odd: str) -> None:
    analyzed = analyze(find_source(odd))
    lines = [line for line in text(analyzed.findings).splitlines() if not line.startswith("online")]
    assert "\n".join(lines) == ODD
    assert analyzed.findings.blocked == ()
    assert {linear.path: linear.role for linear in analyzed.findings.linears}["voice"] == "lm_head"


def test_its_claims_hold(odd: str) -> None:
    module, args = find_source(odd).factory()
    module = randomised(module)
    for outcome in outcomes(module, lambda m: m(*args), analysed(module, *args)):
        assert outcome.change < 1e-9, outcome


def test_nothing_of_the_model_changes() -> None:
    module = randomised(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    analysed(module, torch.randn(1, 3, 4, dtype=torch.float64))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_graph_breaks_end_every_scale_that_crosses_them() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.c(torch.relu(self.b(x)))

    from autoquant.analyzer.analysis import analyse
    from autoquant.capture.routes import capture

    module = randomised(Broken())
    x = torch.randn(1, 3, 4, dtype=torch.float64)
    captured = capture(module, (x,), {}, "dynamo")
    assert captured.how == "dynamo-pieces"
    findings = analyse(captured).findings
    assert [group.name for group in findings.groups] == ["b -> c"]
    for outcome in outcomes(module, lambda m: m(x), findings):
        assert outcome.change < 1e-9, outcome


def test_operators_are_named_in_full() -> None:
    assert qualified("silu") == "aten.silu"
    assert qualified("transformers::grouped_mm_fallback") == "transformers.grouped_mm_fallback"


def test_what_is_read_off_a_shorter_version_has_to_fit_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    source = find_source("llama")
    changes = {"num_hidden_layers": 2, "intermediate_size": 64}
    short = build_module(source, changed(source.config, changes), torch.device("meta"), torch.float32)

    def shorter(source: ModelSource) -> LoadedModel:
        return replace(build_meta(source), short=short)

    monkeypatch.setattr("autoquant.analyzer.analyze.build_meta", shorter)
    with pytest.raises(AutoQuantError, match="llama: what was read off a shorter version of it does not fit it: "):
        analyze(source)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8, bias=False), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid() + self.down(self.up(x.tanh()).sigmoid())


class Tied(nn.Module):
    """Two blocks with one weight between them, in modules of their own; ``again`` reads it by other code too."""

    def __init__(self, again: bool = False, listed: bool = True) -> None:
        super().__init__()
        self.again = again
        self.embed, self.head = nn.Embedding(16, 6), nn.Linear(6, 16)
        one, other = Block(), Block()
        other.up.weight = one.up.weight
        if listed:
            self.blocks = nn.ModuleList([one, other])
        else:
            self.one, self.other = one, other

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        blocks = [part for part in self.modules() if isinstance(part, Block)]
        for block in blocks:
            x = block(x)
        more = nn.functional.linear(x.tanh(), blocks[0].up.weight).sum(-1, keepdim=True) if self.again else 0
        logits: Tensor = self.head((x + more).tanh())
        return logits


UP, DOWN = "blocks.{layer}.up", "blocks.{layer}.down"
UNLISTED = "its weight is that of another module, under whose path alone it is listed"


@pytest.mark.parametrize(
    ("again", "listed", "online", "refused"),
    [
        (False, True, [(DOWN, "0-1"), (UP, "0-1")], {}),
        (True, True, [(DOWN, "0-1")], {UP: NO_MODULE}),
        (False, False, [("one.down", None), ("one.up", None), ("other.down", None)], {"other.up": UNLISTED}),
    ],
)
def test_a_tied_weight_is_rotated_before_each_module_that_holds_it(
    again: bool, listed: bool, online: list[tuple[str, str | None]], refused: dict[str, str]
) -> None:
    source = ModelSource("tied", factory=lambda: (Tied(again, listed), (torch.tensor([[3, 1, 4, 1]]),)))
    config = certify(analyze(source), source)
    assert sorted((one.path, one.layers) for one in config.rotation.online) == online
    found = {blocked.path: blocked.reason for blocked in config.blocked if blocked.what == "rotation"}
    assert {path: reason for path, reason in found.items() if path != "embed"} == refused
    assert config.certificate is not None
    assert config.certificate.proved


def test_values_that_are_no_vectors_any_more_say_what_ended_them() -> None:
    """Turned pair by pair as complex numbers before attention adds them up: no rotation of a head, and why."""

    def function(s: Graph, x: Tensor) -> Tensor:
        q, k, v = (heads(f(x), 2) for f in (s.q, s.k, s.v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, rotary_complex(v))
        return s.o(cat_heads(out))

    found = analysed(Graph(function, **projections(8, 8, 8, 8)), X)
    assert [space.kind for space in found.spaces if space.kind == "R2"] == []
    (said,) = (blocked for blocked in found.blocked if blocked.what == "rotation")
    assert (said.reason, said.operator) == ("pairs of its channels become complex numbers", "aten.view_as_complex")
