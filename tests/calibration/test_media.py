"""Images and sounds that calibrate and are scored."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from quantized import DATA, PACKAGED, STATIC, STATIC_KV, config_of, with_a_tower
from safetensors.torch import load_file
from seen import WORDS, hears, images, sees, sounds
from torch import Tensor, nn

import autoquant
from autoquant.calibration.media import read_media
from autoquant.calibration.observers import sweep
from autoquant.calibration.processes import Processes
from autoquant.calibration.runner import LayerByLayer, own_share
from autoquant.calibration.windows import check_fit, examples_and
from autoquant.checkpoint.layerwise import runnable
from autoquant.checkpoint.quantize import load_float32
from autoquant.checkpoint.streamed import open_weights
from autoquant.config.format import Rounding, SmoothingKind, Strategy, WeightQuantization, edited
from autoquant.errors import AutoQuantError
from autoquant.models.load import load_skeleton
from autoquant.models.reading import Example, read
from autoquant.models.tokenizer import load_tokenizer
from autoquant.pipeline.of_text import of_text
from autoquant.quantizer.linear import Int8Linear

HOW = {"length": 24, "sequences": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("media")
    sees(place / "sees"), hears(place / "hears"), images(place / "images"), sounds(place / "sounds")
    images(place / "bare", words="")
    return place


def seen(folder: Path, media: str = "images") -> tuple[Example, ...]:
    return read_media(folder / media, folder / "sees", load_skeleton(folder / "sees"))


def test_an_image_stands_before_its_words(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "sees")
    words = tokenizer(WORDS, add_special_tokens=False)["input_ids"]
    first, second = seen(folder)
    assert (first.name, second.name) == ("0.png", "1.png")
    ids = first.ids[0].tolist()
    assert ids[-len(words) :] == words and first.words == len(words)
    assert ids.count(tokenizer.convert_tokens_to_ids("<image>")) == 16
    assert first.inputs["attention_mask"].tolist() == [[1] * len(ids)]
    assert first.inputs["pixel_values"].shape == (1, 3, 16, 16)
    (bare, _) = seen(folder, "bare")
    assert bare.words == 0 and bare.ids.tolist() == [ids[: -len(words)]]


def test_a_sound_goes_to_the_encoder_and_its_words_behind_the_start_token(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "hears")
    first, _ = read_media(folder / "sounds", folder / "hears", load_skeleton(folder / "hears"))
    words = tokenizer(WORDS)["input_ids"]
    words = words[1:] if words[0] == tokenizer.bos_token_id else words
    assert first.inputs["input_features"].shape == (1, 16, 100)
    assert first.ids.tolist() == [[0, *words]] and first.words == len(words)


@torch.no_grad()
def test_scores_are_those_of_the_words_alone(folder: Path) -> None:
    """As computed by hand; of an encoder-decoder the loss that transformers computes for these labels."""
    model = load_float32(folder / "sees")
    found = autoquant.evaluate(folder / "sees", media=folder / "images", device="cpu")
    (result,) = found.results.values()
    examples = seen(folder)
    assert (result.tokens, result.windows) == (sum(e.words for e in examples), 2)
    costs = [read(model, e).logits[0, -e.words - 1 : -1].log_softmax(-1) for e in examples]
    by_hand = [-cost[range(e.words), e.ids[0, -e.words :]].sum() for cost, e in zip(costs, examples, strict=True)]
    assert result.nll.mean == pytest.approx(float(sum(by_hand)) / result.tokens, rel=1e-5)

    hearing = load_float32(folder / "hears")
    heard = read_media(folder / "sounds", folder / "hears", hearing)
    found = autoquant.evaluate(folder / "hears", media=folder / "sounds", device="cpu")
    (result,) = found.results.values()
    losses = [
        hearing(input_features=e.inputs["input_features"], labels=e.ids[:, 1:]).loss for e in heard
    ]  # equally long
    assert result.nll.mean == pytest.approx(float(sum(losses)) / 2, rel=1e-5)


def test_towers_that_images_reach_are_quantized_and_smoothed(folder: Path, tmp_path: Path) -> None:
    source, config = folder / "sees", config_of(folder / "sees")
    _, by_text = of_text(config, load_skeleton(source))
    changed, idle = of_text(config, load_skeleton(source), seen(folder))
    differ = [g.kind for g, was in zip(changed.smoothing.groups, config.smoothing.groups, strict=True) if g != was]
    assert len(by_text) == 8 and idle == () and set(differ) <= {SmoothingKind.QUERY_KEY}
    autoquant.quantize(source, config, tmp_path / "out", strategy=STATIC.value, media=folder / "images", **HOW)
    made, model = autoquant.load(tmp_path / "out"), load_float32(source)
    quantized = {name for name, part in made.named_modules() if isinstance(part, Int8Linear)}
    assert quantized == {name for name, part in model.named_modules() if isinstance(part, nn.Linear)} - {"lm_head"}
    example = seen(folder)[0]
    with torch.no_grad():
        before, after = (read(one, example).logits for one in (model, made))
    assert 0 < (after - before).norm() < 0.1 * before.norm()
    provenance = json.loads((tmp_path / "out" / "autoquant_provenance.json").read_text(encoding="utf-8"))
    assert provenance["options"]["media"] == "images"
    assert (tmp_path / "out" / "processor_config.json").read_bytes() == (source / "processor_config.json").read_bytes()


def test_what_hears_is_calibrated_by_sounds_alone(folder: Path, tmp_path: Path) -> None:
    source, config = folder / "hears", config_of(folder / "hears")
    said = autoquant.quantize(source, config, tmp_path / "out", strategy=STATIC.value, media=folder / "sounds", **HOW)
    assert "packaged text" not in str(said)
    made, model = autoquant.load(tmp_path / "out"), load_float32(source)
    quantized = {name for name, part in made.named_modules() if isinstance(part, Int8Linear)}
    assert any("encoder" in name for name in quantized) and any("decoder" in name for name in quantized)
    example = read_media(folder / "sounds", source, model)[0]
    with torch.no_grad():
        before, after = (read(one, example).logits for one in (model, made))
    assert 0 < (after - before).norm() < 0.1 * before.norm()


@torch.no_grad()
@pytest.mark.parametrize("name, media", [("sees", "images"), ("hears", "sounds")])
def test_apply_smooths_what_media_reach_and_changes_no_function(
    name: str, media: str, folder: Path, tmp_path: Path
) -> None:
    source = folder / name
    config = config_of(source)
    autoquant.apply(source, config, tmp_path / "out", media=folder / media, **HOW)
    model = load_float32(source)
    example = read_media(folder / media, source, model)[0]
    before, after = (read(one, example).logits for one in (model, load_float32(tmp_path / "out")))
    assert torch.allclose(before, after, rtol=1e-3, atol=1e-4 * float(before.abs().max()))
    old, new = (load_file(place / "model.safetensors") for place in (source, tmp_path / "out"))
    towers = [key for key in old if ("tower" in key or ".encoder." in key) and key.endswith("fc1.weight")]
    assert towers and not any(torch.equal(old[key], new[key]) for key in towers)


def test_layer_by_layer_finds_what_a_pass_of_the_whole_model_finds(folder: Path) -> None:
    """Each layer once: text waits until images have gone through their tower."""
    source = folder / "sees"
    model = load_float32(source)
    batches = (torch.randint(3, 2000, (1, 20), generator=torch.Generator().manual_seed(0)), *seen(folder))
    weights = [linear.weight for linear in config_of(source).model.linears if linear.layers is None]
    weights += [f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    whole = sweep(model, dict.fromkeys(weights), batches, cache=True)
    opened = open_weights(source)
    runner = LayerByLayer(opened.inventory, opened.read)
    empty = runnable(source, opened, torch.device("cpu"))
    entered: list[str] = []
    found = sweep(
        empty,
        dict.fromkeys(weights),
        batches,
        cache=True,
        runner=lambda *given: entered.extend(runner.steps(*given)),
    )
    assert len(entered) == len(set(entered)) == 4, entered
    assert found.inputs.keys() == whole.inputs.keys() and "lm_head.weight" in found.inputs
    for name, maximum in whole.inputs.items():
        assert torch.equal(found.inputs[name], maximum), name


def test_every_process_goes_through_the_same_layers(folder: Path) -> None:
    """They wait for each other behind each layer: one that had no image would wait behind others than the rest."""

    class Process(Processes):
        def largest(self, maxima: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return dict(maxima)

    source, generator = folder / "sees", torch.Generator().manual_seed(0)
    windows = tuple(torch.randint(3, 2000, (1, 20), generator=generator) for _ in range(3))
    opened, entered = open_weights(source), []
    for rank in range(2):
        runner = LayerByLayer(opened.inventory, opened.read, processes=Process(rank, 2))
        model = runnable(source, opened, torch.device("cpu"))
        entered.append(list(runner.steps(model, (*windows, *seen(folder)[:1]))))
    assert entered[0] == entered[1] and len(entered[0]) == 4
    assert [len(own_share(Process(rank, 2), (*windows, *seen(folder)))) for rank in range(2)] == [4, 3]


def test_a_cache_with_static_scales_leaves_the_values_of_towers_unscaled(folder: Path, tmp_path: Path) -> None:
    """Layers of a tower have the numbers of those that have a cache: their maxima would be taken for each other's."""
    source, config = folder / "sees", config_of(folder / "sees")
    changed, idle = of_text(config, load_skeleton(source), seen(folder), cached=True)
    off = {g.name for g, was in zip(changed.smoothing.groups, config.smoothing.groups, strict=True) if g != was}
    kinds = (SmoothingKind.LINEAR_LINEAR, SmoothingKind.QUERY_KEY)
    towers = {g.name for g in config.smoothing.groups if g.kind in kinds and "language_model" not in g.name}
    assert not idle and off == towers != set()
    autoquant.quantize(source, config, tmp_path / "out", strategy=STATIC_KV, media=folder / "images", **HOW)
    example = seen(folder)[0]
    with torch.no_grad():
        before, after = (read(one, example).logits for one in (load_float32(source), autoquant.load(tmp_path / "out")))
    assert 0 < (after - before).norm() < 0.1 * before.norm()


def test_int8_towers_are_refused_for_servers_that_do_not_run_them(folder: Path, tmp_path: Path) -> None:
    config, media = config_of(folder / "sees"), folder / "images"
    line = r"vision_tower.*q_proj: vllm .* not known to run int8 linears that images or sound alone reach"
    with pytest.raises(AutoQuantError) as raised:
        autoquant.quantize(folder / "sees", config, tmp_path / "out", media=media, target="vllm", **HOW)
    raised.match("the target 'vllm' cannot take the result")
    assert not any(tmp_path.iterdir())
    said = autoquant.quantize(folder / "sees", config, tmp_path / "out", media=media, **HOW)
    assert said.facts["format"] == "native"
    assert re.search(line, " ".join(said.said))
    said = autoquant.quantize(folder / "sees", config, tmp_path / "other", media=media, target="transformers", **HOW)
    assert said.facts["format"] == "compressed-tensors"


def test_what_is_decided_by_values_takes_text(folder: Path, tmp_path: Path) -> None:
    """It is decided on windows of text beside images, and refused where there are sounds alone."""
    rounding = WeightQuantization(rounding=Rounding.GPTQ)
    for name, media in (("sees", "images"), ("hears", "sounds")):
        config = config_of(folder / name)
        config = edited(config, quantization=edited(config.quantization, weights=rounding))
        how = {**HOW, "strategy": Strategy.PER_CHANNEL_PER_TOKEN.value, "media": folder / media}
        if name == "sees":
            autoquant.quantize(folder / name, config, tmp_path / name, **how)
        else:
            with pytest.raises(AutoQuantError, match="images and sounds calibrate by maxima alone"):
                autoquant.quantize(folder / name, config, tmp_path / name, **how)
            assert not (tmp_path / name).exists()


def test_places_of_images_are_no_words_and_are_not_put_together(folder: Path) -> None:
    model, examples = load_float32(folder / "sees"), seen(folder)
    windows = tuple(torch.zeros(1, 4, dtype=torch.long) for _ in range(3))
    batches = examples_and((*windows, *examples), 2)
    assert batches[:2] == examples and [len(batch) for batch in batches[2:]] == [2, 1]
    beyond = {**examples[0].inputs, "input_ids": examples[0].ids + 10_000}
    check_fit(model, [Example(beyond, 3, "0.png")])
    with pytest.raises(AutoQuantError, match=r"0\.png: Llava.* does not run on what its processor makes of it"):
        read(model, Example({**examples[0].inputs, "pixel_values": torch.zeros(1, 3, 5, 5)}, 3, "0.png"))


@pytest.mark.parametrize(
    "name, line",
    [
        ("nowhere", "no such folder; expected one of images or sounds"),
        ("empty", r"holds no image \(\.bmp, .*\) and no sound \(\.flac"),
        ("odd", r"notes\.md: neither an image .* nor a sound .*, nor the words of one \(\.txt of its name\)"),
        ("alone", r"other\.txt: neither an image"),
        ("broken", r"x\.png: cannot be read: UnidentifiedImageError"),
        ("noise", r"x\.wav: cannot be read: LibsndfileError"),
        ("sounds", r"0\.wav: LlavaProcessor takes no sound"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(name: str, line: str, folder: Path, tmp_path: Path) -> None:
    place = folder / name if name == "sounds" else tmp_path / name
    files = {"odd": ["notes.md"], "alone": ["other.txt"], "broken": ["x.png"], "noise": ["x.wav"]}
    if name not in ("sounds", "nowhere"):
        place.mkdir()
    for file in files.get(name, []):
        (place / file).write_text("nothing of the kind", encoding="utf-8")
    source = folder / ("hears" if name == "noise" else "sees")
    with pytest.raises(AutoQuantError, match=line):
        read_media(place, source, load_skeleton(source))


def test_models_and_files_that_lack_something_say_so(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AutoQuantError, match="LlamaForCausalLM takes neither images nor sound: leave --media out"):
        read_media(folder / "images", PACKAGED, load_skeleton(PACKAGED))
    with pytest.raises(AutoQuantError, match=r"bare/0\.png: has no words in a \.txt of its name"):
        autoquant.evaluate(folder / "sees", media=folder / "bare", device="cpu")
    unsaid = sounds(tmp_path / "unsaid")
    (unsaid / "1.txt").unlink()
    with pytest.raises(AutoQuantError, match=r"1\.wav: 1\.txt should hold its words, which the decoder predicts"):
        read_media(unsaid, folder / "hears", load_skeleton(folder / "hears"))
    for given in ({}, {"data": DATA / "sample.evaluation.txt", "media": folder / "images"}):
        with pytest.raises(AutoQuantError, match=r"give either a text \(--data\) or a folder"):
            autoquant.evaluate(folder / "sees", device="cpu", **given)
    with pytest.raises(AutoQuantError, match="leave --tokens and --batch out"):
        autoquant.evaluate(folder / "sees", media=folder / "images", tokens=4, device="cpu")


def test_a_checkpoint_without_a_processor_says_what_to_copy(folder: Path, tmp_path: Path) -> None:
    source = with_a_tower(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((PACKAGED / name).read_bytes())
    with pytest.raises(AutoQuantError, match=r"no processor (can be loaded|of images or sounds)"):
        read_media(folder / "images", source, load_skeleton(source))
