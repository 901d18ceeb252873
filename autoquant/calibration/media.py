"""Images and sounds of a folder, each with its words, as a model's own processor lays them out.

``photo.jpg`` is an image, ``photo.txt`` beside it holds its words: a caption, an answer, or the transcript of a sound.
They are what the model says of it. A decoder that hears or sees through an encoder says nothing without; of others an
image alone is calibrated on.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.calibration.texts import read_text
from autoquant.errors import AutoQuantError
from autoquant.models.processors import inputs_taken
from autoquant.models.reading import Example, check_takes_media, start_token
from autoquant.models.tokenizer import load_processor

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
SOUNDS = (".flac", ".mp3", ".ogg", ".wav")
WORDS = ".txt"
_KINDS = {**dict.fromkeys(IMAGES, "image"), **dict.fromkeys(SOUNDS, "audio")}
_EXTRA = "pip install autoquant[multimodal]"


def read_media(folder: Path, source: Path, model: nn.Module, *, trust_remote_code: bool = False) -> tuple[Example, ...]:
    """The images and sounds of ``folder``, by name, as the processor of the checkpoint ``source`` lays them out.

    ``model``: that of the checkpoint, with or without weights. Raises AutoQuantError, naming the file, for what cannot
    be read or laid out, and for a model that takes neither images nor sound.
    """
    check_takes_media(model)
    files = _files(folder)
    processor = load_processor(source, trust_remote_code=trust_remote_code)
    return tuple(_example(file, processor, model) for file in files)


def _files(folder: Path) -> list[Path]:
    """The images and sounds of a folder. Raises AutoQuantError where there are none, and for any other file."""
    if not folder.is_dir():
        raise AutoQuantError(f"{folder}: no such folder; expected one of images or sounds")
    files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    media = [file for file in files if file.suffix.lower() in _KINDS]
    named = {file.stem for file in media}
    for file in files:
        if file not in media and not (file.suffix.lower() == WORDS and file.stem in named):
            raise AutoQuantError(
                f"{file}: neither an image ({', '.join(IMAGES)}) nor a sound ({', '.join(SOUNDS)}), nor the words of "
                f"one ({WORDS} of its name)"
            )
    if not media:
        raise AutoQuantError(f"{folder}: holds no image ({', '.join(IMAGES)}) and no sound ({', '.join(SOUNDS)})")
    return media


def _example(file: Path, processor: Any, model: Any) -> Example:
    beside = file.with_suffix(WORDS)
    words = read_text(beside).strip() if beside.is_file() else ""
    kind = _KINDS[file.suffix.lower()]
    named = inspect.signature(model.forward).parameters
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in named.values())
    taken = inputs_taken(model, named, kind) if passes_on else named
    laid = _laid_out(file, kind, processor, "mm_token_type_ids" in named)
    inputs = {name: tensor for name, tensor in laid.items() if name in taken}
    tokenizer = processor.tokenizer
    if getattr(model.config, "is_encoder_decoder", False):
        if not words:
            raise AutoQuantError(f"{file}: {beside.name} should hold its words, which the decoder predicts")
        start = start_token(model)
        ids = list(tokenizer(words)["input_ids"])  # with what a decoder begins and ends with
        ids = ids[1:] if ids[:1] in ([start], [tokenizer.bos_token_id]) else ids
        return Example({**inputs, "decoder_input_ids": torch.tensor([[start, *ids]])}, len(ids), file.name)
    ids = list(tokenizer(words, add_special_tokens=False)["input_ids"]) if words else []
    if "input_ids" not in inputs:
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        if not bos and not ids:
            raise AutoQuantError(f"{file}: {beside.name} should hold its words: nothing else is said beside it")
        return Example({**inputs, "input_ids": torch.tensor([[*bos, *ids]])}, max(0, len(bos + ids) - 1), file.name)
    return Example(_with_words(inputs, ids), len(ids), file.name)


def _with_words(inputs: Mapping[str, Tensor], ids: list[int]) -> dict[str, Tensor]:
    """``inputs`` with further token ids behind their own; they are text, and attended to."""
    shape, more = (
        inputs["input_ids"].shape,
        {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))},
    )
    return {
        name: torch.cat([tensor, more.get(name, torch.zeros(1, len(ids))).to(tensor)], 1)
        if tensor.shape == shape and not tensor.is_floating_point()
        else tensor
        for name, tensor in inputs.items()
    }


def _laid_out(file: Path, kind: str, processor: Any, types: bool) -> dict[str, Tensor]:
    """What a processor makes of an image or a sound behind the words that a user would begin with."""
    given = _given(file, kind, processor)
    how: dict[str, Any] = {"return_tensors": "pt", **({"return_mm_token_type_ids": True} if types else {})}
    refused: Exception | None = None
    for prompt in _prompts(processor, kind):
        try:
            # A template brings the token that a text begins with.
            begun = {"add_special_tokens": False} if prompt and _begins(processor.tokenizer, prompt) else {}
            made = processor(**given, **({"text": prompt} if prompt else {}), **how, **begun)
            return {name: tensor for name, tensor in made.items() if isinstance(tensor, Tensor) and name != "labels"}
        except ImportError as error:
            raise AutoQuantError(
                f"{file}: {type(processor).__name__} needs a package: {_said(error)}; {_EXTRA}"
            ) from error
        except Exception as error:  # the processor's own code: these words are not how it takes an image
            refused = refused or error
    raise AutoQuantError(f"{file}: {type(processor).__name__} does not take it: {_said(refused)}") from refused


def _prompts(processor: Any, kind: str) -> Iterator[str]:
    """What may stand before the words: the chat template's turn of a user who shows this, or the token in its place."""
    if getattr(processor, "chat_template", None) is not None:
        turn = {"role": "user", "content": [{"type": kind}]}
        yield processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    begins = {"image": "boi_token", "audio": "boa_token"}[kind]
    tokens = (getattr(processor, name, None) for name in (f"{kind}_token", begins))
    yield from (token for token in tokens if isinstance(token, str))
    yield ""


def _begins(tokenizer: Any, prompt: str) -> bool:
    return tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)


def _given(file: Path, kind: str, processor: Any) -> dict[str, Any]:
    if kind == "image":
        return {"images": _read(file, _image)}
    extractor = getattr(processor, "feature_extractor", None) or getattr(processor, "audio_processor", None)
    rate = getattr(extractor, "sampling_rate", None)
    if not isinstance(rate, int):
        raise AutoQuantError(f"{file}: {type(processor).__name__} takes no sound: it names no sampling_rate")
    sound, own = _read(file, _sound)
    return {"audio": _resampled(sound, own, rate), "sampling_rate": rate}


def _read(file: Path, reader: Callable[[Path], Any]) -> Any:
    try:
        return reader(file)
    except ImportError as error:
        raise AutoQuantError(f"{file}: reading it needs a package: {_said(error)}; {_EXTRA}") from error
    except Exception as error:  # whatever the libraries make of a damaged file
        raise AutoQuantError(f"{file}: cannot be read: {_said(error)}") from error


def _image(file: Path) -> Any:
    from PIL import Image

    with Image.open(file) as image:
        return image.convert("RGB")


def _sound(file: Path) -> tuple[Any, int]:
    """Samples [T] of one channel, the mean of all, in float32, and how many a second."""
    import soundfile

    samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    return samples.mean(1), rate


def _resampled(sound: Any, own: int, rate: int) -> Any:
    from scipy.signal import resample_poly

    common = math.gcd(own, rate)
    return sound if own == rate else resample_poly(sound, rate // common, own // common).astype("float32")


def _said(error: Exception | None) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
