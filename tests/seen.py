"""Small checkpoints of models that see or hear, with processors, and folders of images and sounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import soundfile
import torch
from PIL import Image
from quantized import PACKAGED, TINY, encoder_decoder

from autoquant.models.reduce import randomise_

WORDS = "The king of the hill was born in May."


def sees(folder: Path) -> Path:
    """A Llava of two layers whose tower of two layers looks at images of 16 pixels, with a processor."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(PACKAGED)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16)
    config = AutoConfig.for_model(
        "llava",
        text_config=AutoConfig.for_model("llama", **{**TINY, "vocab_size": len(tokenizer)}),
        vision_config=AutoConfig.for_model("clip_vision_model", patch_size=4, **sizes),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    randomise_(model, 0)
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    laid = dict(patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    LlavaProcessor(image_processor=images, tokenizer=tokenizer, **laid).save_pretrained(folder)
    return folder


def hears(folder: Path) -> Path:
    """A Whisper of two and two layers for sounds of a second, with a processor."""
    from transformers import WhisperFeatureExtractor

    encoder_decoder(folder, "whisper")
    WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(folder)
    (folder / "processor_config.json").write_text('{"processor_class": "WhisperProcessor"}', encoding="utf-8")
    return folder


def images(folder: Path, count: int = 2, words: str = WORDS) -> Path:
    """Images of random pixels, each with its words."""
    folder.mkdir()
    generator = numpy.random.default_rng(0)
    for number in range(count):
        pixels = generator.integers(0, 255, (20, 24, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        if words:
            (folder / f"{number}.txt").write_text(words, encoding="utf-8")
    return folder


def sounds(folder: Path, count: int = 2) -> Path:
    """Sounds of noise on two channels, half a second at 8 kHz, each with its words."""
    folder.mkdir()
    generator = numpy.random.default_rng(0)
    for number in range(count):
        soundfile.write(folder / f"{number}.wav", 0.1 * generator.standard_normal((4000, 2)), 8000)
        (folder / f"{number}.txt").write_text(WORDS, encoding="utf-8")
    return folder
