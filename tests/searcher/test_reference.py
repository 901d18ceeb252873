"""What the float model predicts, kept as what its head was given, and the distance of others from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantized import PACKAGED, TINY, windows
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from autoquant.checkpoint.quantize import load_float32
from autoquant.searcher.reference import Reference, joined


def taken(model: nn.Module, batches: tuple[Tensor, ...]) -> Reference:
    reference = Reference()
    with torch.no_grad(), reference.taking(model) as take:
        for number, ids in enumerate(batches):
            take(number, model(ids))
    return reference


def capped() -> Any:
    """Logits of this type go through a tanh behind the head."""
    settings = AutoConfig.for_model("gemma2", **TINY, head_dim=4, final_logit_softcapping=3.0)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(settings).eval()


@pytest.mark.parametrize("kind", ["plain", "capped"])
@torch.no_grad()
def test_distances_are_those_of_whole_log_probabilities(kind: str) -> None:
    model = load_float32(PACKAGED) if kind == "plain" else capped()
    batches = tuple(ids.clamp_max(63) for ids in (torch.cat(windows(3, 20)), windows(1, 9)[0]))
    reference = taken(model, batches)
    assert (reference.head is None) == (kind == "capped")
    assert (len(reference.given), len(reference.kept)) == ((2, 0) if kind == "plain" else (0, 2))
    noise = torch.Generator().manual_seed(0)
    parts = []
    for number, ids in enumerate(batches):
        logits = model(ids).logits
        other = logits + torch.randn(logits.shape, generator=noise)
        parts.append(reference.distance(number, ids, other))
        expected, got = (functional.log_softmax(one[:, :-1].double(), -1) for one in (logits, other))
        kl = (expected.exp() * (expected - got)).sum((-1, -2))
        excess = (expected - got).gather(-1, ids[:, 1:, None]).sum((-1, -2))
        assert parts[-1].kl == pytest.approx(kl.tolist(), rel=1e-5)
        assert parts[-1].excess == pytest.approx(excess.tolist(), rel=1e-5, abs=1e-4)
        itself = reference.distance(number, ids, logits)
        assert itself.kl == pytest.approx([0.0] * len(ids), abs=1e-5)
    assert joined(parts).counts == (20, 20, 20, 9)
    assert joined(parts).kl == (*parts[0].kl, *parts[1].kl)


@torch.no_grad()
def test_the_head_stays_when_the_model_goes() -> None:
    """Its parameters are those of the pass, also when the model's are replaced, and it has no hooks of the model's."""
    model: Any = load_float32(PACKAGED)
    (ids, *_) = windows()
    reference = taken(model, (ids,))
    expected = functional.log_softmax(model(ids).logits[0, :-1], -1)
    model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))
    model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    assert torch.equal(reference.log_probabilities(0, 0, torch.device("cpu")), expected)


def test_a_model_that_does_not_name_its_head() -> None:
    """Its log-probabilities are kept."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(8, 8)

        def forward(self, ids: Tensor) -> Any:
            return type("Output", (), {"logits": self.table(ids)})

    ids = torch.tensor([[1, 2, 3]])
    reference = taken(Odd(), (ids,))
    assert reference.head is None and reference.kept[0].shape == (1, 2, 8)
