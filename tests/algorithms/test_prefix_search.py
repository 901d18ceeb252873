from __future__ import annotations

import pytest
import torch
from quantized import PACKAGED, config_of
from torch import Tensor

from autoquant.algorithms.prefix_search import find_prefix, most_frequent, outliers
from autoquant.calibration.windows import CalibrationOptions, calibration_windows
from autoquant.checkpoint.quantize import load_float32
from autoquant.config.format import Config
from autoquant.errors import AutoQuantError
from autoquant.models.tokenizer import load_tokenizer
from autoquant.quantizer.strategies import PlannedLinear, plan_linears

TEXT = PACKAGED.parent / "sample.calibration.txt"


def text() -> tuple[Tensor, ...]:
    return calibration_windows(load_tokenizer(PACKAGED), CalibrationOptions(TEXT, 4, 64, None))


def planned(config: Config) -> tuple[PlannedLinear, ...]:
    return plan_linears(config)


def test_the_packaged_model_has_its_sink_at_bos() -> None:
    model, linears = load_float32(PACKAGED), planned(config_of(PACKAGED))
    assert find_prefix(model, linears, 0, text()) == (0,)
    joined = (torch.cat(text()),)
    assert find_prefix(model, linears, 0, joined) == (0,), "rows of one batch or batches of one row"
    assert not model._forward_pre_hooks and not model.model.layers[0].mlp.down_proj._forward_pre_hooks


def test_a_model_without_outliers_gets_no_prefix() -> None:
    from transformers import AutoModelForCausalLM

    model = load_float32(PACKAGED)
    torch.manual_seed(0)
    random = AutoModelForCausalLM.from_config(model.config).eval()
    assert find_prefix(random, planned(config_of(PACKAGED)), 0, text()) == ()


def test_without_bos_the_most_frequent_outliers_are_taken() -> None:
    model, linears = load_float32(PACKAGED), planned(config_of(PACKAGED))
    assert find_prefix(model, linears, None, text()) == (0,)
    assert find_prefix(model, linears, 5, tuple(batch[:, 1:] for batch in text())) == (), "no first token stands out"


def test_what_stands_out_is_told_by_the_median_of_each_linear() -> None:
    maxima = torch.tensor([[1.0, 21, 1, 2, 1], [100, 100, 100, 100, 1999], [1, 1, 1, 1, 20]])
    assert outliers(maxima).tolist() == [False, True, False, False, False]
    assert outliers(maxima, 19.5).tolist() == [False, True, False, False, True]


@pytest.mark.parametrize(
    ("tokens", "rows", "limit", "wanted"),
    [
        ([], 4, 4, ()),
        ([9], 100, 4, (9,)),
        ([9, 3, 3, 9, 5], 4, 4, (3, 9)),
        ([1, 2, 3, 4, 5, 1], 1, 4, (1, 2, 3, 4)),
        ([1, 2, 2], 1, 1, (2,)),
    ],
)
def test_as_many_as_a_row_has(tokens: list[int], rows: int, limit: int, wanted: tuple[int, ...]) -> None:
    assert most_frequent(tokens, rows, limit) == wanted


def test_nothing_to_look_at_is_an_error() -> None:
    with pytest.raises(AutoQuantError, match="none of the widest quantized linears is a module"):
        find_prefix(load_float32(PACKAGED), (), 0, text())
