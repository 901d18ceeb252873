from __future__ import annotations

import torch

from autoquant.certificate.experts import force_choices, reached
from tests.certificate.modules import Experts, loaded

COUNT = 5


def test_an_expert_that_no_score_chooses_is_made_to_run() -> None:
    module = loaded(Experts(COUNT), tokens=10)
    units = [(name, number) for name in ("up", "down") for number in range(COUNT)]
    with torch.enable_grad():
        plain = reached([module.module(*module.args)], module.module, units)
        with force_choices({COUNT}):
            forced = reached([module.module(*module.args)], module.module, units)
    assert ("up", COUNT - 1) not in plain
    assert forced == set(units)


def test_choices_among_other_numbers_are_left_alone() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.3], [0.8, 0.2, 0.5]])
    with force_choices({3}):
        values, indices = torch.topk(scores, 2)
        assert indices.tolist() == [[0, 1], [2, 0]]
        assert torch.equal(values, scores.gather(1, indices))
        assert torch.argmax(scores, dim=-1).tolist() == [0, 1]
        assert torch.topk(scores, 1, dim=0).indices.tolist() == [[1, 0, 1]]
    assert torch.topk(scores, 2).indices.tolist() == [[1, 2], [0, 2]]
