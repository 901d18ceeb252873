"""Tensors that the graph reads and writes anew: what is written carries what is read in the next call."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from oracle import outcomes
from small_graphs import Graph, lin
from torch import Tensor, nn
from torch.nn import functional

from autoquant.analyzer.analysis import analyse
from autoquant.analyzer.findings import Findings
from autoquant.capture.routes import capture

TOKENS = torch.tensor([[3, 1, 4], [1, 5, 2]])


def judged(model: nn.Module) -> Findings:
    """The findings, each of them carried out and compared over two calls, of which the second reads the first."""
    model = model.double()
    findings = analyse(capture(model, (TOKENS,), {})).findings

    def twice(module: nn.Module) -> tuple[Tensor, Tensor]:
        module = copy.deepcopy(module)  # with the state as it was made
        return module(TOKENS), module(TOKENS.flip(1))

    for outcome in outcomes(model, twice, findings):
        assert outcome.change < 1e-9, outcome
    return findings


def claims(findings: Findings) -> tuple[list[str], list[str]]:
    return [group.name for group in findings.groups], [space.kind for space in findings.spaces]


def attention(put: Callable[[Tensor, Tensor], None]) -> Graph:
    """Gpt-fast's: keys and values go into buffers, attention reads the buffers."""

    def function(s: Graph, tokens: Tensor) -> Tensor:
        x = functional.rms_norm(s.emb(tokens), (4,))
        q, k, v = (f(x).view(2, 3, 2, 2).transpose(1, 2) for f in (s.q, s.k, s.v))
        put(s.kc, k)
        put(s.vc, v)
        mask = torch.arange(8)[None] < 3
        return s.o(functional.scaled_dot_product_attention(q, s.kc, s.vc, attn_mask=mask).transpose(1, 2).flatten(2))

    cache = {name: torch.zeros(2, 2, 8, 2, dtype=torch.float64) for name in ("kc", "vc")}
    return Graph(function, emb=nn.Embedding(8, 4), q=lin(), k=lin(), v=lin(), o=lin(), **cache)


def by_index(cache: Tensor, new: Tensor) -> None:
    cache[:, :, torch.arange(3)] = new


def by_slice(cache: Tensor, new: Tensor) -> None:
    cache[:2, :, 0:3] = new


def by_copy(cache: Tensor, new: Tensor) -> None:
    cache.index_copy_(2, torch.arange(3), new)


@pytest.mark.parametrize("put", [by_index, by_slice, by_copy])
def test_caches_pass_scales_and_rotations(put: Callable[[Tensor, Tensor], None]) -> None:
    groups, spaces = claims(judged(attention(put)))
    assert groups == ["q -> k", "v -> o"]
    assert spaces == ["R1", "R2"]


class Plain(nn.Module):
    """Llama's: the caches are plain attributes, which the forward moves to its own dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(8, 4), lin()
        self.q, self.k, self.v, self.o = (lin() for _ in range(4))
        self.kc, self.vc = torch.zeros(2, 8, 2, 2, dtype=torch.float64), torch.zeros(2, 8, 2, 2, dtype=torch.float64)
        self.gain = torch.full((4,), 0.5, dtype=torch.float64)

    @torch.inference_mode()
    def forward(self, tokens: Tensor) -> Tensor:
        batch, length = tokens.shape
        x = functional.rms_norm(self.emb(tokens), (4,)) * self.gain
        q, k, v = (f(x).view(batch, length, 2, 2) for f in (self.q, self.k, self.v))
        self.kc, self.vc = self.kc.to(q), self.vc.to(q)
        self.kc[:batch, :length], self.vc[:batch, :length] = k, v
        k, v = self.kc[:batch, :length], self.vc[:batch, :length]
        mixed = functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        return self.head(self.o(mixed.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]  # nn.Module


def test_a_plain_attribute_that_the_graph_writes_is_state() -> None:
    model = Plain()
    before = model.kc
    captured = capture(model.double(), (TOKENS,), {})
    kinds = {what.name: what.kind for what in captured.subgraphs[0].inputs.values()}
    assert kinds["kc"] == kinds["vc"] == "buffer"
    assert len(captured.subgraphs[0].written) == 2
    assert model.kc is before and "kc" not in model._buffers
    groups, spaces = claims(judged(model))
    assert groups == ["q -> k", "v -> o", "o -> head"]
    assert "R2" in spaces


def scan(read: Callable[[Tensor], Tensor], write: Callable[[Tensor], Tensor]) -> Graph:
    """A state that decays, with the mean of the new tokens added."""

    def function(s: Graph, tokens: Tensor) -> Tensor:
        old = s.state
        new = 0.5 * old + write(s.u(torch.tanh(s.emb(tokens))).mean(1))
        s.state.copy_(new)
        return s.o(read(old) + new)

    state = torch.zeros(2, 4, dtype=torch.float64)
    return Graph(function, emb=nn.Embedding(8, 4), u=lin(), o=lin(), state=state)


def test_a_state_that_is_read_and_written_as_it_is() -> None:
    assert claims(judged(scan(lambda x: x, lambda x: x)))[0] == ["u -> o"]


@pytest.mark.parametrize("read", [torch.tanh, lambda x: x + 1.0, lambda x: x.square()])
def test_what_is_done_to_a_state_that_is_read_counts(read: Callable[[Tensor], Tensor]) -> None:
    """In the first call it is 0, and nothing would show."""
    assert claims(judged(scan(read, lambda x: x)))[0] == []


def test_a_state_whose_channels_change_places_has_one_scale() -> None:
    model = scan(lambda x: x, lambda x: x)
    inner = model.function

    def turned(s: Graph, tokens: Tensor) -> Tensor:
        out = inner(s, tokens)
        s.state.copy_(s.state.roll(1, -1))
        return out

    model.function = turned
    assert [group.channels for group in judged(model).groups] == [1]
