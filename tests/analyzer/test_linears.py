"""What each linear is for, read off what becomes of its output."""

from __future__ import annotations

import pytest
import torch
from oracle import analysed, randomised
from torch import Tensor, nn


class Gated(nn.Module):
    """A linear to ``channels`` weights the output of another, ``how``."""

    def __init__(self, how: str, channels: int = 1) -> None:
        super().__init__()
        self.how = how
        self.up, self.odd, self.last = nn.Linear(6, 4), nn.Linear(6, channels), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        up, odd = self.up(x), self.odd(x)
        if self.how == "weights":
            return self.last(up * odd.neg().sigmoid())
        if self.how == "weights in one place":
            return self.last(up.clone().mul_(torch.sigmoid(odd)))
        if self.how == "is ranked":
            return self.last(up * torch.topk(odd, 1).values)
        if self.how == "is added":
            return self.last(up + odd.sigmoid())
        if self.how == "meets one channel":
            return self.last(up) + (odd * up[..., :1]).sum()
        return self.last(up) * odd.mean()  # one number for all tokens


@pytest.mark.parametrize(
    ("how", "channels", "role"),
    [
        ("weights", 1, "router"),
        ("weights in one place", 1, "router"),
        ("is ranked", 5, "router"),
        ("weights", 4, "linear"),
        ("is added", 1, "linear"),
        ("meets one channel", 1, "linear"),
        ("is one number for all tokens", 1, "linear"),
    ],
)
def test_one_number_for_each_token_that_weights_channels_is_a_routers(how: str, channels: int, role: str) -> None:
    module = randomised(Gated(how, channels))
    found = analysed(module, torch.randn(1, 3, 6, dtype=torch.float64))
    roles = {linear.path: linear.role for linear in found.linears}
    assert (roles["up"], roles["odd"]) == ("linear", role)


def test_a_product_between_ends_the_way_to_what_is_weighted() -> None:
    class Further(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.odd, self.wide = nn.Linear(6, 4), nn.Linear(6, 1), nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            weighted: Tensor = self.up(x) * self.wide(self.odd(x))
            return weighted

    found = analysed(randomised(Further()), torch.randn(1, 3, 6, dtype=torch.float64))
    roles = {linear.path: linear.role for linear in found.linears}
    assert (roles["odd"], roles["wide"]) == ("linear", "router")
