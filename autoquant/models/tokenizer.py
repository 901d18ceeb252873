"""The one loader of tokenizers, and of the processors that lay out images and sounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autoquant.errors import AutoQuantError
from autoquant.models.checkpoint_source import check_ordinary, checkpoint_folder
from autoquant.models.source import named_source, one_line, quiet

_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "spiece*", "sentencepiece*", "tekken.json")
_PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)


def processor_files(folder: Path) -> tuple[Path, ...]:
    """The files that say how images and sounds are laid out beside text."""
    return tuple(path for name in _PROCESSOR_FILES if (path := folder / name).is_file())


def has_tokenizer(folder: Path) -> bool:
    """True if any file of a tokenizer is there."""
    return any(True for pattern in _FILES for _ in folder.glob(pattern))


def load_tokenizer(source: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint's folder or of a hub id.

    Raises AutoQuantError where there is none, and where it is code of its own that is not trusted.
    """
    return _loaded(source, "AutoTokenizer", "tokenizer", trust_remote_code)


def load_processor(source: str | Path, *, trust_remote_code: bool = False) -> Any:
    """What lays out images or sounds beside text: the processor of a checkpoint's folder or of a hub id.

    Raises AutoQuantError as :func:`load_tokenizer`, and where the checkpoint has a tokenizer alone.
    """
    processor = _loaded(source, "AutoProcessor", "processor", trust_remote_code)
    if getattr(processor, "tokenizer", None) is None:
        raise AutoQuantError(
            f"{source}: has no processor of images or sounds beside its tokenizer: copy its preprocessor_config.json "
            "or processor_config.json there"
        )
    return processor


def _loaded(source: str | Path, auto_class: str, what: str, trust_remote_code: bool) -> Any:
    folder = checkpoint_folder(source, weights=False, trust_remote_code=trust_remote_code)
    import transformers

    check_ordinary(folder)
    if (folder / "config.json").is_file():  # which transformers reads too, and complains of it as of a tokenizer
        named_source(str(folder), trust_remote_code=trust_remote_code)
    if not has_tokenizer(folder):
        raise AutoQuantError(
            f"{source}: has no tokenizer, which texts need: copy its tokenizer.json there (quantize goes without text "
            "where activations are dynamic and nothing is smoothed)"
        )
    try:
        with quiet():
            return getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the files' formats, the tokenizer's own code, panics of the library's Rust
        needs_code = "trust_remote_code" in str(error)
        reason = "it is code of its own; give --trust-remote-code to run it" if needs_code else one_line(error)
        raise AutoQuantError(f"{source}: no {what} can be loaded: {reason}") from error
