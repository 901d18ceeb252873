"""Models with an encoder and a decoder, each of which reads text, go all the way."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from quantized import DATA, PACKAGED, STATIC, STATIC_KV, config_of, encoder_decoder, windows
from torch import nn
from transformers import AutoTokenizer

import autoquant
from autoquant.calibration.windows import cut_windows, tokenize
from autoquant.checkpoint.formats import Wish
from autoquant.checkpoint.in_memory import quantize_module_
from autoquant.checkpoint.load import load
from autoquant.checkpoint.quantize import Recipe, load_float32, quantize_checkpoint
from autoquant.checkpoint.transform import TransformOptions, transform_checkpoint
from autoquant.config.format import Strategy, edited
from autoquant.errors import AutoQuantError
from autoquant.models.reading import IN_HALVES, halves, read
from autoquant.pipeline.select import EVERYTHING, Transforms
from autoquant.pipeline.transform import silent
from autoquant.quantizer.linear import Int8Linear
from autoquant.quantizer.strategies import plan_linears

TYPES = ["t5", "bart", "pegasus"]
TOKEN = Strategy.PER_CHANNEL_PER_TOKEN
IDS = torch.cat(windows(2, 24))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for model_type in [*TYPES, "whisper"]:
        encoder_decoder(place / model_type, model_type)
    return place


@torch.no_grad()
@pytest.mark.parametrize("model_type", TYPES)
def test_apply_changes_the_weights_and_not_the_function(model_type: str, folder: Path, tmp_path: Path) -> None:
    source = folder / model_type
    config = config_of(source)
    done = transform_checkpoint(source, config, tmp_path / "out", TransformOptions(calibration=windows()))
    assert done.smoothed > 0 and done.applied.constructions
    residual = {space.name for space in config.rotation.spaces if space.kind == "R1"}
    assert bool(residual) is (model_type != "bart"), "its norms stand behind the sums"
    before, after = (read(load_float32(one), IDS).logits for one in (source, tmp_path / "out"))
    assert torch.allclose(before, after, rtol=1e-3, atol=1e-4 * float(before.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("strategy", [STATIC, TOKEN])
@pytest.mark.parametrize("model_type", TYPES)
def test_a_native_folder_gives_what_is_quantized_in_memory(
    model_type: str, strategy: Strategy, folder: Path, tmp_path: Path
) -> None:
    source, config = folder / model_type, config_of(folder / model_type)
    done = quantize_checkpoint(
        source, tmp_path / "out", Recipe(config, strategy, EVERYTHING, windows()), {}, wish=Wish()
    )
    made, model = load(tmp_path / "out"), load_float32(source)
    quantized = {name for name, part in made.named_modules() if isinstance(part, Int8Linear)}
    assert quantized == {one.path for one in plan_linears(config)}
    assert quantized == {name for name, part in model.named_modules() if isinstance(part, nn.Linear)} - {"lm_head"}
    before, after = read(model, IDS).logits, read(made, IDS).logits
    assert 0 < (after - before).norm() < 0.1 * before.norm()
    recipe = Recipe(config, strategy, EVERYTHING, windows())
    held = quantize_module_(model, recipe, silent)
    assert torch.allclose(read(held, IDS).logits, after, rtol=1e-3, atol=1e-4 * float(after.abs().max()))
    assert done.chosen.form == "native"
    assert any("is not known to serve" in reason and "--format native" in reason for reason in done.chosen.against)


@torch.no_grad()
def test_eval_scores_the_second_halves_and_says_so(folder: Path) -> None:
    text = DATA / "sample.evaluation.txt"
    found = autoquant.evaluate(folder / "t5", text, length=31, tokens=124, device="cpu")
    assert found.in_halves == (str(folder / "t5"),)
    assert IN_HALVES.split()[0] in " ".join(found.lines()) and "decoder's start token" in " ".join(found.lines())
    assert found.as_dict()["in_halves"] == [str(folder / "t5")]
    (result,) = found.results.values()
    assert (result.windows, result.tokens) == (4, 4 * 16), "BOS and 15 tokens are given, 16 are predicted"
    tokenizer = AutoTokenizer.from_pretrained(folder / "t5")
    ids = cut_windows(tokenize(tokenizer, text.read_text()), 31, tokenizer.bos_token_id, 124, batch=4).batches[0]
    given, predicted = halves(ids)
    loss = load_float32(folder / "t5")(input_ids=given, labels=predicted.contiguous()).loss
    assert math.isclose(result.nll.mean, float(loss), rel_tol=1e-5)


def test_one_with_an_encoder_is_not_compared_with_one_without(folder: Path) -> None:
    with pytest.raises(AutoQuantError, match=r"t5: of it and .*wikinano1m one has an encoder: they predict different"):
        autoquant.evaluate(folder / "t5", DATA / "sample.evaluation.txt", reference=PACKAGED, tokens=64, device="cpu")


def test_a_cache_in_int8_and_a_prefix_are_refused_before_the_work(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder / "t5")
    with pytest.raises(AutoQuantError, match="an encoder-decoder are neither observed nor cached in int8: choose a"):
        recipe = Recipe(config, Strategy(STATIC_KV), EVERYTHING, windows())
        quantize_checkpoint(folder / "t5", tmp_path / "out", recipe, {})
    with pytest.raises(AutoQuantError, match="no prefix for this model: it has an encoder and a decoder; set"):
        changed = edited(config, quantization=edited(config.quantization, prefix=(0,)))
        quantize_checkpoint(folder / "t5", tmp_path / "out", Recipe(changed, STATIC, EVERYTHING, windows()), {})
    with pytest.raises(AutoQuantError, match="the target 'vllm' cannot take the result"):
        recipe = Recipe(config, STATIC, Transforms.parse("none"), windows())
        quantize_checkpoint(folder / "t5", tmp_path / "out", recipe, {}, wish=Wish(target="vllm"))
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_what_hears_is_changed_where_nothing_has_to_be_calibrated(folder: Path, tmp_path: Path) -> None:
    source, config = folder / "whisper", config_of(folder / "whisper")
    line = r"Whisper.* does not run without input_features, and text neither .* give --media FOLDER .* --transforms rot"
    with pytest.raises(AutoQuantError, match=line):
        quantize_checkpoint(source, tmp_path / "out", Recipe(config, STATIC, EVERYTHING, windows()), {})
    with pytest.raises(AutoQuantError, match=line):
        transform_checkpoint(source, config, tmp_path / "out", TransformOptions(calibration=windows()))
    with pytest.raises(AutoQuantError, match=line):
        autoquant.evaluate(source, DATA / "sample.evaluation.txt", tokens=64, device="cpu")
    assert not (tmp_path / "out").exists()
    rotation = Transforms.parse("rotation")
    quantize_checkpoint(source, tmp_path / "int8", Recipe(config, TOKEN, rotation), {})
    transform_checkpoint(source, config, tmp_path / "rotated", TransformOptions(rotation))
    sound = torch.randn(2, 16, 100, generator=torch.Generator().manual_seed(0))
    named = {"input_features": sound, "decoder_input_ids": IDS}
    before, rotated, int8 = (
        model(**named).logits
        for model in (load_float32(source), load_float32(tmp_path / "rotated"), load(tmp_path / "int8"))
    )
    assert (rotated - before).norm() < 1e-5 * before.norm()
    assert 0 < (int8 - before).norm() < 0.1 * before.norm()
