"""Parameters that multiply vectors: folded into the linear behind them, or into the one before (LayerScale)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from oracle import proved
from small_graphs import Graph, lin, par
from torch import Tensor, nn
from torch.nn import functional

from autoquant.analyzer.analyze import analyze
from autoquant.analyzer.findings import Findings
from autoquant.certificate.certify import certify
from autoquant.config.check import problems
from autoquant.executor.apply import apply_
from autoquant.models.fit import structure_problems
from autoquant.models.source import ModelSource
from autoquant.models.structure import structure_of

TOKENS = torch.tensor([[3, 1, 4], [1, 5, 2]])


def rms(x: Tensor) -> Tensor:
    return functional.rms_norm(x, (4,))


def stream(branch: Callable[[Graph, Tensor], Tensor], norm: Callable[[Tensor], Tensor] = rms, **parts: object) -> Graph:
    """A residual stream to which a branch adds."""

    def function(s: Graph, tokens: Tensor) -> Tensor:
        x = s.emb(tokens)
        return s.head(norm(x + branch(s, norm(x))))

    made = {"emb": nn.Embedding(8, 4), "head": lin(), "a": lin(), "b": lin(), "g": par(4), **parts}
    return Graph(function, **made)  # type: ignore[arg-type]  # modules and parameters


def unit(s: Graph, x: Tensor) -> Tensor:
    return s.b(functional.relu(s.a(x)))


def residual(findings: Findings) -> list[tuple[str | None, list[str]]]:
    """What the residual stream is read behind, and by which parameters, writers left out."""
    spaces = [space for space in findings.spaces if space.kind == "R1"]
    return [
        (read.norm.weight if read.norm else None, sorted(f"{r.path}.{r.dim}" for r in read.readers))
        for space in spaces
        for read in space.reads
    ]


FOLDED = [("g", ["b.bias.0", "b.weight.0"]), (None, ["a.weight.1", "head.weight.1"])]


@pytest.mark.parametrize(
    "branch",
    [
        lambda s, x: s.g * unit(s, x),
        lambda s, x: unit(s, x) * (1 + s.g),
        lambda s, x: functional.dropout(0.5 * (unit(s, x) * s.g), 0.1, False),
        lambda s, x: (unit(s, x).transpose(1, 2) * s.g[:, None]).transpose(1, 2),
        lambda s, x: unit(s, x) * s.g.view(1, 1, 4),
    ],
)
def test_a_gain_is_folded_into_the_linear_before_it(branch: Callable[[Graph, Tensor], Tensor]) -> None:
    found = residual(proved(stream(branch), TOKENS))
    assert sorted(found, key=str) == sorted(FOLDED, key=str)


def test_one_gain_behind_two_linears_is_folded_into_both() -> None:
    def branch(s: Graph, x: Tensor) -> Tensor:
        return s.g * s.b(functional.relu(s.a(x))) + s.g * s.c(functional.relu(s.a(x)))

    found = dict(residual(proved(stream(branch, c=lin(bias=False)), TOKENS)))
    assert found["g"] == ["b.bias.0", "b.weight.0", "c.weight.0"]


@pytest.mark.parametrize(
    "branch",
    [
        lambda s, x: s.g * unit(s, x) + unit(s, x),  # the linear writes without it too
        lambda s, x: s.g * s.b(x) + functional.linear(x, s.b.weight.t()),  # and its weight is used the other way round
        lambda s, x: (lambda h: s.g * h + s.a(h))(s.b(x)),  # what it makes is read without the gain
        lambda s, x: (lambda h: h + s.a(h))(s.g * s.b(x)),  # and with it, by a linear that would hold it as well
        lambda s, x: s.g * unit(s, x) + s.g,  # the gain is added too
        lambda s, x: unit(s, x) * s.g[torch.tensor([1, 0, 2, 3])],  # it is counted otherwise
    ],
)
def test_a_gain_that_something_else_depends_on_ends_the_stream(branch: Callable[[Graph, Tensor], Tensor]) -> None:
    assert residual(proved(stream(branch), TOKENS)) == []


def centred(x: Tensor) -> Tensor:
    return functional.layer_norm(x, (4,))


def test_what_is_centred_later_takes_the_gain_before() -> None:
    """The rows of the linear are multiplied by the gain, and what they write then is centred."""
    found = proved(stream(lambda s, x: s.g * unit(s, x), centred), TOKENS)
    assert sorted(residual(found), key=str) == sorted(FOLDED, key=str)
    assert [space.centre for space in found.spaces if space.kind == "R1"] == [True]


@pytest.mark.parametrize(
    "branch",
    [
        lambda s, x: s.g * unit(s, x) + s.a(functional.linear(x, s.b.weight)),  # the linear is used without it too
        lambda s, x: (lambda h: h + s.a(functional.rms_norm(h, (4,))))(s.emb(TOKENS) + s.g * unit(s, x)),  # not centred
    ],
)
def test_what_is_centred_for_some_ends_with_its_gain(branch: Callable[[Graph, Tensor], Tensor]) -> None:
    assert residual(proved(stream(branch, centred), TOKENS)) == []


def heads(gain: Callable[[Graph, Tensor], Tensor]) -> Graph:
    """Two heads of two channels, whose values are multiplied by a gain behind attention."""

    def function(s: Graph, tokens: Tensor) -> Tensor:
        x = s.emb(tokens)
        q, k, v = (f(x).view(2, 3, 2, 2).transpose(1, 2) for f in (s.q, s.k, s.v))
        out = functional.scaled_dot_product_attention(q, k, v)
        return s.o(gain(s, out).transpose(1, 2).reshape(2, 3, 4))

    return Graph(function, emb=nn.Embedding(8, 4), q=lin(), k=lin(), v=lin(), o=lin(), two=par(2), four=par(4))


@pytest.mark.parametrize(
    ("gain", "norm"),
    [
        (lambda s, h: h * s.two, "two"),
        (lambda s, h: h * s.four.view(1, 2, 1, 2), "four"),
        (lambda s, h: functional.rms_norm(h, (2,), s.two), "two"),
    ],
)
def test_a_gain_of_heads_is_folded_into_what_reads_them(gain: Callable[[Graph, Tensor], Tensor], norm: str) -> None:
    spaces = [space for space in proved(heads(gain), TOKENS).spaces if space.kind == "R2"]
    assert [(s.size, s.blocks, [read.norm and read.norm.weight for read in s.reads]) for s in spaces] == [
        (2, 2, [norm])
    ]


@pytest.mark.parametrize(
    "gain",
    [
        lambda s, h: h * s.four.view(1, 2, 1, 2).flip(1),  # the first head's is the second one's
        lambda s, h: h * s.two.view(1, 2, 1, 1) * s.two,  # one for each head, then one of the channels
    ],
)
def test_a_gain_in_another_order_ends_the_values(gain: Callable[[Graph, Tensor], Tensor]) -> None:
    assert [space for space in proved(heads(gain), TOKENS).spaces if space.kind == "R2"] == []


def test_the_config_of_a_folded_gain_fits_together() -> None:
    """Its readers are the rows of a linear, and the linear's bias."""
    model = stream(lambda s, x: s.g * unit(s, x))
    config = analyze(ModelSource("gain", factory=lambda: (model, (TOKENS,)))).config
    (read,) = (read for space in config.rotation.spaces for read in space.reads if read.norm is not None)
    assert [(reader.path, reader.dim) for reader in read.readers] == [("b.weight", 0), ("b.bias", 0)]
    assert problems(config) == []


def test_what_a_linear_writes_is_centred_behind_the_gain_that_it_takes() -> None:
    model = stream(lambda s, x: s.g * unit(s, x), centred).double()
    source = ModelSource("gain", factory=lambda: (copy.deepcopy(model), (TOKENS,)))
    config = certify(analyze(source), source)
    before = model(TOKENS)
    assert problems(config) == [] == structure_problems(config, structure_of(model))
    applied = apply_(model, config, smooth="none")
    assert applied.spaces == ("residual",)
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-12, atol=1e-12)
    for written in (model.b.weight, model.b.bias, model.emb.weight.mT):
        torch.testing.assert_close(written.mean(0), torch.zeros_like(written[0]), rtol=0, atol=1e-12)
