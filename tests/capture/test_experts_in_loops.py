"""Loops over experts that skip those of no tokens are read with tokens for each: an empty product changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autoquant.capture import occurring
from autoquant.capture.routes import capture, check_against_eager


class Experts(nn.Module):
    def __init__(self, takes: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.takes = takes
        self.router = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))


class Counted(Experts):
    """DeepSeek's."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).topk(1).indices
        counts = torch.bincount(chosen.flatten(), minlength=3)
        self.takes(counts)
        out = torch.zeros_like(x)
        for number, (expert, count) in enumerate(zip(self.experts, counts.tolist(), strict=True)):
            if count == 0:
                continue
            rows, _ = torch.where(chosen == number)
            out[rows] += expert(x[rows])
        return out


class Asked(Experts):
    """Jamba's."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).topk(1).indices
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, _ = torch.where(chosen == number)
            if rows.shape[0] == 0:
                continue
            out[rows] += expert(x[rows])
        return out


class Occurring(Experts):
    """Raschka's: over the experts that ``unique`` names."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).topk(2, dim=-1).indices.reshape(-1, 2)
        out = torch.zeros_like(x)
        for named in torch.unique(chosen):
            mask = chosen == int(named.item())
            if not mask.any():
                continue
            rows = mask.any(dim=-1).nonzero().squeeze(-1)
            out.index_add_(0, rows, self.experts[int(named)](x.index_select(0, rows)))
        return out


class Hit(Experts):
    """Qwen's in transformers 4: over the experts that have a token in their mask."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = torch.topk(self.router(x), 2, dim=-1)
        mask = functional.one_hot(chosen, num_classes=4).permute(2, 1, 0) * 1  # and one that stands for none
        out = torch.zeros_like(x)
        for hit in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            if hit[0] == 3:
                continue
            slots, rows = torch.where(mask[hit].squeeze(0))
            out.index_add_(0, rows, self.experts[hit](x[None, rows].reshape(-1, 4)) * weights[rows, slots, None])
        return out


class Listed(Experts):
    """Jamba's first: rows as lists."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = torch.topk(self.router(x), 2, dim=-1)
        mask = functional.one_hot(chosen, num_classes=3).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            slots, rows = torch.where(mask[number])
            if rows.shape[0] == 0:
                continue
            listed = rows.tolist()
            self.takes(listed)
            made = expert(x[None, listed].reshape(-1, 4)) * weights[listed, slots.tolist(), None]
            out.index_add_(0, rows, made)
        return out


class Summed(Experts):
    """A mask that is added up."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mask = chosen == number
            if mask.sum() == 0:
                continue
            out[mask] = expert(x[mask])
        return out


class Flattened(Experts):
    """Switch Transformers': a mask of each sequence's tokens, seen as one of all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        mask = functional.one_hot(self.router(x[None]).argmax(-1), num_classes=3)
        mask = (mask * (mask.cumsum(-2) <= 8)).view(-1, 1, 3).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for hit in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            _, rows = torch.where(mask[hit].squeeze(0))
            out.index_add_(0, rows, self.experts[hit](x[None, rows].reshape(-1, 4)))
        return out


class Joined(Experts):
    """A mask whose experts are no axis of their own any more."""

    def forward(self, x: Tensor) -> Tensor:
        mask = functional.one_hot(self.router(x).argmax(-1), num_classes=3).view(-1)
        for hit in mask.nonzero():
            x = x + self.experts[0](x) * hit
        return x


@pytest.mark.parametrize("kind", [Counted, Asked, Occurring, Hit, Listed, Summed, Flattened])
def test_every_expert_is_in_the_graph(kind: type[Experts]) -> None:
    module, x = kind(lambda counts: None), torch.randn(5, 4)
    captured = capture(module, (x,), {})
    assert len(captured.subgraphs) == 1 and not captured.untraceable
    names = {what.name for what in captured.subgraphs[0].inputs.values() if what.kind == "parameter"}
    assert names == {name for name, _ in module.named_parameters()}
    for tokens in (x, x[:1].expand(5, 4)):  # all of them to one expert
        assert check_against_eager(module, (tokens,), {}, captured) < 1e-6


def test_counts_are_the_data_s() -> None:
    class Weighed(Counted):
        def forward(self, x: Tensor) -> Tensor:
            seen: list[Tensor] = []
            self.takes = seen.append
            return super().forward(x) * seen[0].float().var()

    module, x = Weighed(lambda counts: None), torch.randn(5, 4)
    captured = capture(module, (x,), {}, "export")
    for tokens in (x, x[:1].expand(5, 4)):
        assert check_against_eager(module, (tokens,), {}, captured) < 1e-6


def test_a_mask_without_an_axis_for_its_experts_says_nothing_of_them() -> None:
    with pytest.raises(Exception, match="cannot capture"):
        capture(Joined(lambda counts: None), (torch.randn(5, 4),), {}, "export")


def test_a_list_of_the_data_is_an_index_alone() -> None:
    module = Listed(lambda rows: torch.tensor(rows))
    with pytest.raises(Exception, match="a list made of the data is used for more than an index"):
        capture(module, (torch.randn(5, 4),), {}, "export")


@pytest.mark.parametrize("kind", [Occurring, Hit])
def test_a_loop_over_hundreds_of_experts_is_left_to_itself(
    kind: type[Experts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(occurring, "MOST", 2)
    with pytest.raises(Exception, match="a loop goes through 3 experts, one by one, and 2 at most are traced so"):
        capture(kind(lambda counts: None), (torch.randn(5, 4),), {}, "export")


def test_numbers_of_unknown_many_are_those_of_the_data() -> None:
    """Token ids are chosen from nowhere: which of them occur decides, and nothing stands for it."""

    class Ids(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            for number in torch.unique(ids):
                x = x + self.lin(x) * number
            return x

    with pytest.raises(Exception, match="cannot capture"):
        capture(Ids(), (torch.randn(5, 4), torch.tensor([1, 2])), {}, "export")
