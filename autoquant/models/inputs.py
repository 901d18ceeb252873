"""Inputs to call a model by, made from its forward's signature and its configuration's fields.

Text is a few tokens. For images and sound there are a few layouts (``images.py``, ``sounds.py``); the first one that
the model runs on is taken, with as many placeholder tokens in the text as the model's own tower makes features. Where
none runs, the model is called with text alone, and what it said of the last one is kept.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.capture.fake_tensors import fakeify_, known_values, undisturbed
from autoquant.errors import AutoQuantError
from autoquant.library_patches import DynamicOutputShapeException, marked_as_compiling, pytree
from autoquant.models.images import FILM, IMAGES, AddsNothing, film_layouts, has_part_for_films, image_layouts
from autoquant.models.layouts import Layout, Values, Wanted, feature_methods, first, part
from autoquant.models.sounds import SOUNDS, hears_nothing, sound_layouts
from autoquant.models.source import PLACEHOLDER

_TEXTS = ("input_ids", "decoder_input_ids")
_PLACES = ("bbox",)
"""Where on a page each token stands."""
_COUNT = re.compile(r"(\w+) features and \w+ tokens do not match, tokens: \d+, features: (\d+)")
_BOUNDS = re.compile(r"_(start|end|bos|eos)_")
_NO_VALUES = re.compile(r"its data is not allocated yet")
"""What an operator says of a tensor without memory whose values would be read."""
_BY_VALUES = "which of its parts are read depends on values, and without weights there are none"
NO_SHAPES = re.compile(r"Expected inputs of BF16 type")
"""What an operator says that runs in float32, and whose stand-in without memory does not."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """Keyword arguments of a forward call."""

    kwargs: Values
    known: tuple[str, ...] = ()
    """Those whose values are part of the structure: where images go, how they are cut."""
    missing: dict[str, str] = field(default_factory=dict)
    """Inputs that the model can take and that could not be made, each with the reason."""
    unseen: bool = False
    """What some of the missing ones would put into the model's stream is not seen."""


def make_inputs(
    module: nn.Module,
    device: torch.device,
    shape: tuple[int, int],
    dtype: torch.dtype,
    seed: int = 0,
    *,
    media: bool = True,
    without: Collection[str] = (),
) -> Inputs:
    """Inputs of ``shape`` (sequences, tokens) that ``module`` runs on, none of them for images or sound in ``without``.

    On the meta device token ids have no values, except where ``known`` says so. Elsewhere everything is random. With
    images or sound there is one sequence.
    """
    maker = _Maker(module, device, dtype, torch.Generator().manual_seed(seed))
    if not (media and takes_media(module)):
        return Inputs(maker.text(*shape))
    missing: dict[str, str] = {}
    unseen = False
    text = maker.placed(maker.text(1, shape[1]))
    made: Values = {}
    for name, layouts in maker.media():
        if name in without:
            continue
        failure: str | None = "its configuration does not say of what size it is"
        adds = True
        for words, layout in itertools.product(maker.instead(text), layouts):
            try:
                tried = {**made, **layout(), **maker.beside()}
                text = maker.fitting(words, tried)
            except Exception as error:  # the model's own code: this layout is not one of its
                failure, adds = _said(error), not isinstance(error, AddsNothing)
                if failure == _BY_VALUES:  # the layout is right, whatever would be said of those after it
                    break
            else:
                made, failure = tried, None
                break
        if failure is not None:
            missing[name] = failure
            unseen |= adds
    if not made:
        return Inputs(maker.text(*shape), missing=missing, unseen=unseen)
    kwargs = maker.with_placeholders(text, made)
    known = tuple(
        name for name, held in kwargs.items() if not held.is_meta and (name in _PLACES or not held.is_floating_point())
    )
    return Inputs(kwargs, known, missing, unseen)


def run_without_weights(module: nn.Module, kwargs: Values) -> Any:
    """What a module without weights returns, as far as shapes lead. Raises whatever its code raises."""
    return _Maker(module, torch.device("meta"), torch.float32, torch.Generator()).run(kwargs)


def runs_on(module: nn.Module, inputs: Inputs) -> bool:
    """Whether a module without weights takes inputs that were made for one of another depth."""
    try:
        run_without_weights(module, inputs.kwargs)
    except Exception as error:  # the model's own code; what it would read of values says nothing against its inputs
        return isinstance(error, DynamicOutputShapeException) or _said(error) == _BY_VALUES
    return True


def masks_beside(module: nn.Module, kwargs: Mapping[str, Tensor]) -> Values:
    """Attention masks that a forward names and ``kwargs`` lacks, one for each of its token ids: every token counts.

    Some models look for padding among the token ids where they are given no mask.
    """
    names = inspect.signature(module.forward).parameters
    masks = {name.replace("input_ids", "attention_mask"): ids for name, ids in kwargs.items() if "input_ids" in name}
    return {name: torch.ones_like(ids) for name, ids in masks.items() if name in names and name not in kwargs}


def takes_media(module: nn.Module) -> bool:
    """Whether a forward has an input for images or sound."""
    return any(name in inspect.signature(module.forward).parameters for name in (*IMAGES, *SOUNDS))


def reads_text(module: Any) -> bool:
    """Whether a model can be called with token ids alone."""
    return getattr(module, "main_input_name", _TEXTS[0]) not in (*IMAGES, *SOUNDS)


class _Maker:
    """What the layouts have in common: a model, where it is, and its configurations by what they describe."""

    def __init__(self, module: nn.Module, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> None:
        self.module: Any = module
        self.device, self.dtype, self.generator = device, dtype, generator
        self.names = tuple(inspect.signature(self.module.forward).parameters)
        config: Any = self.module.config
        self.fields = vars(config)
        words = getattr(config.get_text_config(), "vocab_size", None)
        if type(words) is not int:
            raise AutoQuantError(f"{type(module).__name__} {self._why_no_words()}")
        self.vocabulary = words
        self.counts: dict[str, int] = {}
        """How many placeholders of images and sounds the model has asked for."""
        self.features: dict[str, tuple[Values, int]] = {}
        """What vectors were last made of, and how many they were: a tower takes its time."""

    def _why_no_words(self) -> str:
        """Why nothing can be read off a configuration that names no vocabulary."""
        taken = inspect.signature(self.module.forward).parameters.items()
        demanded = [
            name
            for name, parameter in taken
            if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        with contextlib.suppress(Exception):  # a model that does not say
            if self.module.get_output_embeddings() is None and demanded:
                return f"predicts no tokens: it has no output embeddings, and computes from {', '.join(demanded)}"
        return "takes no tokens: its configuration has no vocab_size"

    # Text

    def text(self, sequences: int, tokens: int) -> Values:
        main = self.module.main_input_name
        with contextlib.suppress(NotImplementedError):  # a model that does not say has no list of them
            tables = self.module.get_input_embeddings()
            if isinstance(tables, nn.ModuleList):  # a codebook each: one row of ids for every one of them
                sequences *= len(tables)
        encoder_decoder = bool(self.module.config.is_encoder_decoder)
        made = {}
        if "input_ids" in self.names and (main == "input_ids" or not encoder_decoder):
            made["input_ids"] = self._tokens(sequences, tokens + encoder_decoder)
        halves = (self.module, getattr(self.module, "model", None))
        decodes = encoder_decoder or any(hasattr(half, "encoder") and hasattr(half, "decoder") for half in halves)
        if decodes and "decoder_input_ids" in self.names:  # without them one may draw words by chance
            made["decoder_input_ids"] = self._tokens(sequences, tokens)
        if "bbox" in self.names and "input_ids" in made:  # where on a page, of edge 1, each token stands
            made["bbox"] = self._floats(*made["input_ids"].shape, 4).sigmoid()
        return self._coded(made) if made else {main: self._tokens(sequences, tokens)}

    def _coded(self, text: Values) -> Values:
        """An id of each codebook for every token, where the model does not run on a single one."""
        name = next(reversed([key for key in text if key.endswith("input_ids")]))
        books, channels = self.fields.get("num_codebooks"), None
        if name == "decoder_input_ids":
            channels = part(self.fields, "decoder").get("num_channels")
        counts = ([books + 1, books] if type(books) is int else []) + ([channels] if type(channels) is int else [])
        sequences, tokens = text[name].shape
        tried = text
        for count in counts:
            with contextlib.suppress(Exception):  # the model's own code
                self.run(tried)
                return tried
            tried = {**text, name: self._tokens(sequences * count, tokens).reshape(sequences, tokens, count)}
        return tried

    def placed(self, text: Values) -> Values:
        """``text`` with values for where its tokens stand: they say which part of an image goes with which token."""
        known = {
            name: torch.rand(text[name].shape, generator=self.generator, dtype=torch.float64).to(self.dtype)
            for name in _PLACES
            if name in text
        }
        return {**text, **known}

    def instead(self, text: Values) -> list[Values]:
        """``text``, and what is left of it where an encoder takes an image or a sound instead of tokens."""
        left = {name: ids for name, ids in text.items() if name.startswith("decoder_")}
        return [text, left] if left and "input_ids" in text else [text]

    def beside(self) -> Values:
        """Tokens for what else the forward cannot do without: an image may be asked about in words of its own."""
        found = inspect.signature(self.module.forward).parameters.items()
        names = [name for name, parameter in found if parameter.default is parameter.empty and name not in _TEXTS]
        return {
            name: self._tokens(1, 3, part(self.fields, name.removesuffix("_input_ids")).get("vocab_size"))
            for name in names
            if name.endswith("_input_ids")
        }

    def _tokens(self, sequences: int, tokens: int, vocabulary: int | None = None) -> Tensor:
        if self.device.type == "meta":
            return torch.arange(1, tokens + 1, device=self.device).expand(sequences, tokens)
        # The highest ids are special tokens: images and the like.
        words = self.vocabulary if vocabulary is None else vocabulary
        return torch.randint(max(2, words - 16), (sequences, tokens), generator=self.generator)

    # Images and sound

    def media(self) -> list[tuple[str, list[Layout]]]:
        """Inputs that are no text, each with its layouts."""
        wanted = Wanted(self.module, self.names, self.fields, self._floats)
        found = []
        for name in self.names:
            if name in IMAGES or (name in SOUNDS and not hears_nothing(self.fields)):
                layouts = image_layouts if name in IMAGES else sound_layouts
                found.append((name, list(layouts(wanted, name))))
        if FILM in self.names and has_part_for_films(self.module):
            # Last: where an image takes the places that a film would take, the image is made.
            same = self._placeholder("video") is None and self._placeholder("image") is not None
            found.append((FILM, [_no_places] if same else list(film_layouts(wanted))))
        return found

    def _floats(self, *shape: int) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    # Both together

    def fitting(self, text: Values, media: Values) -> Values:
        """``text``, as long as it takes to run with ``media``. Raises what the model says where it does not run."""
        before = dict(self.counts)
        try:
            self._try(text, self.with_placeholders(text, media))
        except Exception as error:  # the model's own code
            said = _COUNT.search(str(error))
            if said and before.get(what := said[1].lower()) != int(said[2]):
                self.counts[what] = int(said[2])
            elif "audio" not in before and not feature_methods(self.module, "audio"):
                self.counts["audio"] = 2  # a row of them, however many: how many there should be is said then
            else:
                # Where features are added to the tokens one by one, there is a token for each.
                count = 0 if self.module.config.is_encoder_decoder else self._features("audio", media)
                if "input_ids" not in text or not count or count == text["input_ids"].shape[1]:
                    raise
                text = {**text, "input_ids": self._tokens(1, count)}
            try:
                return self.fitting(text, media)
            except Exception:  # the model's own code, which said more of the first try
                self.counts = before
                raise error from None
        return text

    def _try(self, text: Values, given: Values) -> None:
        """Run with ``given``, as far as shapes lead: how many tokens an expert gets, values say, and a loop over them
        comes after the tower, of whose features there are as many as places in the text.
        """
        try:
            self.run(given)
        except DynamicOutputShapeException:
            if "input_ids" not in text or given["input_ids"].shape == text["input_ids"].shape:
                raise

    def with_placeholders(self, text: Values, media: Values) -> Values:
        """The text with as many placeholder tokens as there are features, and the type of each token."""
        if "input_ids" not in text:
            return {**text, **media}
        ids = _values(text["input_ids"], self.vocabulary)
        types = torch.zeros_like(ids)
        masks = [name for name in self.names if name.endswith("_position_mask")]
        for number, what in ((1, "image"), (2, "audio"), (2, "video")):
            token = self._placeholder(what)
            if token is None and what == "image" and masks:  # any: the mask alone says where the image goes
                token = 1
            if token is None or (what == "video" and FILM not in media and (types == 1).any()):  # taken for an image
                continue
            count = self._features(what, media) or (masks and what == "image" and self._queries()) or 0
            if count:
                ids = torch.cat([ids[:, :1], torch.full((1, count), token), ids[:, 1:]], 1)
                types = torch.cat([types[:, :1], torch.full((1, count), number), types[:, 1:]], 1)
        wanted = ["mm_token_type_ids", "moe_mm_token_type_ids"]
        if getattr(self.module.config.get_text_config(), "use_bidirectional_attention", None):
            # They say what is attended in both directions. A model run without them attends to everything, and traced
            # without them to what came before alone: two functions.
            wanted.append("token_type_ids")
        extra = {name: types for name in self.names if name in wanted}
        extra |= {name: (types == 1).long() for name in masks}
        if "perceiver_embeddings" in self.names and "image_attention_mask" in self.names:  # every token sees each image
            extra["image_attention_mask"] = torch.ones(1, ids.shape[1], 1, dtype=torch.long)
        return {**text, **media, "input_ids": ids, **extra}

    def _placeholder(self, what: str) -> int | None:
        """The token in whose place the features of an image, a sound or a film go; not what it begins or ends with."""
        named = ((PLACEHOLDER.search(name), value) for name, value in self.fields.items() if type(value) is int)
        tokens = {match[0]: value for match, value in named if match and match[what]}
        names = sorted(tokens, key=lambda name: _BOUNDS.search(name) is not None)
        own = getattr(self.module.config, f"{what}_token_id", None)
        if names and _BOUNDS.search(names[0]) and type(own) is int:  # a field of another name
            return own
        return tokens[names[0]] if names else None

    def _queries(self) -> int:
        """How many vectors the configuration says that an image becomes, 0 where it does not say."""
        return first(self.fields, "latent_query_num", "num_query_tokens", "image_seq_length") or 0

    def _features(self, what: str, media: Values) -> int:
        """How many vectors the model makes of an image or a sound: it said so, or its own method does; 0 without."""
        if what in self.counts:
            return self.counts[what]
        found: tuple[Values, Any] = {}, None
        for method in feature_methods(self.module, what):  # the outer one may not say what it takes
            taken = inspect.signature(method).parameters
            given = {key: value for key, value in media.items() if key in taken}
            if any(value.is_floating_point() for value in given.values()) and len(given) > len(found[0]):
                found = given, method
        given, method = found
        if not given:
            return 0
        before, made_before = self.features.get(what, ({}, 0))
        if before.keys() == given.keys() and all(before[name] is value for name, value in given.items()):
            return made_before
        media = dict(given)
        if "input_ids" in inspect.signature(method).parameters and (token := self._placeholder(what)) is not None:
            given["input_ids"] = torch.tensor([[1, token, 1]])  # one too few: how many there should be is said then
        output = self.run(given, lambda: method)
        pooled = getattr(output, "pooler_output", None)
        made = output if pooled is None else pooled
        tensors = [leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        count = sum(tensor.numel() // tensor.shape[-1] for tensor in tensors)
        self.features[what] = media, count
        return count

    def run(self, kwargs: Values, function: Callable[[], Any] | None = None) -> Any:
        """What the model, or a method of it, returns: shapes alone where it has no weights."""
        with undisturbed(self.module):
            given, mode = fakeify_(self.module, kwargs)
            with mode if self.device.type == "meta" else torch.no_grad(), known_values():
                called = function() if function is not None else self.module
                try:
                    return called(**given)
                except RuntimeError as error:
                    if self.device.type != "meta" or not NO_SHAPES.search(str(error)):
                        raise
                    with marked_as_compiling():  # by other operators, as the library takes where it is traced
                        return called(**given)


def _said(error: Exception) -> str:
    """Why a layout is none that a model runs on, in one line."""
    if _NO_VALUES.search(str(error)):
        return _BY_VALUES
    named = "" if isinstance(error, AutoQuantError) else f"{type(error).__name__}: "
    return f"{named}{' '.join(str(error).split())[:200]}"


def _no_places() -> Values:
    raise AddsNothing("in a text it takes the places of an image, which is there instead")


def _values(ids: Tensor, vocabulary: int) -> Tensor:
    return torch.arange(1, ids.shape[1] + 1)[None] if ids.is_meta else ids
