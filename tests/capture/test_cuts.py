"""Tokens sorted by expert and cut where the next one begins: the counts that are read as numbers are the data's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autoquant.capture import occurring
from autoquant.capture.routes import Captured, capture, check_against_eager
from autoquant.errors import AutoQuantError

EXPERTS, TAKEN = 3, 2
Read = Callable[[Tensor], Any]


class Sorted(nn.Module):
    """Of each published way to write it: how ``counts`` are made of the choices, and read as numbers."""

    def __init__(self, counts: Read, read: Read) -> None:
        super().__init__()
        self.counts, self.read = counts, read
        self.router = nn.Linear(4, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(EXPERTS))


class Joined(Sorted):
    """DeepSeek-V2's and V3's: what the experts make is joined, and put where the tokens were."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(TAKEN, dim=-1, sorted=False)
        numbers = self.read(self.counts(chosen))
        order = chosen.view(-1).argsort()
        tokens = x[order // chosen.shape[1]]
        outputs, start = [], 0
        for expert, count in zip(self.experts, numbers, strict=True):
            end = start + count
            if count == 0:
                continue
            outputs.append(expert(tokens[start:end]))
            start = end
        joined = torch.cat(outputs, dim=0) if len(outputs) else tokens.new_empty(0)
        made = torch.empty_like(joined)
        made[order] = joined
        return made.view(*chosen.shape, -1).mul_(weights.unsqueeze(-1)).sum(1)


class Added(Sorted):
    """DeepSeekMoE's: by where the runs end, what the experts make is added to the tokens' rows."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(TAKEN, dim=-1)
        order = chosen.view(-1).argsort()
        ends = self.read(self.counts(chosen))
        rows, out = order // TAKEN, torch.zeros_like(x)
        for number, end in enumerate(ends):
            start = 0 if number == 0 else ends[number - 1]
            if start == end:
                continue
            places = rows[start:end]
            made = self.experts[number](x[places]).mul_(weights.view(-1, 1)[order[start:end]])
            out.scatter_reduce_(0, places.view(-1, 1).repeat(1, x.shape[-1]), made, reduce="sum")
        return out


class Split(Sorted):
    """As a list of tensors."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(TAKEN, dim=-1)
        order = chosen.flatten().argsort()
        parts = x[order // TAKEN].split(self.read(self.counts(chosen)))
        joined = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        return torch.zeros_like(x).index_add(0, order // TAKEN, joined * weights.flatten()[order].unsqueeze(-1))


def scattered(chosen: Tensor) -> Tensor:
    counts = chosen.new_zeros((chosen.shape[0], EXPERTS))
    counts.scatter_(1, chosen, 1)
    return counts.sum(dim=0)


def added(chosen: Tensor) -> Tensor:
    flat = chosen.flatten()
    return torch.zeros(EXPERTS, dtype=torch.long).scatter_add(0, flat, torch.ones_like(flat))


def marked(chosen: Tensor) -> Tensor:
    return functional.one_hot(chosen, EXPERTS).sum((0, 1))


def binned(chosen: Tensor) -> Tensor:
    return chosen.flatten().bincount()


def at_least(chosen: Tensor) -> Tensor:
    return torch.bincount(chosen.view(-1), minlength=EXPERTS)


def as_array(counts: Tensor) -> Any:
    return counts.cpu().numpy()


def as_list(counts: Tensor) -> Any:
    return counts.tolist()


WAYS: list[tuple[type[Sorted], Read, Read]] = [
    (Joined, scattered, as_array),
    (Joined, scattered, lambda counts: counts.cpu().tolist()),
    (Joined, added, np.asarray),
    (Joined, marked, as_list),
    (Joined, at_least, as_array),
    (Added, binned, lambda counts: counts.cpu().numpy().cumsum(0)),
    (Added, at_least, lambda counts: counts.cumsum(0).tolist()),
    (Split, at_least, as_list),
    (Split, scattered, as_list),
]


@pytest.mark.parametrize(("kind", "counts", "read"), WAYS)
def test_every_expert_has_its_run_of_the_rows(kind: type[Sorted], counts: Read, read: Read) -> None:
    module, x = kind(counts, read), torch.randn(5, 4)
    captured = capture(module, (x,), {})
    names = {what.name for what in captured.subgraphs[0].inputs.values() if what.kind == "parameter"}
    assert names == {name for name, _ in module.named_parameters()}
    assert not captured.untraceable
    assert not any("sym_min" in str(node.target) for node in nodes(captured))  # a run is as long as its number
    for tokens in (x, x[:1].expand(5, 4)):  # all of them to the same experts
        assert check_against_eager(module, (tokens,), {}, captured) < 1e-6


def nodes(captured: Captured) -> Any:
    return captured.subgraphs[0].graph.graph.nodes


def test_what_is_joined_has_as_many_rows_as_were_cut() -> None:
    captured = capture(Joined(scattered, as_list), (torch.randn(5, 4),), {})
    (joined,) = (node for node in nodes(captured) if node.target is torch.ops.aten.index_select.default)
    assert tuple(joined.meta["val"].shape) == (5 * TAKEN, 4)


def test_runs_of_more_rows_than_were_counted_are_slices() -> None:
    class Longer(Sorted):
        def forward(self, x: Tensor) -> Tensor:
            chosen = self.router(x).topk(TAKEN, dim=-1).indices
            first, *_ = self.read(self.counts(chosen))
            return torch.cat([x, x, x])[:first].sum(0)

    module, x = Longer(scattered, as_list), torch.randn(5, 4)
    captured = capture(module, (x,), {}, "export")
    assert [node for node in nodes(captured) if node.target is torch.ops.aten.slice.Tensor]
    assert check_against_eager(module, (x,), {}, captured) < 1e-6


def test_counts_that_are_written_over_are_no_longer_known() -> None:
    def emptied(chosen: Tensor) -> Tensor:
        counts = scattered(chosen)
        counts.zero_()
        return counts

    with pytest.raises(AutoQuantError, match="cannot capture"):
        capture(Joined(emptied, as_list), (torch.randn(5, 4),), {}, "export")


def test_a_count_decides_nothing_but_whether_there_is_one() -> None:
    class Many(Joined):
        def forward(self, x: Tensor) -> Tensor:
            first, *_ = self.read(self.counts(self.router(x).topk(TAKEN, dim=-1).indices))
            return x if first > 3 else self.experts[0](x)

    with pytest.raises(AutoQuantError, match="cannot capture"):
        capture(Many(scattered, as_list), (torch.randn(5, 4),), {}, "export")


@pytest.mark.parametrize("read", [as_array, as_list])
def test_hundreds_of_numbers_are_left_to_the_loop(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module is then one operator, and the reason is said."""
    monkeypatch.setattr(occurring, "MOST", 2)
    model = nn.Sequential(nn.Linear(4, 4), Joined(scattered, read))
    captured = capture(model, (torch.randn(5, 4),), {})
    assert [call.path for call in captured.untraceable] == ["1"]
    assert "a loop goes through 3 experts, one by one, and 2 at most" in captured.untraceable[0].reason


def test_modules_may_be_made_on_the_way() -> None:
    """BigBird puts an attention in the place of another; initialising names its tensor."""
    with occurring.EachOccurs() as found:
        filled = torch.ones(2, 2)
        assert id(filled) in found.known
        nn.init.kaiming_uniform_(tensor=filled)
        assert id(filled) not in found.known, "it was ones"
        assert nn.Linear(2, 2)(filled).shape == (2, 2)
