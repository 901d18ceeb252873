"""Which of transformers' auto classes builds a configuration: read off its own mappings, no table of ours."""

from __future__ import annotations

from typing import Any

from autoquant.errors import AutoQuantError
from autoquant.models.tasks import KINDS, Kind

_CLASSES: dict[Kind, tuple[str, str]] = {
    "causal-lm": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "image-text-to-text": ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
    "seq2seq-lm": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "speech-seq2seq": ("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
}


def registered_types(kind: Kind) -> list[str]:
    """Every model type that transformers registers for ``kind``, sorted."""
    return sorted(_names(kind))


def kinds_of(config: Any) -> tuple[Kind, ...]:
    """The kinds that a configuration's type is registered for, the preferred one first; none for other types.

    Preferred is the kind whose class made the checkpoint (``architectures``, or ``auto_map`` for code of its own). Else
    an encoder-decoder is taken whole, and so is any other model: a class for one of its parts comes after one for all
    of it.
    """
    own = vars(config).get("auto_map") or {}
    if found := tuple(kind for kind in KINDS if _CLASSES[kind][0] in own):
        return found
    names = {kind: name for kind in KINDS if (name := _names(kind).get(config.model_type)) is not None}
    architectures = vars(config).get("architectures")
    made = architectures if isinstance(architectures, list | tuple) else ()

    def preference(kind: Kind) -> tuple[bool, bool, bool]:
        return (
            names[kind] not in made,
            bool(config.is_encoder_decoder) and kind == "causal-lm",
            not _takes_whole(names[kind], config),
        )

    return tuple(sorted(names, key=preference))


def kind_of(config: Any) -> Kind:
    """The preferred kind. Raises AutoQuantError where the type is registered for none."""
    kinds = kinds_of(config)
    if not kinds:
        classes = ", ".join(name for name, _ in _CLASSES.values())
        raise AutoQuantError(f"type {config.model_type!r} is no language model: it is registered for none of {classes}")
    return kinds[0]


def auto_class(kind: Kind) -> Any:
    """The class of transformers with ``from_config`` and ``from_pretrained``."""
    import transformers

    return getattr(transformers, _CLASSES[kind][0])


def class_by_name(kind: Kind, config: Any) -> Any:
    """The class registered for a configuration's type where the auto class does not find it, else None.

    It looks types up by the class of their configuration, and one class may stand for two types.
    """
    import transformers

    named = getattr(transformers, _names(kind).get(config.model_type, ""), None)
    lost = type(config) not in auto_class(kind)._model_mapping
    return named if lost and getattr(named, "config_class", None) is type(config) else None


def part_taken(kind: Kind, config: Any) -> Any:
    """The one part of a configuration that the class registered for its type is made from; None where that is no part.

    A ``text_config`` is not meant: the auto class finds it by itself.
    """
    architecture = auto_class(kind)._model_mapping.get(type(config), None)
    taken = getattr(architecture, "config_class", type(config))
    parts = {name: value for name, value in vars(config).items() if type(value) is taken}
    return next(iter(parts.values())) if len(parts) == 1 and "text_config" not in parts else None


def types_of_class(name: str) -> list[tuple[str, Kind]]:
    """The model types whose registered class has this name, each with its task: first the one that it is for."""
    import transformers

    own = getattr(getattr(getattr(transformers, name, None), "config_class", None), "model_type", None)
    found = [(model_type, kind) for kind in KINDS for model_type, known in _names(kind).items() if known == name]
    return sorted(found, key=lambda pair: pair[0] != own)


def _names(kind: Kind) -> dict[str, str]:
    from transformers.models.auto import modeling_auto

    names = vars(modeling_auto)[_CLASSES[kind][1]]
    return {model_type: name if isinstance(name, str) else name[0] for model_type, name in names.items()}


def _takes_whole(name: str, config: Any) -> bool:
    """Whether a class is for this configuration, and not for one that it holds."""
    import transformers

    return getattr(getattr(transformers, name, None), "config_class", None) is type(config)
