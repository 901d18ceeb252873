"""Activation maxima: what the observer sees is what the modules were given, for every way of multiplying."""

from __future__ import annotations

import pytest
import torch
from handmade import LLAMA, build, llama_like
from handmade_more import GPT2, HEAD, INNER, MIXTRAL, gpt2_config, mixtral_config
from torch import Tensor, nn

from autoquant.calibration.group_maxima import collect_activation_maxima
from autoquant.config.format import Config
from autoquant.errors import AutoQuantError
from autoquant.executor.resolve import resolve
from autoquant.models.structure import structure_of

IDS = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(0))


def collect(model: nn.Module, config: Config) -> dict[tuple[str, int | None], Tensor]:
    resolved = resolve(config, structure_of(model), rotate=False)
    return collect_activation_maxima(model, resolved, [IDS[:2], IDS[2:]])


def inputs_of(model: nn.Module, path: str) -> Tensor:
    """The module's own inputs, by a hook: absolute maxima per channel over all tokens."""
    seen = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(IDS)
    hook.remove()
    return seen[0].flatten(0, -2).abs().amax(0).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linears(dtype: torch.dtype) -> None:
    model = build("llama", dtype=dtype, **LLAMA)
    found = collect(model, llama_like(model))
    tolerance = 1e-5 if dtype is torch.float32 else 0.1  # another batch size, another order of sums
    for layer in range(2):
        base = f"model.layers.{layer}."
        for name, path in (
            ("attention_in", "self_attn.k_proj"),
            ("mlp_in", "mlp.up_proj"),
            ("up_down", "mlp.down_proj"),
        ):
            assert torch.allclose(found[name, layer], inputs_of(model, base + path), rtol=tolerance), name
        o_inputs = inputs_of(model, f"{base}self_attn.o_proj")
        tied = o_inputs.reshape(2, 2, HEAD).amax(1).flatten()  # two query heads share a KV head
        assert torch.allclose(found["v_o", layer], tied, rtol=tolerance)


def test_conv1d() -> None:
    model = build("gpt2", dtype=torch.float32, **GPT2)
    found = collect(model, gpt2_config(model))
    assert torch.allclose(found["v_o", 1], inputs_of(model, "transformer.h.1.attn.c_proj"), rtol=1e-5)
    assert torch.allclose(found["mlp_in", 0], inputs_of(model, "transformer.h.0.mlp.c_fc"), rtol=1e-5)


def test_experts_in_a_loop_and_in_a_grouped_product_agree() -> None:
    model = build("mixtral", dtype=torch.float32, **MIXTRAL)
    config = mixtral_config(model)
    loop = collect(model, config)
    model.set_experts_implementation("grouped_mm")  # type: ignore[operator]
    grouped = collect(model, config)
    assert all(torch.allclose(loop[key], grouped[key], rtol=1e-5) for key in loop)
    assert torch.allclose(loop["mlp_in", 0], inputs_of(model, "model.layers.0.mlp.gate"), rtol=1e-5)
    experts = loop["up_down", 0].reshape(-1, INNER)
    assert (experts > 0).any(1).all() and not torch.equal(experts[0], experts[1])


def test_what_is_never_multiplied_is_named() -> None:
    model = build("mixtral", dtype=torch.float32, **MIXTRAL)
    config = mixtral_config(model)
    model.set_experts_implementation("batched_mm")  # type: ignore[operator]  # multiplies copies of the weights
    with pytest.raises(AutoQuantError, match=r"mlp_in: model.layers.0.mlp.experts.gate_up_proj multiplied nothing"):
        collect(model, config)


def test_nothing_stays_on_the_model_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last norm fails: by then every linear of the layers was seen."""

    def fails(x: Tensor) -> Tensor:
        raise ArithmeticError("in the midst")

    model = build("llama", dtype=torch.float32, **LLAMA)
    monkeypatch.setattr(model.model.norm, "forward", fails)
    resolved = resolve(llama_like(model), structure_of(model), rotate=False)
    with pytest.raises(ArithmeticError, match="in the midst"):
        collect_activation_maxima(model, resolved, [IDS])
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_progress_counts_batches() -> None:
    model = build("llama", dtype=torch.float32, **LLAMA)
    resolved = resolve(llama_like(model), structure_of(model), rotate=False)
    seen: list[tuple[int, int]] = []
    collect_activation_maxima(model, resolved, [IDS, IDS], progress=lambda *at: seen.append(at))
    assert seen == [(1, 2), (2, 2)]
