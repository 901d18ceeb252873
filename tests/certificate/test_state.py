from __future__ import annotations

import torch
from torch import Tensor, nn

from autoquant.analyzer.analyze import captured_from
from autoquant.certificate.state import randomise_buffers_
from autoquant.models.source import LoadedModel


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("marks", torch.tensor([3, 9, 4, 3]))
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))
        self.register_buffer("shift", torch.zeros(4))
        self.register_buffer("variance", torch.full((4,), 2.0))
        self.register_buffer("angles", torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)[..., self.order] + self.shift + self.angles
        return (hidden + 0.01 * self.steps + self.marks) / self.variance.sqrt()  # type: ignore[no-any-return]


def test_what_a_checkpoint_would_load_is_random_and_structure_stays() -> None:
    module = Stateful().eval()
    loaded = LoadedModel(module, (torch.randn(2, 4),))
    changed = randomise_buffers_(loaded, captured_from(loaded, module), 0)
    assert set(changed) == {"steps", "marks", "shift", "variance"}
    assert 1 <= int(module.steps) <= 3
    assert int(module.marks.min()) >= 3 and int(module.marks.max()) <= 9
    assert module.order.tolist() == [2, 0, 3, 1]
    assert module.angles.tolist() == [1, 1, 1, 1]
    assert bool((module.shift != 0).all()) and bool((module.variance > 0).all())
    assert not torch.equal(module.variance, torch.full((4,), 2.0))
