"""Depthwise convolutions take the scale of what they read and of what they make, apart from each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import proved
from small_graphs import Graph, lin, par
from torch import Tensor, nn
from torch.nn import functional

from autoquant.analyzer.findings import Findings

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def convolved(act: Callable[[Tensor], Tensor], each: int) -> Graph:
    """Two channels, of which a convolution makes ``each``."""

    def function(s: Graph, x: Tensor) -> Tensor:
        made = s.cv(functional.pad(s.a(x).transpose(1, 2), (2, 0)))
        return s.b(act(made).transpose(1, 2))

    return Graph(function, a=lin(4, 2), b=lin(2 * each, 4), cv=nn.Conv1d(2, 2 * each, 3, groups=2))


def groups(act: Callable[[Tensor], Tensor], each: int) -> list[tuple[str, int]]:
    return [(group.name, group.channels) for group in proved(convolved(act, each), X).groups]


@pytest.mark.parametrize("each", [1, 2, 3])
def test_both_scales_pass(each: int) -> None:
    assert groups(lambda made: made, each) == [("a -> cv", 2), ("cv -> b", 2 * each)]


def test_behind_the_convolution_the_scale_may_end() -> None:
    assert groups(functional.silu, 2) == [("a -> cv", 2)]


def test_positions_of_a_multiplier_carry_one_channel() -> None:
    (group,) = proved(convolved(functional.silu, 2), X).groups
    (target,) = group.targets
    assert target.index is not None
    (index,) = target.index
    assert (index.shape, index.stride, index.channel_stride) == ((2, 2), (2, 1), (1, 0))


def test_what_is_added_to_what_it_makes_leaves_the_convolution_alone() -> None:
    def function(s: Graph, x: Tensor) -> Tensor:
        a = s.a(x).transpose(1, 2)
        return s.b((a + s.cv(functional.pad(a, (2, 0)))).transpose(1, 2))

    found = proved(Graph(function, a=lin(), b=lin(), cv=nn.Conv1d(4, 4, 3, groups=4, bias=False)), X).groups
    assert [group.name for group in found] == ["a -> b"]
    assert [slot.path for slot in found[0].sources] == ["a.weight", "a.bias"]


def test_of_two_channels_that_are_swapped_behind_it_neither_is_left() -> None:
    """The channel that is added carries the scale of its neighbour, which the weight would take twice."""

    def function(s: Graph, x: Tensor) -> Tensor:
        a = s.a(x).transpose(1, 2)
        return s.b((a.flip(1) + s.cv(functional.pad(a, (2, 0)))).transpose(1, 2))

    found = proved(Graph(function, a=lin(), b=lin(), cv=nn.Conv1d(4, 4, 3, groups=4, bias=False)), X).groups
    assert all(slot.path != "cv.weight" for group in found for slot in (*group.sources, *group.targets))


# --- rotations ---

TOKENS = torch.tensor([[3, 1, 4], [1, 5, 2]])


def causal(s: Graph, x: Tensor) -> Tensor:
    """Over two tokens and the one before them, and back."""
    made = s.cv(functional.pad(x.transpose(1, 2), (2, 0)))
    return s.back(functional.relu(made)).transpose(1, 2)


def stream(branch: Callable[[Graph, Tensor], Tensor], **parts: nn.Module | nn.Parameter) -> Graph:
    """A residual stream, to which a branch adds behind a norm."""

    def function(s: Graph, tokens: Tensor) -> Tensor:
        x = s.emb(tokens)
        return s.head(functional.rms_norm(x + branch(s, s.n(x)), (4,)))

    made = {"n": nn.RMSNorm(4), "cv": nn.Conv1d(4, 6, 3), "back": nn.Conv1d(6, 4, 1), **parts}
    return Graph(function, emb=nn.Embedding(8, 4), head=lin(), a=lin(), **made)


def spaces(findings: Findings) -> list[tuple[str, list[str], list[tuple[str | None, list[str]]]]]:
    """Kind, writers, and readers with the norm before them."""
    return [
        (
            space.kind,
            [f"{writer.path}.{writer.dim}" for writer in space.writers],
            [(read.norm and read.norm.weight, [f"{r.path}.{r.dim}" for r in read.readers]) for read in space.reads],
        )
        for space in findings.spaces
    ]


READ = [("n.weight", ["cv.weight.1"]), (None, ["head.weight.1"])]


def test_a_dense_convolution_reads_and_writes_a_stream() -> None:
    found = spaces(proved(stream(causal), TOKENS))
    assert found == [("R1", ["emb.weight.1", "back.weight.0", "back.bias.0"], READ)]


def test_a_gain_behind_a_convolution_is_folded_into_it() -> None:
    def scaled(s: Graph, x: Tensor) -> Tensor:
        made = s.cv(functional.pad(x.mT, (2, 2)))[..., :-2]  # what is cut off is seen nowhere
        return s.g * s.back(functional.relu(made)).mT

    (space,) = spaces(proved(stream(scaled, g=par(4)), TOKENS))
    assert space == ("R1", ["emb.weight.1"], [READ[0], ("g", ["back.weight.0", "back.bias.0"]), READ[1]])


def test_pixels_behind_pixels() -> None:
    """Two dimensions of places: what one convolution writes, another one reads."""
    model = Graph(
        lambda s, x: s.c(functional.relu(s.b(s.a(x)))),
        a=nn.Conv2d(3, 4, 2, stride=2),
        b=nn.Conv2d(4, 4, 3, padding=1, bias=False),
        c=nn.Conv2d(4, 2, 1),
    )
    found = spaces(proved(model, torch.randn(1, 3, 8, 8, dtype=torch.float64)))
    assert found == [("other", ["a.weight.0", "a.bias.0"], [(None, ["b.weight.1"])])]


def test_a_convolution_of_pixels_that_reads_a_stream_too_keeps_its_columns() -> None:
    """Rotated along them, it would see other pixels."""
    model = Graph(
        lambda s, x: s.c(functional.relu(s.b(s.a(x)) + s.b(x))),
        a=nn.Conv2d(3, 3, 1),
        b=nn.Conv2d(3, 4, 3, padding=1, bias=False),
        c=nn.Conv2d(4, 2, 1),
    )
    assert spaces(proved(model, torch.randn(1, 3, 8, 8, dtype=torch.float64))) == []


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (stream(causal, n=nn.LayerNorm(4)), "it is padded with 0, to which n.bias was not added"),
        (
            stream(lambda s, x: s.back(functional.relu(s.cv(x.mT))).mT, n=nn.LayerNorm(4), cv=nn.Conv1d(4, 6, 1)),
            "n.bias cannot be folded into a convolution",
        ),
        (
            stream(lambda s, x: s.cv(functional.pad(x.mT, (2, 0))).mT, cv=nn.Conv1d(4, 4, 3, groups=4)),
            "each channel is convolved by itself",
        ),
        (
            stream(lambda s, x: s.cv(functional.pad(x.mT, (2, 0))).mT, cv=nn.Conv1d(4, 4, 3, groups=2)),
            "its channels are convolved in groups",
        ),
    ],
)
def test_what_a_convolution_cannot_read(model: Graph, reason: str) -> None:
    findings = proved(model, TOKENS)
    assert spaces(findings) == []
    assert reason in [blocked.reason for blocked in findings.blocked if blocked.what == "rotation"]


GRID = torch.tensor([[3, 1, 4, 5]])


def merged(norm: Callable[[Graph, Tensor], Tensor], **window: object) -> Graph:
    """Patches of a grid of two by two, merged into one token: each channel, then its four places (Pixtral's merger)."""

    def function(s: Graph, tokens: Tensor) -> Tensor:
        x = s.emb(tokens)
        grid = norm(s, x + s.b(functional.relu(s.a(s.m(x)))))[0].view(2, 2, 4).permute(2, 0, 1)[None]
        return s.o(functional.unfold(grid, 2, **window).view(16, -1).t())  # type: ignore[arg-type]  # its options

    parts = {"m": nn.RMSNorm(4), "n": nn.RMSNorm(4), "l": nn.LayerNorm(4), "a": lin(), "b": lin(), "o": lin(16, 3)}
    return Graph(function, emb=nn.Embedding(8, 4), **parts)


def test_patches_that_are_merged_carry_the_scale_of_each_channel_for_all_their_places() -> None:
    findings = proved(merged(lambda s, x: s.n(x), stride=2), GRID)
    (group,) = (group for group in findings.groups if group.sources[0].path == "n.weight")
    (target,) = group.targets
    assert (group.channels, target.path, target.index is not None) == (4, "o.weight", True)
    (index,) = target.index or ()
    assert (index.shape, index.stride, index.channel_stride) == ((4, 4), (4, 1), (1, 0))
    reasons = [blocked.reason for blocked in findings.blocked if blocked.what == "rotation"]
    assert reasons == ["n.weight is used where the norm's weight is rearranged before it is read"]


def test_patches_that_are_merged_are_vectors_side_by_side() -> None:
    (space,) = spaces(proved(merged(lambda s, x: functional.rms_norm(x, (4,)), stride=2), GRID))
    assert space[0] == "R1"
    assert space[2] == [("m.weight", ["a.weight.1"]), (None, ["o.weight.1"])]


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (
            lambda s, x: functional.rms_norm(x, (4,)),
            "channels of different tokens are read together, and not the same ones for each token",
        ),
        (lambda s, x: s.l(x), "it is padded with 0, to which l.bias was not added"),
    ],
)
def test_windows_over_the_edge(norm: Callable[[Graph, Tensor], Tensor], reason: str) -> None:
    findings = proved(merged(norm, padding=1, dilation=(1, 2)), GRID)
    assert spaces(findings) == []
    assert reason in [blocked.reason for blocked in findings.blocked if blocked.what == "rotation"]


def test_zeros_are_padded_before_a_linear_too() -> None:
    """The gain is folded all the same; a bias would be added to the zeros."""

    def shifted(s: Graph, x: Tensor) -> Tensor:
        return functional.relu(s.a(functional.pad(x, (0, 0, 1, 0))))[:, :-1] @ torch.eye(4, dtype=x.dtype)

    plain = proved(stream(lambda s, x: s.b(shifted(s, x)), b=lin()), TOKENS)
    assert [norm for _, _, reads in spaces(plain) for norm, _ in reads] == ["n.weight", None]
    biased = proved(stream(lambda s, x: s.b(shifted(s, x)), b=lin(), n=nn.LayerNorm(4)), TOKENS)
    assert spaces(biased) == []
