"""Products with parameters of any number of axes: stacks of experts, heads, coefficients of streams."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import proved
from readable import space_lines
from small_graphs import Graph, lin, par, rms
from torch import Tensor, nn
from torch.nn import functional

from autoquant.analyzer.findings import Findings
from autoquant.analyzer.rules.contractions import pattern_along_rows

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOKENS = torch.tensor([[3, 1, 4], [1, 5, 2]])


def groups(findings: Findings) -> list[str]:
    return [group.name for group in findings.groups]


def spaces(findings: Findings) -> list[str]:
    return [space.kind for space in findings.spaces if space.kind == "R1"]


def stream(inner: Callable[[Graph, Tensor], Tensor], **parts: nn.Module | nn.Parameter) -> Graph:
    def function(s: Graph, tokens: Tensor) -> Tensor:
        x = s.emb(tokens)
        return s.head(rms(s, x + inner(s, rms(s, x, s.g))))

    return Graph(function, emb=nn.Embedding(8, 4), head=lin(), g=nn.Parameter(torch.rand(4) + 0.5), **parts)


def two(first: str, second: str) -> Callable[[Graph, Tensor], Tensor]:
    return lambda s, x: torch.einsum(second, functional.relu(torch.einsum(first, x, s.w)), s.v)


@pytest.mark.parametrize(
    ("first", "second", "w", "v", "channels"),
    [
        ("btc,cd->btd", "btd,dc->btc", (4, 6), (6, 4), 6),
        ("btc,hdc->bhtd", "bhtd,hdc->btc", (3, 2, 4), (3, 2, 4), 6),
        ("btc,edc->btde", "btde,edc->btc", (3, 2, 4), (3, 2, 4), 6),
        ("btc,ecd->ebtd", "ebtd,edc->btc", (3, 4, 2), (3, 2, 4), 6),
    ],
)
def test_stacks_read_and_write_the_stream(
    first: str, second: str, w: tuple[int, ...], v: tuple[int, ...], channels: int
) -> None:
    findings = proved(stream(two(first, second), w=par(*w), v=par(*v)), TOKENS)
    assert groups(findings) == ["g -> w", "w -> v"]
    assert {g.name: g.channels for g in findings.groups}["w -> v"] == channels
    assert spaces(findings) == ["R1"]


@pytest.mark.parametrize(
    ("second", "found"), [("bhtd,hdc->btc", ["g -> w", "w -> v"]), ("bhtd,hdc->bthc", ["g -> w", "w -> v"])]
)
def test_what_becomes_of_the_heads_is_the_reader_s(second: str, found: list[str]) -> None:
    """Added up, or apart and then added: the matrices of a stack write one stream all the same."""
    inner = two("btc,hdc->bhtd", second)
    model = stream(
        lambda s, x: inner(s, x) if second.endswith("btc") else inner(s, x).sum(2), w=par(3, 2, 4), v=par(3, 2, 4)
    )
    findings = proved(model, TOKENS)
    assert groups(findings) == found
    assert spaces(findings) == ["R1"]


def test_heads_that_are_laid_side_by_side_are_rotated_apart() -> None:
    """Half of a head beside half of another: their rows read different vectors and cannot be mixed."""
    inner = two("btc,hdc->bhtd", "bhtd,hdc->bthc")
    findings = proved(stream(lambda s, x: inner(s, x).flatten(2)[..., 2:6], w=par(3, 2, 4), v=par(3, 2, 4)), TOKENS)
    assert groups(findings)[-1] == "w -> v"
    assert [(space.size, space.blocks) for space in findings.spaces if space.kind == "R1"] == [(2, 2)]


@pytest.mark.parametrize(
    "read",
    [
        lambda x, w: torch.einsum("btc,chd->bthd", x, w).flatten(2),
        lambda x, w: torch.tensordot(x, w, dims=1).flatten(2),
        lambda x, w: x @ w.flatten(1),
        lambda x, w: torch.einsum("btc,chd->hbtd", x, w).movedim(0, 2).flatten(2),
    ],
)
def test_a_weight_is_read_along_the_first_of_three_dimensions(read: Callable[[Tensor, Tensor], Tensor]) -> None:
    """What it writes lies along the other two, of which a slot could say one: the stream passes, and no more."""
    findings = proved(stream(lambda s, x: s.o(read(x, s.w)), w=par(4, 3, 2), o=lin(6, 4)), TOKENS)
    assert [(g.name, g.enable, g.targets[0].dim, g.targets[0].stack) for g in findings.groups] == [
        ("g -> w", False, 0, None)
    ]
    assert [list(space_lines(space))[1:] for space in findings.spaces if space.kind == "R1"] == [
        ["    emb.weight.1", "    o.weight.0", "    o.bias.0", " -> rms(g) w.0", " -> head.weight.1 +bias"]
    ]
    assert "w" not in {linear.weight for linear in findings.linears}


def test_a_weight_writes_along_the_first_of_three_dimensions() -> None:
    def inner(s: Graph, x: Tensor) -> Tensor:
        return torch.einsum("bthd,chd->btc", s.i(x).unflatten(-1, (3, 2)), s.w)

    findings = proved(stream(inner, w=par(4, 3, 2), i=lin(4, 6)), TOKENS)
    assert groups(findings) == ["g -> i"]
    assert [w.path for space in findings.spaces for w in space.writers if space.kind == "R1"] == ["emb.weight", "w"]
    assert "what is read of w lies along several of its dimensions" not in {b.reason for b in findings.blocked}


@pytest.mark.parametrize("other", ["hdc", "cdh"])
def test_a_weight_of_three_dimensions_that_is_read_in_two_ways_gives_nothing(other: str) -> None:
    """As a matrix for each head as well, or along two of its dimensions for each of the third."""

    def inner(s: Graph, x: Tensor) -> Tensor:
        heads = torch.einsum("btc,chd->bthd", x, s.w).relu()
        term = {"hdc": "bthd,chd->btc", "cdh": "bthd,chd->bthc"}[other]
        made = torch.einsum(term, heads, s.w)
        return made if other == "hdc" else made.sum(2)

    findings = proved(stream(inner, w=par(4, 3, 2)), TOKENS)
    assert spaces(findings) == []


def test_a_stack_whose_matrices_lie_side_by_side_reads_and_writes() -> None:
    def inner(s: Graph, x: Tensor) -> Tensor:
        return functional.linear(x, s.w.flatten(0, 1)).relu() @ s.v.flatten(0, 1)

    findings = proved(stream(inner, w=par(3, 2, 4), v=par(3, 2, 4)), TOKENS)
    assert {group.name: group.channels for group in findings.groups} == {"g -> w": 4, "w -> v": 6}
    assert spaces(findings) == ["R1"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda x, w: torch.tensordot(x, w, dims=([2], [1])), lambda x, w: torch.tensordot(w, x, dims=([1], [2]))),
        (torch.inner, lambda x, w: torch.inner(w, x)),
    ],
)
def test_tensordot_and_inner_are_products(
    first: Callable[[Tensor, Tensor], Tensor], second: Callable[[Tensor, Tensor], Tensor]
) -> None:
    def inner(s: Graph, x: Tensor) -> Tensor:
        return second(first(x, s.w).relu(), s.v).movedim(0, 2)

    findings = proved(stream(inner, w=par(6, 4), v=par(4, 6)), TOKENS)
    assert groups(findings) == ["g -> w", "w -> v"]
    assert spaces(findings) == ["R1"]


def chosen(flip: bool = False, other: bool = False, summed: bool = False) -> Callable[[Graph, Tensor], Tensor]:
    def inner(s: Graph, x: Tensor) -> Tensor:
        weight, index = s.r(x).softmax(-1).topk(2, -1)
        h = functional.relu(torch.einsum("btedc,btc->bted", s.w[index], x))
        h = h.flip(2) if flip else h
        h = h + h.sum(2, keepdim=True) if summed else h
        again = (index + 1) % 5 if other else index
        return torch.einsum("btecd,bted,bte->btc", s.v[again], h, weight)

    return inner


@pytest.mark.parametrize(
    ("how", "channels"), [({}, 30), ({"flip": True}, 6), ({"other": True}, 6), ({"summed": True}, 6)]
)
def test_experts_that_are_gathered_have_scales_of_their_own_unless_they_meet(
    how: dict[str, bool], channels: int
) -> None:
    model = stream(chosen(**how), r=lin(4, 5), w=par(5, 6, 4), v=par(5, 4, 6))
    findings = proved(model, TOKENS)
    assert groups(findings) == ["g -> r, w", "w -> v"]
    assert findings.groups[1].channels == channels
    assert spaces(findings) == ["R1"]


def test_coefficients_of_streams_leave_their_channels_alone() -> None:
    def inner(s: Graph, x: Tensor) -> Tensor:
        streams = torch.einsum("btnc,nm->btmc", torch.stack([x, s.a(x)], 2), s.mix)
        return torch.einsum("btmc,m->btc", streams, s.out) * s.scalars[1]

    model = stream(inner, a=lin(), mix=par(2, 2), out=par(2), scalars=par(3))
    assert spaces(proved(model, TOKENS)) == []  # the gain is applied to one stream and not folded into a reader
    model = Graph(
        lambda s, i: s.head(
            rms(s, torch.einsum("btnc,n->btc", torch.stack([s.emb(i), s.a(rms(s, s.emb(i)))], 2), s.mix))
        ),
        emb=nn.Embedding(8, 4),
        a=lin(),
        head=lin(),
        mix=par(2),
    )
    assert spaces(proved(model, TOKENS)) == ["R1"]


def test_coefficients_per_channel_end_a_space() -> None:
    model = Graph(
        lambda s, i: s.head(
            rms(s, torch.einsum("btnc,nc->btc", torch.stack([s.emb(i), s.a(rms(s, s.emb(i)))], 2), s.mix))
        ),
        emb=nn.Embedding(8, 4),
        a=lin(),
        head=lin(),
        mix=par(2, 4),
    )
    assert spaces(proved(model, TOKENS)) == []


@pytest.mark.parametrize(("number", "found"), [(lambda s: s.n[1], ["R1"]), (lambda s: s.n, [])])
def test_one_number_of_a_parameter_is_no_gain(number: Callable[[Graph], Tensor], found: list[str]) -> None:
    model = Graph(
        lambda s, i: s.head(rms(s, s.emb(i) * number(s) + s.a(rms(s, s.emb(i))))),
        emb=nn.Embedding(8, 4),
        a=lin(),
        head=lin(),
        n=par(4),
    )
    assert spaces(proved(model, TOKENS)) == found


@pytest.mark.parametrize(("dim", "found"), [(1, ["R1"]), (2, [])])
def test_running_sums_over_tokens_pass_vectors(dim: int, found: list[str]) -> None:
    assert spaces(proved(stream(lambda s, x: s.a(x).cumsum(dim), a=lin()), TOKENS)) == found


@pytest.mark.parametrize(
    ("mix", "found"),
    [
        (lambda x: torch.fft.fft(x, dim=1).real, ["R1"]),
        (lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1), n=3, dim=1), ["R1"]),
        (lambda x: torch.fft.fft(x, dim=1).abs(), []),  # of each channel by itself
        (lambda x: torch.fft.fft(x, dim=-1).real, []),
    ],
)
def test_frequencies_over_tokens_pass_vectors(mix: Callable[[Tensor], Tensor], found: list[str]) -> None:
    assert spaces(proved(stream(lambda s, x: mix(s.a(x)), a=lin()), TOKENS)) == found


def test_queries_meet_keys_in_an_einsum() -> None:
    def inner(s: Graph, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(2, 3, 2, 2) for f in (s.q, s.k, s.v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return s.o(torch.einsum("bhqk,bkhd->bqhd", scores, v).flatten(2))

    findings = proved(stream(inner, q=lin(), k=lin(), v=lin(), o=lin()), TOKENS)
    assert groups(findings) == ["g -> q, k, v", "q -> k", "v -> o"]
    assert [space.kind for space in findings.spaces] == ["R1", "R2"]


def test_an_outer_product_of_two_scaled_tensors_keeps_the_scale_of_one() -> None:
    model = Graph(
        lambda s, x: s.c(torch.einsum("btd,bte->btde", s.a(x), s.b(x)).flatten(2)), a=lin(), b=lin(), c=lin(16)
    )
    assert groups(proved(model, X)) == ["b -> c"]


def test_neighbours_in_time_are_read_together() -> None:
    """Their channels lie side by side."""

    def function(s: Graph, tokens: Tensor) -> Tensor:
        x = s.emb(tokens)
        return s.head(torch.cat([x, functional.pad(x, (0, 0, 1, 0))[:, :-1]], -1))

    assert spaces(proved(Graph(function, emb=nn.Embedding(8, 4), head=lin(8)), TOKENS)) == ["R1"]


def test_a_pattern_of_vectors_is_that_of_every_row() -> None:
    rows = torch.tensor([[1, 1, 2, 2], [5, 5, 7, 7], [9, 9, 9, 0]])
    real = torch.tensor([[True] * 4, [True] * 4, [True, True, False, False]])
    found = pattern_along_rows(rows, real)
    assert found is not None
    assert found.tolist() == [0, 0, 2, 2]
    assert pattern_along_rows(rows, torch.ones_like(real)) is None
    assert pattern_along_rows(torch.tensor([[1, 1, 2, 2], [1, 2, 2, 1]]), torch.ones(2, 4, dtype=torch.bool)) is None


def test_experts_that_are_added_with_coefficients_of_their_own_have_one_scale() -> None:
    """The first product has a scale per expert; what is summed over experts may not keep it."""

    def inner(s: Graph, x: Tensor) -> Tensor:
        index = s.r(x).topk(2, -1)[1]
        h = torch.einsum("btedc,btc->bted", s.w[index], x)
        return s.v(functional.relu(torch.einsum("bted,btek->btkd", h, s.each[index])).flatten(2))

    findings = proved(stream(inner, r=lin(4, 5), w=par(5, 6, 4), each=par(5, 1), v=lin(6, 4)), TOKENS)
    assert [(g.name, g.channels) for g in findings.groups][1:] == [("w -> v", 6)]


def test_a_stack_of_weights_multiplies_from_the_left() -> None:
    def inner(s: Graph, x: Tensor) -> Tensor:
        hidden = (s.w @ x.mT.unsqueeze(1)).relu()  # [2, 3, 2, t]
        made: Tensor = (s.v @ hidden).mT.sum(1)
        return made

    findings = proved(stream(inner, w=par(3, 2, 4), v=par(3, 4, 2)), TOKENS)
    assert {group.name: group.channels for group in findings.groups} == {"g -> w": 4, "w -> v": 6}
    assert spaces(findings) == ["R1"]


@pytest.mark.parametrize("same", [True, False])
def test_experts_that_the_tokens_choose_multiply_from_the_left(same: bool) -> None:
    def inner(s: Graph, x: Tensor, tokens: Tensor) -> Tensor:
        chosen = tokens.flatten() % 3
        hidden = torch.bmm(s.w[chosen], x.flatten(0, 1).unsqueeze(-1)).relu()
        other = chosen if same else (chosen + 1) % 3
        made: Tensor = torch.bmm(s.v[other], hidden).squeeze(-1).unflatten(0, tokens.shape)
        return made

    def function(s: Graph, tokens: Tensor) -> Tensor:
        x = s.emb(tokens)
        return s.head(rms(s, x + inner(s, rms(s, x, s.g), tokens)))

    model = Graph(
        function,
        emb=nn.Embedding(8, 4),
        head=lin(),
        g=nn.Parameter(torch.rand(4) + 0.5),
        w=par(3, 2, 4),
        v=par(3, 4, 2),
    )
    findings = proved(model, TOKENS)
    assert groups(findings) == ["g -> w", "w -> v"]
    assert spaces(findings) == ["R1"]


def test_rows_of_one_weight_read_and_others_of_it_write() -> None:
    """DeepSeek's absorbed attention: the rows of a weight that meet queries, and below them those that write values."""

    def function(s: Graph, x: Tensor) -> Tensor:
        return s.down(functional.relu(s.up(x) @ s.w[:4]) @ s.w[4:].mT)

    found = proved(Graph(function, up=lin(), w=par(8, 6), down=lin()), X)
    assert [line for space in found.spaces for line in space_lines(space)] == [
        "other 1 x 4",
        "    up.weight.0",
        "    up.bias.0",
        " -> w.0[0..3]",
        "other 1 x 4",
        "    w.0[4..7]",
        " -> down.weight.1 +bias",
    ]


def test_a_linear_over_tokens_is_named_as_what_ends_the_stream() -> None:
    """MLP-Mixer: it reads the same channel of all tokens, and not the gains of the norm before it."""

    def inner(s: Graph, x: Tensor) -> Tensor:
        made: Tensor = s.back(functional.gelu(s.over(x.mT))).mT
        return made

    findings = proved(stream(inner, over=lin(3, 5), back=lin(5, 3)), TOKENS)
    assert spaces(findings) == []
    assert [entry.reason for entry in findings.blocked if entry.path == "emb"] == [
        "its tokens are read together, each channel by itself"
    ]
