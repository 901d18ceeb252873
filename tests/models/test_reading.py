"""Windows go whole into a decoder, and in halves into an encoder-decoder."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import PACKAGED, encoder_decoder
from torch import Tensor, nn

from autoquant.calibration.windows import check_fit
from autoquant.errors import AutoQuantError
from autoquant.models.load import load_language_model, load_skeleton
from autoquant.models.reading import check_reads_text, halves, longest_read, read, reads_in_halves, start_token

IDS = torch.randint(3, 2000, (2, 9), generator=torch.Generator().manual_seed(0))


@cache
def made(folder: Path, model_type: str) -> Any:
    return load_language_model(encoder_decoder(folder, model_type), dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["t5", "bart", "pegasus"])
def test_the_decoder_predicts_the_second_half_as_transformers_trains_it(model_type: str, folder: Path) -> None:
    model = made(folder / model_type, model_type)
    given, predicted = halves(IDS)
    assert (given.shape, predicted.shape) == ((2, 4), (2, 5))
    logits = read(model, IDS).logits
    assert logits.shape == (2, 6, 2048)
    trained = model(input_ids=given, labels=predicted.contiguous())
    assert torch.allclose(logits[:, :-1], trained.logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_decoder_is_called_with_the_window_itself() -> None:
    model = load_language_model(PACKAGED, dtype=torch.float32)
    assert not reads_in_halves(model) and longest_read(model, 9) == 9
    assert torch.equal(read(model, IDS).logits, model(IDS).logits)
    calls: list[Tensor] = []
    assert read(model, IDS, lambda ids: calls.append(ids) or "called") == "called" and calls[0] is IDS


def test_a_module_of_ones_own_is_called_with_the_window() -> None:
    assert torch.equal(read(nn.Identity(), IDS), IDS)


def test_the_longer_half_decides_what_fits_a_table_of_positions(folder: Path) -> None:
    model = made(folder / "bart", "bart")
    assert longest_read(model, 126) == 64
    check_fit(model, [torch.zeros(1, 126, dtype=torch.long)])
    with pytest.raises(AutoQuantError, match=r"windows of 65 tokens, .* longer than the model's 64 positions"):
        check_fit(model, [torch.zeros(1, 127, dtype=torch.long)])


def test_bos_stands_in_for_a_start_token_and_nothing_for_both(folder: Path) -> None:
    model = load_skeleton(encoder_decoder(folder / "own", "bart"))
    assert start_token(model) == 0
    model.config.decoder_start_token_id, model.config.bos_token_id = None, 7
    model.generation_config.decoder_start_token_id = model.generation_config.bos_token_id = None
    assert start_token(model) == 7
    model.config.bos_token_id = None
    with pytest.raises(
        AutoQuantError, match=r"Bart.*: its config.json names neither a decoder_start_token_id nor a bos"
    ):
        start_token(model)


def test_what_needs_a_sound_is_refused(folder: Path) -> None:
    model = made(folder / "whisper", "whisper")
    for refused in (lambda: check_reads_text(model), lambda: read(model, IDS)):
        with pytest.raises(
            AutoQuantError, match=r"^Whisper.* does not run without input_features, and text neither cal"
        ):
            refused()
