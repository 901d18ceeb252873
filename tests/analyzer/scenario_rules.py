"""Blocks around single rules: gains, convolutions, weights on the left, chosen rows, state that is written."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from scenarios import HEADS, INNER, WIDTH, Attention, Block, Claimed, Model, Scenario, at_lengths, tokens_of
from torch import Tensor, nn


def _gain(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(*shape) + 0.5)


class LayerScale(Block):
    """``x + g * down(...)``; ``again``: what else the gain does."""

    again: Callable[[Any, Tensor], Tensor] = staticmethod(lambda block, x: x)

    def make(self, bias: bool) -> None:
        super().make(bias)
        self.gain = _gain(WIDTH)

    def forward(self, x: Tensor, start: Any = 0) -> Tensor:
        return self.again(self, x) + self.gain * self.down(self.inner(self.norm(x), start)[1])


class HeadGain(Attention):
    """A gain for each head, or for each channel of a head, on its values."""

    normed = False

    def make(self, bias: bool) -> None:
        super().make(bias)
        self.gain = _gain(WIDTH // HEADS if self.normed else HEADS)

    def mid(self, h: Tensor, start: Any) -> Tensor:
        heads = h.unflatten(-1, (HEADS, -1))
        made = F.rms_norm(heads, (WIDTH // HEADS,), self.gain) if self.normed else heads * self.gain[:, None]
        return made.flatten(-2)


class Convolved(Block):
    """A convolution over the tokens between the products; ``mixing``: of all channels together."""

    mixing = False

    def make(self, bias: bool) -> None:
        super().make(bias)
        self.conv = nn.Conv1d(INNER, INNER, 3, padding=2, groups=1 if self.mixing else INNER, bias=bias)

    def mid(self, h: Tensor, start: Any) -> Tensor:
        return self.conv(h.transpose(1, 2))[..., : h.shape[1]].transpose(1, 2).relu()


class FromTheLeft(Block):
    """A weight on the left of what it is multiplied with."""

    def make(self, bias: bool) -> None:
        super().make(bias)
        self.mixer = nn.Parameter(torch.randn(INNER, INNER))

    def mid(self, h: Tensor, start: Any) -> Tensor:
        turned = h.relu().transpose(1, 2)
        return torch.bmm(self.mixer.expand(len(h), -1, -1), turned).transpose(1, 2)


class ChosenRows(Block):
    """Only the tokens that a gate chooses; ``by_result``: it looks at what is scaled."""

    by_result = False

    def make(self, bias: bool) -> None:
        super().make(bias)
        self.chooser = nn.Linear(WIDTH, 1)

    def inner(self, n: Tensor, start: Any) -> tuple[Tensor, Tensor]:
        if self.by_result:
            h = self.up(n)
            mask = (h[..., 1:] > h[..., :-1]).sum(-1) % 2 == 1  # so that few scales choose the same rows
            rows = h[mask].relu()
        else:
            mask = self.chooser(n)[..., 0] > 0
            h = self.up(n[mask])
            rows = h.relu()
        out = torch.zeros(*n.shape[:2], INNER, dtype=n.dtype, device=n.device)
        out[mask] = rows
        return h, out


class Overwritten(Block):
    """Keeps what it saw last in a buffer, in whose place it writes; ``bent``: another thing than it goes on with."""

    bent = False

    def make(self, bias: bool) -> None:
        super().make(bias)
        self.register_buffer("seen", torch.zeros(1, INNER), persistent=False)

    def mid(self, h: Tensor, start: Any) -> Tensor:
        last = h[:1, -1]
        self.seen = self.seen.to(h.dtype)
        self.seen.copy_(last.tanh() if self.bent else last)
        return h.relu() + self.seen.relu()


@dataclass(frozen=True, slots=True)
class Kind:
    """``pairs``: source and target of the groups that hold, or of those that do not (``trap``).

    ``residual``: whether the residual stream is rotated by any Q; None where nothing is said of it.
    """

    kind: type[nn.Module]
    pairs: tuple[tuple[str, str], ...]
    trap: bool = False
    residual: bool | None = True
    writer: str = "down"


def _of(kind: type[nn.Module], **held: Any) -> type[nn.Module]:
    return type(f"{kind.__name__}Of", (kind,), held)


OWN = (("up.weight", "down.weight"),)
KINDS: dict[str, Kind] = {
    "layer scale": Kind(LayerScale, OWN),
    "layer scale on the stream too": Kind(
        _of(LayerScale, again=staticmethod(lambda b, x: b.gain * x)), OWN, residual=False
    ),
    "layer scale as a sum": Kind(
        _of(LayerScale, again=staticmethod(lambda b, x: x + 0.1 * b.gain)), OWN, residual=None
    ),
    "gains of heads": Kind(HeadGain, (("v.weight", "o.weight"),), writer="o"),
    "normed heads": Kind(_of(HeadGain, normed=True), (("v.weight", "o.weight"),), trap=True, writer="o"),
    "depthwise convolution": Kind(Convolved, (("up.weight", "conv.weight"), ("conv.weight", "down.weight"))),
    "mixing convolution": Kind(_of(Convolved, mixing=True), OWN, trap=True),
    "weight on the left": Kind(FromTheLeft, (("up.weight", "mixer"), ("mixer", "down.weight"))),
    "rows chosen by a gate": Kind(ChosenRows, OWN),
    "rows chosen by what is scaled": Kind(_of(ChosenRows, by_result=True), OWN, trap=True),
    "state that is overwritten": Kind(Overwritten, OWN),
    "state that is bent": Kind(_of(Overwritten, bent=True), OWN, trap=True),
}


def rules(seed: int) -> Scenario:
    """Two or three blocks, each around one rule, some of which no scale passes."""
    rng = random.Random(seed)
    norm, bias, length = rng.choice(("rms", "rms", "layer")), rng.random() < 0.5, rng.randint(3, 6)
    drawn = [rng.choice(list(KINDS)) for _ in range(rng.randint(2, 3))]
    kinds = [KINDS[name] for name in drawn]
    plants: list[Claimed] = []
    traps: list[Claimed] = []
    for i, kind in enumerate(kinds):
        for source, target in kind.pairs:
            group = Claimed("group", (f"layers.{i}.{source}",), (f"layers.{i}.{target}",))
            (traps if kind.trap else plants).append(group)
    stream = Claimed("space", ("table.weight", *(f"layers.{i}.{k.writer}.weight" for i, k in enumerate(kinds))))
    said = {kind.residual for kind in kinds}
    if said == {True}:
        plants.append(stream)
    elif False in said:
        traps.append(stream)

    def make() -> nn.Module:
        return Model([kind.kind(i, norm, bias) for i, kind in enumerate(kinds)])  # type: ignore[call-arg]  # a block's

    inputs = (tokens_of(seed, 2, length),)
    words = tuple(f"{i}: {name}" for i, name in enumerate(drawn))
    return Scenario("rules", seed, words, make, inputs, at_lengths(seed, (1, 2, 9, 40)), tuple(plants), tuple(traps))
