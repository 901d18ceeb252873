"""What transformers would save, tensor by tensor: the same values as its own reverse conversion gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantized import TINY

from autoquant.errors import AutoQuantError
from autoquant.models import hub_names
from autoquant.models.hub_names import HubTensor, hub_layout

SMALL = {**TINY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {
    "llama": {},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 3},
    "qwen3_moe": {"num_experts": 3, "moe_intermediate_size": 8, "head_dim": 4},
    "granitemoe": {"num_local_experts": 3},
}


def model_of(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **EXPERTS[kind])).eval()


@pytest.mark.parametrize("kind", EXPERTS)
def test_each_tensor_is_what_transformers_saves_and_comes_back(kind: str) -> None:
    from transformers.core_model_loading import revert_weight_conversion

    model = model_of(kind)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    wanted = revert_weight_conversion(model, dict(state))
    layout = hub_layout(model, {name: tuple(tensor.shape) for name, tensor in state.items()})
    made = {part.name: part.taken(state[name]) for name, parts in layout.items() for part in parts}
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], tensor) and made[name].shape == tensor.shape for name, tensor in wanted.items())
    for name, parts in layout.items():
        back = torch.empty_like(state[name])
        for part in parts:
            part.put_(back, made[part.name])
        assert torch.equal(back, state[name]), name


def test_experts_are_matrices_of_their_own_and_so_are_their_scales() -> None:
    model = model_of("qwen3_moe")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    parts = hub_layout(model, {name: (3, 16, 16)})[name]
    assert [part.name for part in parts[:2]] == [f"model.layers.1.mlp.experts.{e}.gate_proj.weight" for e in (0, 1)]
    assert len(parts) == 6 and all(part.shape == (8, 16) for part in parts)
    scales = torch.arange(48.0).reshape(3, 16, 1)
    up = next(part for part in parts if part.name.endswith("experts.2.up_proj.weight"))
    assert up.taken(scales).flatten().tolist() == list(range(40, 48))


def test_rows_in_another_order() -> None:
    part = HubTensor("x", (2, 3), torch.tensor([2, 0]))
    whole = torch.arange(9.0).reshape(3, 3)
    assert part.taken(whole).tolist() == [[6, 7, 8], [0, 1, 2]]
    assert part.taken(torch.arange(3.0)[:, None]).tolist() == [[2], [0]]
    part.put_(whole, torch.ones(2, 3))
    assert whole.tolist() == [[1, 1, 1], [3, 4, 5], [1, 1, 1]]


@pytest.mark.parametrize(
    ("revert", "message"),
    [
        (lambda _, t: {"y": torch.cat([t["a"], t["b"]])}, "y: transformers makes it of more than rows of a"),
        (lambda _, t: {"a": t["a"].mT, "b": t["b"]}, "a: transformers makes it of more than rows of a"),
        (lambda _, t: {"a": t["a"]}, "b: transformers saves 0 of its 4 rows"),
        (lambda _, t: t["c"], "the names that they have on the hub: KeyError"),
    ],
)
def test_what_is_more_than_rows_is_refused(monkeypatch: pytest.MonkeyPatch, revert: Any, message: str) -> None:
    from transformers import core_model_loading

    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", revert)
    with pytest.raises(AutoQuantError, match=message):
        hub_names.hub_layout(None, {"a": (4, 3), "b": (4, 3)})
