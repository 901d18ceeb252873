from __future__ import annotations

import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from autoquant.calibration.windows import (
    CalibrationOptions,
    calibration_batches,
    calibration_windows,
    check_fit,
    cut_windows,
)
from autoquant.errors import AutoQuantError


class Letters:
    """A tokenizer whose ids are code points. BOS is 1."""

    bos_token_id = 1
    chat_template = "a template"

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], *, tokenize: bool) -> str:
        return "".join(message["content"] for message in messages)


def test_bos_comes_before_each_window_so_that_every_token_is_predicted_once() -> None:
    windows = cut_windows([5, 6, 7, 8, 9], window=2, bos=0)
    assert [batch.tolist() for batch in windows.batches] == [[[0, 5, 6]], [[0, 7, 8]], [[0, 9]]]
    assert windows.predicted == 5 and windows.has_bos


def test_without_bos_first_tokens_are_context_and_a_lone_last_token_is_dropped() -> None:
    windows = cut_windows([5, 6, 7, 8, 9], window=2)
    assert [batch.tolist() for batch in windows.batches] == [[[5, 6]], [[7, 8]]]
    assert windows.predicted == 2 and not windows.has_bos


def test_windows_are_limited_and_batched() -> None:
    windows = cut_windows(list(range(1, 12)), window=2, bos=0, tokens=9, batch=3)
    assert [tuple(batch.shape) for batch in windows.batches] == [(3, 3), (1, 3), (1, 2)]
    assert windows.predicted == 9


@pytest.mark.parametrize(("ids", "window", "bos"), [([], 4, 0), ([3], 4, None), ([3, 4], 1, None)])
def test_nothing_to_predict_is_an_error(ids: list[int], window: int, bos: int | None) -> None:
    with pytest.raises(AutoQuantError, match="nothing to predict"):
        cut_windows(ids, window, bos)


@pytest.mark.parametrize("settings", [{"window": 0}, {"batch": 0}, {"tokens": 0}])
def test_settings_below_one_are_an_error(settings: dict[str, int]) -> None:
    with pytest.raises(AutoQuantError, match="at least 1"):
        cut_windows([1, 2, 3], **settings)


def test_calibration_windows_are_the_first_or_seeded() -> None:
    windows = cut_windows(list(range(1, 41)), 4, 0, batch=3)
    first = [batch.tolist() for batch in calibration_batches(windows, 3)]
    assert first == [[[0, 1, 2, 3, 4]], [[0, 5, 6, 7, 8]], [[0, 9, 10, 11, 12]]]
    drawn = [batch.tolist() for batch in calibration_batches(windows, 3, seed=1)]
    assert drawn == [batch.tolist() for batch in calibration_batches(windows, 3, seed=1)] != first
    with pytest.raises(AutoQuantError, match="10 windows; 11 were asked for"):
        list(calibration_batches(windows, 11))


def test_the_options_choose_windows_and_the_column(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [{"content": "abcdef"}]}', encoding="utf-8")
    found = calibration_windows(Letters(), CalibrationOptions(path, 2, 3))
    assert [window.tolist() for window in found] == [[[1, 97, 98, 99]], [[1, 100, 101, 102]]]
    path.write_text('{"body": "abc"}', encoding="utf-8")
    found = calibration_windows(Letters(), CalibrationOptions(path, 1, 3, field="body"))
    assert [window.tolist() for window in found] == [[[1, 97, 98, 99]]]
    assert calibration_windows(Letters(), CalibrationOptions()) == ()


def test_too_short_a_text_says_what_it_has_and_what_to_lower(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abcdefgh", encoding="utf-8")
    said = r"a\.txt: 8 tokens, which make 3 windows of 3; 4 were asked for: lower --sequences or --length, or give more"
    with pytest.raises(AutoQuantError, match=said):
        calibration_windows(Letters(), CalibrationOptions(path, 4, 3))
    with pytest.raises(AutoQuantError, match="lower --held-out, or"):
        calibration_windows(Letters(), CalibrationOptions(path, 4, 3, lower="--held-out"))


def built(name: str, **sizes: int) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes, **tokens)).eval()
    return model


def ids(length: int, largest: int = 9) -> torch.Tensor:
    return torch.full((1, length), largest)


OPT = {"hidden_size": 8, "ffn_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "word_embed_proj_dim": 8}
GPT = {"n_embd": 8, "n_layer": 1, "n_head": 2}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("opt", OPT | {"max_position_embeddings": 16}),
        ("gpt2", GPT | {"n_positions": 16}),
        ("gptj", GPT | {"n_positions": 16, "rotary_dim": 2}),
    ],
)
def test_windows_beyond_a_table_of_positions_name_the_limit(name: str, sizes: dict[str, int]) -> None:
    model = built(name, vocab_size=10, **sizes)
    with torch.no_grad():
        model(ids(16))
        with pytest.raises((IndexError, RuntimeError)):
            model(ids(17))  # what the check is for
    check_fit(model, [ids(16)])
    with pytest.raises(AutoQuantError, match="windows of 17 tokens, BOS included, are longer than the model's 16 pos"):
        check_fit(model, [ids(4), ids(17)])


def test_rotary_positions_have_no_end() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = built("llama", vocab_size=16, max_position_embeddings=16, num_key_value_heads=2, **sizes)
    check_fit(model, [ids(17)])
    with torch.no_grad():
        assert model(ids(17)).logits.isfinite().all()


def test_tokens_beyond_the_table_are_named() -> None:
    model = built("gpt2", vocab_size=10, n_positions=16, **GPT)
    check_fit(model, [ids(4, 9)])
    with pytest.raises(AutoQuantError, match="token 10 is beyond the model's table of 10 tokens: the tokenizer is"):
        check_fit(model, [ids(4, 9), ids(4, 10)])


def test_what_has_no_token_table_is_not_checked() -> None:
    check_fit(nn.Linear(2, 2), [ids(4, 10**6)])
    odd: Any = nn.Linear(2, 2)
    odd.get_input_embeddings = lambda: nn.ModuleList([nn.Embedding(4, 2)])
    odd.config = types.SimpleNamespace()
    check_fit(odd, [ids(4, 10**6)])


def test_a_prefix_takes_positions_too() -> None:
    model: Any = built("gpt2", vocab_size=10, **(GPT | {"n_positions": 16}))
    model.fixed_prefix = SimpleNamespace(tokens=(1, 5, 6))
    check_fit(model, [torch.full((1, 13), 2)])
    with pytest.raises(AutoQuantError, match="windows of 17 tokens, BOS and prefix included, are longer"):
        check_fit(model, [torch.full((1, 14), 2)])
    check_fit(model, [torch.tensor([[1, *[2] * 13]])])  # its BOS is in the prefix
    check_fit(model, [torch.tensor([[1, 5, 6, *[2] * 13]])])  # it begins with all of it
