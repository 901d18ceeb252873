from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import autoquant as aq
from autoquant.certificate.experts import force_choices, reached, units_of, unreached
from autoquant.config.format import Config, IndexMap, edited
from autoquant.library_patches import gradients_throughout
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


def test_whatever_ranks_candidates_is_made_to_choose_each() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.3], [0.8, 0.2, 0.5], [0.0, 0.7, 0.6]])
    with force_choices({3}):
        values, indices = scores.max(dim=-1)
        assert indices.tolist() == [0, 1, 2]
        assert torch.equal(values, scores.diagonal())
        assert torch.max(scores, 1, keepdim=True).indices.tolist() == [[0], [1], [2]]
        ordered = torch.sort(scores, descending=True)
        assert ordered.indices.tolist() == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
        assert torch.equal(ordered.values, scores.gather(1, ordered.indices))
        assert scores.argsort(-1)[:, -1].tolist() == [0, 1, 2]  # the best come last
        assert scores.max() == 0.9  # no candidate is chosen
        assert torch.max(scores, scores + 1).equal(scores + 1)
    assert scores.max(dim=-1).indices.tolist() == [1, 0, 1]


class Sometimes(nn.Module):
    """Experts that are chosen by a comparison; the last one by a score that no input has."""

    def __init__(self, stacked: bool) -> None:
        super().__init__()
        self.norm, self.router = nn.RMSNorm(8, eps=1e-6), nn.Linear(8, COUNT, bias=False)
        self.experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(0 if stacked else COUNT))
        self.stack = nn.Parameter(torch.randn(COUNT, 8, 8) / 3) if stacked else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        bar = torch.tensor([-9.0] * (COUNT - 1) + [2.0], dtype=x.dtype)
        used = (self.router(h).sigmoid() > bar).to(x.dtype)
        if self.stack is not None:
            made = torch.bmm(h.expand(COUNT, *x.shape[1:]), self.stack).movedim(0, 1)[None]
        else:
            made = torch.stack([expert(h) for expert in self.experts], -2)
        return x + (used[..., None] * made).sum(-2)


def test_a_claim_about_an_expert_that_no_run_reached_is_not_proved() -> None:
    torch.manual_seed(0)
    numbered, stacked = Sometimes(False).eval(), Sometimes(True).eval()
    inputs = (torch.randn(1, 6, 8),)
    found = aq.analyze(stacked, example_inputs=inputs).config
    assert found.certificate is not None and found.certificate.coverage is not None
    assert (found.certificate.coverage.experts, found.certificate.coverage.experts_reached) == (COUNT, COUNT - 1)
    assert [group.name for group in found.smoothing.groups] == ["norm -> router, stack"]
    found = aq.analyze(numbered, example_inputs=inputs).config
    assert found.smoothing.groups == ()
    assert "is about 'experts.4.weight', which no run reached" in found.blocked[-1].reason


def stack_of(config: Config, **changes: Any) -> Config:
    group = config.smoothing.groups[0]
    targets = tuple(edited(slot, **changes) if slot.stack else slot for slot in group.targets)
    return edited(config, smoothing=edited(config.smoothing, groups=(edited(group, targets=targets),)))


def test_matrices_of_a_stack_are_checked_one_by_one() -> None:
    torch.manual_seed(0)
    module, inputs = Sometimes(True).eval(), (torch.randn(1, 6, 8),)
    config = aq.analyze(module, example_inputs=inputs).config
    units = units_of(config, module)
    most = {unit for unit in units if unit[1] < COUNT - 1}
    claim = (config.smoothing.groups[0].name, "norm_linear")
    assert unreached(config, units, most) == {} == unreached(config, units, None)

    def blocks(last: int) -> tuple[IndexMap, ...]:
        """The channels of all but the last expert, then those of the last, turned by ``last``."""
        same = IndexMap(shape=(COUNT - 1, 8), stride=(8, 1), channel_stride=(0, 1))
        end = 8 * (COUNT - 1)
        one = IndexMap(start=end, shape=(8 - last,), stride=(1,), channel_start=last, channel_stride=(1,))
        rest = IndexMap(start=end + 8 - last, shape=(last,), stride=(1,), channel_stride=(1,))
        return (same, one, *([rest] if last else []))

    right, wrong = stack_of(config, index=blocks(0)), stack_of(config, index=blocks(1))
    assert unreached(right, units, most) == {}
    assert unreached(wrong, units, most) == {claim: f"'stack' (expert {COUNT - 1})"} == unreached(wrong, units, None)
    assert unreached(wrong, units, set(units)) == {}, "what a run reached is said by the run"
    assert unreached(right, units, ()) == {claim: "'stack' (expert 0)"}


def test_a_table_of_choices_that_no_checkpoint_has_filled_holds_each_in_turn() -> None:
    empty, filled = torch.zeros(6, 2, dtype=torch.long), torch.tensor([[0, 1], [1, 0]])
    ids, wide = torch.tensor([3, 0, 5]), torch.zeros(6, 5, dtype=torch.long)
    with force_choices({4, 9}):
        assert empty[ids].tolist() == [[0, 1], [2, 3], [0, 1]]
        assert filled[torch.tensor([1, 0])].tolist() == [[1, 0], [0, 1]], "the numbers of a table are facts"
        assert empty[1:3].tolist() == [[0, 0], [0, 0]]
        assert wide[ids].tolist() == [[0] * 5] * 3, "no token chooses more than there are"
    assert empty[ids].tolist() == [[0, 0]] * 3


class Clamped(nn.Module):
    """Experts chosen by the token; of the second stack, the last ones by none."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.up, self.down = (nn.Parameter(torch.randn(COUNT, *sizes) / 3) for sizes in ((8, 6), (6, 8)))

    def forward(self, tokens: Tensor) -> Tensor:
        chosen = tokens.flatten() % COUNT
        hidden = torch.bmm(self.up[chosen], self.embed(tokens).flatten(0, 1).unsqueeze(-1)).relu()
        return torch.bmm(self.down[chosen.clamp(max=2)], hidden).squeeze(-1)


def test_one_slot_for_all_matrices_holds_for_those_that_no_run_reached() -> None:
    torch.manual_seed(0)
    module, inputs = Clamped().eval(), (torch.arange(10)[None],)
    config = aq.analyze(module, example_inputs=inputs).config
    assert [group.name for group in config.smoothing.groups] == ["embed -> up", "up -> down"]
    assert [slot.stack for group in config.smoothing.groups for slot in group.targets] == [None, None]
    units = units_of(config, module)
    assert [unit for unit in units if unit[0] == "down"] == [("down", number) for number in range(COUNT)]
    none = {unit for unit in units if unit[0] != "down"}
    assert ("up -> down", "linear_linear") in unreached(config, units, none), "nothing of it was reached"


def test_experts_are_reached_in_inference_mode_too() -> None:
    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(2, 2)])

        @torch.inference_mode()
        def forward(self, x: Tensor) -> Tensor:
            return self.experts[0](x)  # type: ignore[no-any-return]  # nn.Module

    unit, units = Unit(), [("experts.0.weight", 0)]
    assert reached([unit(torch.ones(1, 2))], unit, units) == set()
    with gradients_throughout():
        assert reached([unit(torch.ones(1, 2))], unit, units) == set(units)
    assert unit(torch.ones(1, 2)).is_inference()
