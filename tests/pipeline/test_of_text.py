"""Towers stay out of what text calibrates."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from quantized import PACKAGED, STATIC, TINY, config_of, with_a_tower
from transformers import AutoConfig, AutoModelForImageTextToText

import autoquant
from autoquant.checkpoint.load import load
from autoquant.checkpoint.quantize import Recipe, quantize_checkpoint
from autoquant.config.format import Strategy
from autoquant.config.layers import module_of
from autoquant.models.load import load_language_model, load_skeleton
from autoquant.pipeline.of_text import of_text
from autoquant.pipeline.select import Transforms
from autoquant.quantizer.linear import Int8Linear


def test_towers_are_excluded_by_the_knobs_of_a_person(tmp_path: Path) -> None:
    source = with_a_tower(tmp_path / "model")
    config = config_of(source)
    changed, idle = of_text(config, load_skeleton(source))
    towers = {linear.path for linear in config.model.linears if "language_model" not in linear.path} - {"lm_head"}
    assert towers == set(idle)
    assert set(changed.quantization.exclude) == towers | set(config.quantization.exclude)
    off = [group.name for group in changed.smoothing.groups if group.enable is False]
    of_towers = [g.name for g in config.smoothing.groups if {module_of(slot.path) for slot in g.targets} <= towers]
    assert off == of_towers != []
    assert (changed.model, changed.rotation) == (config.model, config.rotation)


def test_a_model_of_text_is_taken_as_it_is() -> None:
    config = config_of(PACKAGED)
    assert of_text(config, load_skeleton(PACKAGED)) == (config, ())


def test_code_that_asks_for_values_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = with_a_tower(tmp_path / "model")
    model = load_skeleton(source)
    table = model.get_input_embeddings()  # type: ignore[operator]  # of transformers
    monkeypatch.setattr(table, "forward", lambda ids: torch.zeros(int(ids.sum()), device="meta"))
    config = config_of(source)
    assert of_text(config, model) == (config, ())


@pytest.mark.parametrize("strategy", [STATIC, Strategy.PER_CHANNEL_PER_TOKEN])
def test_a_model_that_takes_images_is_quantized_by_text(strategy: Strategy, tmp_path: Path) -> None:
    """Its language model; what text does not reach stays as it is, and is said."""
    source = with_a_tower(tmp_path / "in")
    ids = torch.randint(0, 60, (2, 24), generator=torch.Generator().manual_seed(0))
    recipe = Recipe(config_of(source), strategy, Transforms.parse("smooth+rotation"), tuple(ids[:, None]))
    with pytest.warns(UserWarning, match=r"neither smoothed .*, since text does not reach it: .*vision_tower"):
        quantize_checkpoint(source, tmp_path / "out", recipe, {})
    made, model = load(tmp_path / "out"), load_language_model(source)
    quantized = {name for name, part in made.named_modules() if isinstance(part, Int8Linear)}
    assert quantized and all("language_model" in name for name in quantized)
    with torch.no_grad():
        before, after = model(input_ids=ids).logits, made(input_ids=ids).logits
    assert 0 < (after - before).norm() < 0.1 * before.norm()


@torch.no_grad()
def test_modules_in_memory_and_comparisons_leave_towers_too(tmp_path: Path) -> None:
    """All ways of calibrating by text; 'multiplied nothing in the calibration sweep' is for what text should reach."""
    source = with_a_tower(tmp_path / "in")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(PACKAGED / name, source / name)
    ids = torch.randint(0, 60, (4, 24), generator=torch.Generator().manual_seed(0))
    config, batches = config_of(source), tuple(ids[:, None])
    for change in (
        lambda model: autoquant.quantize(model, config, strategy=STATIC.value, calibration=batches),
        lambda model: autoquant.apply(model, config, calibration=batches),
    ):
        with pytest.warns(UserWarning, match=r"text does not reach it: .*vision_tower"):
            made = change(load_language_model(source, dtype=torch.float32))
        before, after = (model(input_ids=ids).logits for model in (load_language_model(source), made))
        assert (after - before).norm() < 0.1 * before.norm()
        assert not [n for n, part in made.named_modules() if isinstance(part, Int8Linear) and "vision" in n]


def test_a_class_for_images_alone_goes_on_with_text(tmp_path: Path) -> None:
    """Of some types no auto class makes the language model alone."""
    text = AutoConfig.for_model("llama", **TINY)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16)
    vision = AutoConfig.for_model("clip_vision_model", patch_size=4, **sizes)
    config = AutoConfig.for_model("llava", text_config=text, vision_config=vision, image_token_id=60)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "in")
    model = load_language_model(tmp_path / "in")
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    _, idle = of_text(config_of(tmp_path / "in"), load_skeleton(tmp_path / "in"))
    assert idle and all("vision_tower" in path or "projector" in path for path in idle)
