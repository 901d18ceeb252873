from __future__ import annotations

import pytest
import torch
from quantized import PACKAGED, config_of, windows
from torch import Tensor, nn

from autoquant.algorithms.scale_search import choose_alphas, descend
from autoquant.checkpoint.quantize import load_float32
from autoquant.config.format import SmoothingMethod, Strategy, edited
from autoquant.models.structure import structure_of
from autoquant.pipeline.quantize import rotate_, select
from autoquant.pipeline.select import EVERYTHING
from autoquant.pipeline.transform import depends_on_strategy, prepare_
from autoquant.quantizer.strategies import plan_linears

STATIC = Strategy.PER_CHANNEL_STATIC


def rotated() -> nn.Module:
    model = load_float32(PACKAGED)
    rotate_(model, select(config_of(PACKAGED), structure_of(model), EVERYTHING))
    return model


def test_alpha_of_each_group_and_layer_lowers_the_output_error() -> None:
    config, model = config_of(PACKAGED), rotated()
    groups = select(config, structure_of(load_float32(PACKAGED)), EVERYTHING).resolved.groups
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = choose_alphas(model, groups, plan_linears(config, STATIC), windows(4, 40))
    assert len(found) == 10, "two groups in five layers: norms are folded into R1"
    for chosen in found.values():
        assert chosen.alpha is not None and 0 <= chosen.alpha <= 1
        assert chosen.scales.dtype is torch.float64 and bool((chosen.scales > 0).all())
    # A group whose scales are best left alone is out of reach of the formula; all together gain.
    assert sum(c.after for c in found.values()) < sum(c.before for c in found.values())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_descent_is_for_the_groups_that_ask_for_it() -> None:
    config = config_of(PACKAGED)
    model = rotated()
    groups = select(config, structure_of(load_float32(PACKAGED)), EVERYTHING).resolved.groups
    assert descend(model, groups, plan_linears(config, STATIC), windows(2, 24)) == {}


@pytest.mark.parametrize("method", list(SmoothingMethod))
def test_the_function_stays_the_same(method: SmoothingMethod) -> None:
    config = config_of(PACKAGED)
    config = edited(config, smoothing=edited(config.smoothing, method=method))
    assert depends_on_strategy(config) == (method is SmoothingMethod.DESCENT)
    model, ids = load_float32(PACKAGED), torch.cat(windows(2, 24))

    def logits(of: nn.Module) -> Tensor:
        with torch.no_grad():
            result: Tensor = of(ids).logits
        return result

    expected = logits(model)
    prepared = prepare_(model, config, STATIC, EVERYTHING, windows(3, 24), cache=True)
    got = logits(model)
    assert float((got - expected).norm() / expected.norm()) < 2e-5
    down = "model.layers.1.mlp.down_proj.weight"
    seen: list[Tensor] = []
    part = model.get_submodule(down.removesuffix(".weight"))
    part.register_forward_pre_hook(lambda module, args: seen.append(args[0].abs().amax((0, 1))))
    for batch in windows(3, 24):
        logits_of_batch = model(batch).logits
        assert logits_of_batch.isfinite().all()
    observed = torch.stack(seen).amax(0)
    assert torch.allclose(prepared.swept.inputs[down], observed, rtol=1e-3, atol=1e-5), "maxima follow by arithmetic"
