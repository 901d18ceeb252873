"""Claims that once were made and do not hold: each kind as a small graph, with the right finding."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from oracle import proved
from small_graphs import Graph, lin
from torch import Tensor, nn
from torch.nn import functional

from autoquant.analyzer.analyze import analyze
from autoquant.analyzer.findings import Findings
from autoquant.analyzer.scale_state import ScaleAnalysis
from autoquant.certificate.certify import certify
from autoquant.models.source import ModelSource

X = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOKENS = torch.tensor([[3, 1, 4]])


def groups(findings: Findings) -> list[str]:
    return [group.name for group in findings.groups]


def reasons(findings: Findings, path: str) -> set[str]:
    return {blocked.reason for blocked in findings.blocked if blocked.path == path and blocked.what == "smoothing"}


@pytest.mark.parametrize("alpha", [2, 0.5, -1])
def test_a_gain_with_another_factor_than_1_is_no_gain(alpha: float) -> None:
    g = nn.Parameter(torch.randn(4))
    right = Graph(lambda s, x: s.b(torch.tanh(s.a(x)) * torch.add(s.g, 1)), a=lin(), b=lin(), g=g)
    wrong = Graph(lambda s, x: s.b(torch.tanh(s.a(x)) * torch.add(s.g, 1, alpha=alpha)), a=lin(), b=lin(), g=g)
    sources = {slot.path for group in proved(right, X).groups for slot in group.sources}
    assert "g" in sources
    assert groups(proved(wrong, X)) == []
    assert "g" not in {slot.path for group in proved(wrong, X).groups for slot in group.sources}


def test_what_is_left_out_of_a_reversed_difference_is_its_first_argument() -> None:
    model = Graph(lambda s, x: s.c(torch.rsub(s.a(x), s.b(x), alpha=0)), a=lin(), b=lin(), c=lin())
    assert groups(proved(model, X)) == ["b -> c"]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_what_is_written_into_integers_is_rounded(dtype: torch.dtype) -> None:
    def rounded(s: Graph, x: Tensor) -> Tensor:
        y = s.a(x)
        return s.b(torch.empty(y.shape, dtype=dtype).copy_(y).to(y.dtype))

    findings = proved(Graph(rounded, a=lin(), b=lin()), X)
    assert groups(findings) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_a_round_trip_through_a_narrower_format_rounds(dtype: torch.dtype) -> None:
    model = Graph(lambda s, x: s.b(s.a(x).to(dtype).to(x.dtype)), a=lin(), b=lin())
    findings = proved(model, X)
    assert groups(findings) == []
    assert f"it is rounded to {str(dtype).removeprefix('torch.')}" in reasons(findings, "b")


def test_a_round_trip_of_a_weight_through_a_narrower_format_rounds() -> None:
    model = Graph(
        lambda s, x: s.b(functional.linear(x, s.w.bfloat16().to(x.dtype))), b=lin(), w=nn.Parameter(torch.randn(4, 4))
    )
    assert groups(proved(model, X)) == []


def stream(function: object, **parts: nn.Module | nn.Parameter) -> Graph:
    return Graph(function, emb=nn.Embedding(8, 4), w1=lin(), w2=lin(), head=lin(), **parts)


def spaces(findings: Findings) -> list[str]:
    return [space.kind for space in findings.spaces if space.kind == "R1"]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_bias_that_is_subtracted_behind_a_gain_is_no_bias_of_the_norm(sign: int) -> None:
    def function(s: Graph, tokens: Tensor) -> Tensor:
        x = s.emb(tokens)
        y = functional.rms_norm(x, (4,)) * s.g
        return s.head(torch.tanh(s.w1(y + s.beta if sign > 0 else y - s.beta)))

    g, beta = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
    assert spaces(proved(stream(function, g=g, beta=beta), TOKENS)) == (["R1"] if sign > 0 else [])


@pytest.mark.parametrize(
    ("name", "mean", "found"),
    [
        ("mean", lambda m: m, ["R1"]),
        ("half", lambda m: 0.5 * m, []),
        ("negated", lambda m: -m, []),
    ],
)
def test_only_the_mean_itself_centres(name: str, mean: object, found: list[str]) -> None:
    def function(s: Graph, tokens: Tensor) -> Tensor:
        x = s.emb(tokens)
        return s.head(torch.tanh(s.w1(x - mean(x.mean(-1, keepdim=True)))))  # type: ignore[operator]

    assert spaces(proved(stream(function), TOKENS)) == found, name


@pytest.mark.parametrize("shared", [False, True])
def test_a_weight_that_other_code_reads_gets_no_online_rotation(shared: bool) -> None:
    def function(s: Graph, tokens: Tensor) -> Tensor:
        h = torch.relu(s.w1(torch.tanh(s.emb(tokens))))
        return s.head(torch.tanh(functional.linear(h, s.w1.weight.t()) if shared else s.w2(h)))

    findings = proved(stream(function), TOKENS)
    assert [online.path for online in findings.online] == ([] if shared else ["w1", "w2"])


@pytest.mark.parametrize("read", [lambda w: w.sum(0), lambda w: w.round(decimals=1)[0], lambda w: w.square().mean()])
def test_a_weight_that_is_a_tensor_too_gets_no_online_rotation(read: Callable[[Tensor], Tensor]) -> None:
    def function(s: Graph, tokens: Tensor) -> Tensor:
        x = s.emb(tokens)
        return s.head(torch.tanh(s.w2(torch.relu(s.w1(torch.tanh(x) + read(s.w1.weight))))))

    assert [online.path for online in proved(stream(function), TOKENS).online] == ["w2"]


def test_a_parameter_without_an_axis_is_one_number() -> None:
    model = Graph(
        lambda s, x: s.o(x + s.alpha * s.b(torch.relu(s.a(x)))),
        a=lin(),
        b=lin(),
        o=lin(),
        alpha=nn.Parameter(torch.tensor(0.3)),
    )
    assert groups(proved(model, X)) == ["a -> b"]


@torch.library.custom_op("autoquant_tests::overwrite", mutates_args=("x",))
def overwrite(x: Tensor) -> None:
    x.copy_(x.tanh())


def test_an_operator_that_only_writes_blocks_what_it_is_given() -> None:
    def function(s: Graph, x: Tensor) -> Tensor:
        y = s.a(x).clone()
        overwrite(y)
        return s.b(y)

    findings = proved(Graph(function, a=lin(), b=lin()), X)
    assert groups(findings) == []
    assert findings.blocked


def test_movement_that_torch_refuses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: ScaleAnalysis, *args: object) -> None:
        raise RuntimeError("these labels do not fit\n  and more")

    model = Graph(lambda s, x: s.b(s.a(x).flip(1)), a=lin(), b=lin())
    assert groups(proved(model, X)) == ["a -> b"]
    monkeypatch.setattr(ScaleAnalysis, "move", refuse)
    findings = proved(model, X)
    assert groups(findings) == []
    (reason,) = reasons(findings, "b")
    assert reason.endswith("its elements cannot be followed: RuntimeError: these labels do not fit and more")


class HeadByReference(nn.Module):
    """Has the table's weight as its own parameter, and reads it from the table."""

    def __init__(self, table: nn.Embedding, hold: Callable[[nn.Embedding], object]) -> None:
        super().__init__()
        self.weight, self.held = table.weight, hold(table)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.held() if callable(self.held) else self.held[0]  # type: ignore[index]  # a list or a function
        return functional.linear(x, weight.weight if isinstance(weight, nn.Module) else weight)


HOLDS: dict[str, Callable[[nn.Embedding], object]] = {
    "a list": lambda table: [table],
    "a dictionary": lambda table: {0: table},
    "the parameter": lambda table: (table.weight,),
    "a closure": lambda table: lambda: table.weight,
    "a partial": lambda table: functools.partial(getattr, table, "weight"),
}


@pytest.mark.parametrize("how", HOLDS)
def test_a_tied_weight_that_is_read_by_reference_stays_one(how: str) -> None:
    table = nn.Embedding(8, 4)
    tied = HeadByReference(table, HOLDS[how])
    function = lambda s, t: s.head(functional.rms_norm(s.emb(t), (4,)) * s.g)  # noqa: E731
    findings = proved(Graph(function, emb=table, g=nn.Parameter(torch.ones(4)), head=tied), TOKENS)
    assert (findings.groups, findings.spaces) == ((), ())


def test_a_tied_weight_that_a_head_reads_itself_can_be_untied() -> None:
    table, head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
    head.weight = table.weight
    function = lambda s, t: s.head(functional.rms_norm(s.emb(t), (4,)) * s.g)  # noqa: E731
    findings = proved(Graph(function, emb=table, g=nn.Parameter(torch.ones(4)), head=head), TOKENS)
    assert groups(findings) == ["g -> head"]
    assert [space.kind for space in findings.spaces] == ["R1"]


class Flagged(nn.Module):
    """Takes a word and a flag, and has a list of which one place is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = lin(), lin()
        self.list = nn.ModuleList([None, lin()])  # type: ignore[list-item]  # which torch allows

    def forward(self, x: Tensor, mode: str = "relu", causal: bool = True) -> Tensor:
        return self.list[1](self.down(getattr(torch, mode)(self.up(x)))).tanh()


def test_inputs_that_are_no_tensors_and_empty_places_in_lists() -> None:
    inputs = {"x": X.float(), "mode": "relu", "causal": False}
    source = ModelSource("flagged", factory=lambda: (Flagged(), inputs))
    config = certify(analyze(source), source)
    assert [group.name for group in config.smoothing.groups] == ["up -> down", "down -> list.1"]


@pytest.mark.parametrize("gain", [True, False])
def test_a_weight_that_writes_what_it_reads_holds_no_gain(gain: bool) -> None:
    """With ``R``: ``(R W)^T (R x) = W^T x``, but a gain between the two would be folded into what is written too."""

    def function(s: Graph, t: Tensor) -> Tensor:
        x = s.emb(t)
        y = functional.rms_norm(x, (4,), s.g if gain else None)
        return s.head(functional.rms_norm(x + s.w(functional.linear(y, s.w.weight.mT).tanh()), (4,)))

    model = Graph(function, emb=nn.Embedding(8, 4), w=lin(6, 4), g=nn.Parameter(torch.rand(4) + 0.5), head=lin())
    findings = proved(model, TOKENS)
    assert [space.kind for space in findings.spaces] == ([] if gain else ["R1"])
    refusals = {b.reason for b in findings.blocked if b.what == "rotation"}
    assert ("g cannot be folded into w.weight, used elsewhere too" in refusals) == gain


HEADS = {
    "joined": lambda s, y: s.o(y.transpose(1, 2).flatten(-2)),
    "bent": lambda s, y: s.o(functional.pad(y.tanh().sum(1), (0, 4))),
}


@pytest.mark.parametrize("from_left", [False, True])
@pytest.mark.parametrize("end", HEADS)
def test_heads_that_matrices_of_their_own_read_are_not_mixed(end: str, from_left: bool) -> None:
    def function(s: Graph, x: Tensor) -> Tensor:
        if from_left:
            y = (s.v.mT @ (s.w @ x[:, None].mT)).mT
        else:
            y = torch.einsum("bhtd,hdc->bhtc", torch.einsum("btc,hdc->bhtd", x, s.w), s.v)
        made: Tensor = HEADS[end](s, y)
        return made

    v, w = (nn.Parameter(torch.randn(2, 3, 4) / 2) for _ in range(2))
    findings = proved(Graph(function, w=w, v=v, o=lin(8, 4)), X)
    assert (findings.spaces[0].blocks, findings.spaces[0].size) == (2, 3)


@pytest.mark.parametrize("bent", [True, False])
def test_columns_that_are_read_in_parts_are_not_mixed(bent: bool) -> None:
    def function(s: Graph, x: Tensor) -> Tensor:
        h = s.a(x)
        part = functional.linear(h[..., :3], s.o.weight[:, :3])
        return s.p((part.tanh() if bent else part) + functional.linear(h[..., 3:], s.o.weight[:, 3:]))

    findings = proved(Graph(function, a=lin(4, 6), o=lin(6, 4, bias=False), p=lin()), X)
    assert (findings.spaces[0].blocks, findings.spaces[0].size) == (2, 3)


READERS = {
    "a linear": lambda s, y: functional.linear(y, s.w),
    "two dimensions": lambda s, y: torch.einsum("bthd,ohd->bto", y.unflatten(-1, (2, 3)), s.w.unflatten(-1, (2, 3))),
}


def rolled(by: int, turned: bool, reader: str) -> Graph:
    """Channels rolled, then read as channels of other tokens: those at an even place are one coordinate, and the odd
    ones. Of which two a token is made hangs on ``by``.
    """

    def function(s: Graph, tokens: Tensor) -> Tensor:
        y = s.emb(tokens).roll(-by, -1)
        read: Tensor = READERS[reader](s, y.mT.reshape(y.shape) if turned else y)
        return read

    return Graph(function, emb=nn.Embedding(5, 6), w=nn.Parameter(torch.randn(3, 6)))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("by", "turned", "size", "channels"),
    [(0, False, 6, 6), (1, False, 6, 6), (0, True, 2, 2), (2, True, 2, 2), (1, True, None, 2), (3, True, None, 2)],
)
def test_each_token_pairs_the_copies_of_channels_as_the_table_does(
    by: int, turned: bool, size: int | None, channels: int, reader: str
) -> None:
    """Of tokens that hold (1, 2), (3, 4), (5, 0), the largest labels alone are the table's pair (4, 5)."""
    findings = proved(rolled(by, turned, reader), TOKENS)
    assert [space.size for space in findings.spaces] == ([] if size is None else [size])
    assert [group.channels for group in findings.groups] == [channels]
    refused = {blocked.reason for blocked in findings.blocked if blocked.path == "emb" and blocked.what == "rotation"}
    assert refused == ({"channels of different vectors are read together"} if size is None else set())


def test_a_layout_of_three_tokens_is_not_claimed() -> None:
    for turned in (True, False):
        source = ModelSource("rolled", factory=lambda turned=turned: (rolled(2, turned, "a linear"), (TOKENS,)))
        config = analyze(source).config
        assert (len(config.smoothing.groups), len(config.rotation.spaces)) == ((0, 0) if turned else (1, 1))
