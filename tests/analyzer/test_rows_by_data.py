"""Rows that the data choose, and as many as they say: expert loops, routed tokens, whole vectors moved about."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import proved
from small_graphs import Graph, lin, rms
from torch import Tensor, nn
from torch.nn import functional

from autoquant.analyzer.extents import sized
from autoquant.analyzer.findings import Findings

TOKENS = torch.tensor([[3, 1, 4], [1, 5, 2]])
Inner = Callable[[Graph, Tensor], Tensor]


def claims(inner: Inner, **parts: nn.Module | nn.Parameter) -> tuple[list[str], list[str]]:
    """Names of groups and kinds of spaces of a residual stream with a unit, all of them proved."""

    def function(s: Graph, tokens: Tensor) -> Tensor:
        x = s.emb(tokens)
        return s.head(rms(s, x + inner(s, rms(s, x, s.g))))

    gain = nn.Parameter(torch.rand(4) + 0.5)
    model = Graph(function, emb=nn.Embedding(8, 4), head=lin(), g=gain, up=lin(4, 6), down=lin(6, 4), **parts)
    findings: Findings = proved(model, TOKENS)
    return [group.name for group in findings.groups], [s.kind for s in findings.spaces if s.kind == "R1"]


def unit(s: Graph, y: Tensor) -> Tensor:
    return s.down(functional.relu(s.up(y)))


def loop(write: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Inner:
    """Mixtral's old code: what each expert makes of its rows is written to them."""

    def inner(s: Graph, x: Tensor) -> Tensor:
        y = x.reshape(-1, 4)
        chosen = s.r(y).argmax(-1)
        rows = torch.where(chosen == 1)[0]
        return write(torch.zeros_like(y), rows, unit(s, y[rows])).view_as(x)

    return inner


def put(out: Tensor, rows: Tensor, made: Tensor) -> Tensor:
    out[rows] += made
    return out


@pytest.mark.parametrize(
    "write",
    [
        put,
        lambda out, rows, made: out.index_add(0, rows, made),
        lambda out, rows, made: torch.index_put(out, (rows,), made, accumulate=True),
        lambda out, rows, made: out.index_put((rows,), made),
    ],
)
def test_an_expert_takes_and_writes_the_rows_that_are_its_own(
    write: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    assert claims(loop(write), r=lin(4, 2)) == (["g -> r, up", "up -> down"], ["R1"])


def test_channels_that_are_added_to_others_are_rotated_with_none() -> None:
    turned = loop(lambda out, rows, made: out.index_add(0, rows, made + made[:, [1, 2, 3, 0]]))
    groups, spaces = claims(turned, r=lin(4, 2))
    assert groups == ["g -> r, up", "up -> down"]
    assert spaces == []


def test_channels_that_the_data_choose_take_no_scale() -> None:
    def inner(s: Graph, x: Tensor) -> Tensor:
        h = functional.relu(s.up(x)).reshape(-1, 6)
        return s.down(h[:, s.r(x).reshape(-1, 6).sum(0).argsort()]).view_as(x)

    groups, _ = claims(inner, r=lin(4, 6))
    assert groups[0] == "g -> up, r"
    assert not any(group.startswith("up") for group in groups[1:]) or groups[1:] == ["up -> down"]


@pytest.mark.parametrize(("dim", "found"), [(1, ["R1"]), (2, [])])
def test_routed_tokens_are_gathered_and_added_again(dim: int, found: list[str]) -> None:
    """Mixture of depths: one place for all channels; where each has its own, the vectors are not whole."""

    def inner(s: Graph, x: Tensor) -> Tensor:
        one = s.r(x).squeeze(-1).topk(2, 1)[1][..., None].expand(-1, -1, 4)
        place = one if dim == 1 else s.e(x).topk(2, 1)[1]
        return torch.zeros_like(x).scatter_add(1, place, unit(s, x.gather(1, place)))

    assert claims(inner, r=lin(4, 1), e=lin(4, 4))[1] == found


def runs(s: Graph, x: Tensor, dim: int = 0) -> Tensor:
    """Rows sorted by expert and split where the next one begins; each run has a matrix of its own."""
    y = x.reshape(-1, 4)
    gates, chosen = s.r(y).topk(1, 1)
    counts = torch.zeros(len(y), 2, dtype=torch.long).scatter(1, chosen, 1).sum(0).tolist()
    order = chosen.flatten().sort(0)[1]
    up = [functional.linear(part, s.ups[n]) for n, part in enumerate(y[order].split(counts, dim))]
    hidden = functional.relu(torch.cat(up))
    down = [functional.linear(part, s.downs[n]) for n, part in enumerate(hidden.split(counts, dim))]
    made = torch.cat(down) * gates.flatten()[order][:, None].sigmoid()
    return torch.zeros_like(y).index_add(0, order, made).view_as(x)


def test_runs_of_as_many_rows_as_the_data_say() -> None:
    stacks = {"ups": nn.Parameter(torch.randn(2, 6, 4)), "downs": nn.Parameter(torch.randn(2, 4, 6))}
    groups, spaces = claims(runs, r=lin(4, 2), **stacks)
    assert groups == ["g -> r, ups", "ups -> downs"]
    assert spaces == ["R1"]


def joined(after: Callable[[Tensor], Tensor]) -> Inner:
    """DeepSeek's loop: the runs of two experts joined, and each row put where its token was."""

    def inner(s: Graph, x: Tensor) -> Tensor:
        y = x.reshape(-1, 4)
        gates, chosen = s.r(y).topk(1, 1)
        order = chosen.flatten().argsort()
        sorted_rows, outputs, start = y[order], [], 0
        for n, count in enumerate(torch.bincount(chosen.flatten(), minlength=2).numpy()):
            if count == 0:
                continue
            hidden = functional.relu(functional.linear(sorted_rows[start : start + count], s.ups[n]))
            outputs.append(after(functional.linear(hidden, s.downs[n])))
            start = start + count
        made = torch.cat(outputs)
        placed = torch.empty_like(made)
        placed[order] = made
        return (placed * gates.sigmoid()).view_as(x)

    return inner


@pytest.mark.parametrize(
    ("after", "found"), [(Tensor.clone, ["R1"]), (lambda made: made + made.roll(1, -1), [])], ids=["whole", "mixed"]
)
def test_runs_that_are_joined_are_rotated_alike(after: Callable[[Tensor], Tensor], found: list[str]) -> None:
    stacks = {"ups": nn.Parameter(torch.randn(2, 6, 4)), "downs": nn.Parameter(torch.randn(2, 4, 6))}
    groups, spaces = claims(joined(after), r=lin(4, 2), **stacks)
    assert groups == ["g -> r, ups", "ups -> downs"]
    assert spaces == found


@pytest.mark.parametrize(("reduce", "found"), [("sum", ["R1"]), ("amax", [])])
def test_vectors_are_summed_into_rows_and_no_more(reduce: str, found: list[str]) -> None:
    def inner(s: Graph, x: Tensor) -> Tensor:
        y = x.reshape(-1, 4)
        rows = s.r(y).flatten().argsort()
        place = rows.view(-1, 1).repeat(1, 4)
        return torch.zeros_like(y).scatter_reduce(0, place, unit(s, y[rows]), reduce).view_as(x)

    assert claims(inner, r=lin(4, 1))[1] == found


def test_channels_of_which_the_data_say_how_many_are_taken() -> None:
    """All of them carry one scale; a rotation would mix those that are taken with others."""

    def inner(s: Graph, x: Tensor) -> Tensor:
        many = s.r(x)[0, 0].argmax().item()
        torch._check(many >= 0)
        torch._check(many < 4)
        return s.down(functional.pad(s.a(x)[..., :many].sum(-1, keepdim=True), (0, 5)))

    groups, spaces = claims(inner, r=lin(), a=lin())
    assert groups == ["g -> r, a", "a -> down"]
    assert spaces == ["R1"]


def test_positions_as_far_as_the_data_say_are_rotated_with_what_they_are_added_to() -> None:
    def inner(s: Graph, x: Tensor) -> Tensor:
        last = s.r(x).argmax().item()
        torch._check(last >= 0)
        torch._check(last < 8)
        table = s.p[:, : last + 1]
        return unit(s, x) + table.index_select(1, s.r(x)[0, :1, 0].long() * 0)

    _, spaces = claims(inner, r=lin(4, 1), p=nn.Parameter(torch.randn(1, 8, 4)))
    assert spaces == ["R1"]


def test_a_size_that_is_known_stays() -> None:
    known = torch.empty(2, 3, device="meta")
    assert sized(known, 5) is known
