"""A config that is about to be applied: its claims are the ones that were proved, or are proved now."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from autoquant.analyzer.analyze import Analyzed, analyze
from autoquant.certificate.by_hand import by_hand
from autoquant.certificate.certify import certificate_of
from autoquant.certificate.claims import (
    IN_WORDS,
    MAX_SHOWN,
    ProofNote,
    check_claims,
    check_structure,
    claims,
    ran,
    standing,
    unmarked,
)
from autoquant.certificate.prove import dtype_of, fitting, placeable, prove
from autoquant.certificate.verify import carried_over
from autoquant.config.format import Certificate, Config, edited
from autoquant.errors import AutoQuantError
from autoquant.models.repair import find_source
from autoquant.models.settings import settings_digest
from autoquant.models.source import ModelSource, named_type
from autoquant.threads import one_thread

HINT = "undo the edit, analyze the model anew, or go on with --unproved"


def ensure_proved(
    config: Config,
    source: Callable[[], ModelSource],
    model_type: str | None,
    *,
    settings: Sequence[str] = (),
    unproved: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] = lambda step: None,
) -> ProofNote:
    """Prove the claims of ``config`` on a small model of ``source``, unless they are the ones of its certificate.

    ``source`` is called where a proof is needed: where claims are not the certificate's, or were proved for another
    type than the source's ``model_type``, which may have the same parameters, or for other ``settings`` of it
    (:func:`settings_digests`), by which its forward may do something else with them. ``unproved``: go on without, which
    the note says. Raises AutoQuantError, before anything is written, where a claim is not one that the analysis makes,
    or fails.
    """
    found = standing(config)
    state = IN_WORDS[found]
    if found == "proved":
        named = named_type(config.provenance.model)
        if not (named is None or model_type is None or named == model_type):
            state = f"proved for a model of type {named}, not {model_type}"
        elif not _of_settings(config, settings):
            state = "proved for a model of other settings"
        else:
            return ProofNote(True, "by the certificate of the config")
    if unproved:
        return ProofNote(False, f"unproved, as asked for: the config is {state}")
    if not list(claims(config)):
        return ProofNote(True, "it claims nothing")
    progress(f"the config is {state}: proving it")
    try:
        model = source()
        analyzed = analyze(model, progress=progress)
        theirs = analyzed.config
        fits = config.provenance.fingerprint == theirs.provenance.fingerprint
        certificate = _prove(config, analyzed, model, seed, progress) if fits else None
    except AutoQuantError as error:
        raise AutoQuantError(f"the config is {state}, and {error.message}; {HINT}", error.details) from error
    if certificate is None:  # what no proof would mend
        check_structure(config, theirs.provenance.model, theirs.provenance.fingerprint, theirs.model.parameters)
    return ProofNote(True, f"proved now: the config is {state}", certificate)


def _of_settings(config: Config, settings: Sequence[str]) -> bool:
    """True if the certificate is for a model of these ``settings``, or nothing is known of the model's.

    Where it records none, it is one of a type's default configuration, or of a model without a configuration. A digest
    of an earlier form, which does not have the type, counts where the types were compared by name.
    """
    recorded = None if config.certificate is None else config.certificate.settings
    named = config.provenance.model
    if not settings or recorded == settings[0]:
        return True
    if recorded is not None:
        return recorded in settings and named_type(named) is not None
    if named_type(named) == named:
        return settings_digest(find_source(named).config) == settings[0]
    return config.provenance.transformers is None


def proved_anew(
    config: Config, source: ModelSource, *, seed: int = 0, progress: Callable[[str], None] = lambda step: None
) -> Config:
    """``config`` with the certificate of a proof of all that it claims, made now. A group by hand that the analysis
    finds too is no longer one. Raises AutoQuantError where a claim does not hold.
    """
    analyzed = analyze(source, progress=progress)
    config = unmarked(config, analyzed.config)
    return edited(config, certificate=_prove(config, analyzed, source, seed, progress))


@one_thread()
def _prove(
    config: Config, analyzed: Analyzed, source: ModelSource, seed: int, progress: Callable[[str], None]
) -> Certificate:
    """The certificate of what ``config`` claims, proved on a small model of ``source``. Raises AutoQuantError where
    that does not hold.
    """
    carried = carried_over(analyzed, source, check_claims(config, analyzed.config), seed, progress)
    small, unfit = fitting(carried.loaded.module, carried.config)
    small, _ = placeable(carried.loaded.module, small)
    proof = prove(carried.loaded, small, seed=seed, progress=progress)
    runs = f" ({ran(proof.coverage)})" if by_hand(small) else ""
    refused = [
        *(f"'{name}' ({kind}) does not fit its small model: {why}" for (name, kind), why in unfit.items()),
        *(f"'{trial.name}' ({trial.kind}) {trial.why()}, on a small model{runs}" for trial in proof.failed()),
    ]
    if refused:
        details = tuple(refused[:MAX_SHOWN]) if len(refused) > 1 else ()
        raise AutoQuantError(f"{source.name} does not allow what the config claims: {refused[0]}", details)
    return certificate_of(proof, dtype_of(carried.loaded.module), seed, config, source)
