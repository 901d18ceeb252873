"""A config that is about to be applied: its claims are the ones that were proved, or are proved now."""

from __future__ import annotations

from collections.abc import Callable

from autoquant.analyzer.analyze import analyze
from autoquant.certificate.claims import IN_WORDS, MAX_SHOWN, ProofNote, check_claims, claims, standing
from autoquant.certificate.prove import fitting, placeable, prove
from autoquant.certificate.verify import carried_over
from autoquant.config.format import Config
from autoquant.errors import AutoQuantError
from autoquant.models.source import ModelSource, named_type
from autoquant.threads import one_thread

HINT = "undo the edit, analyze the model anew, or go on with --unproved"


def ensure_proved(
    config: Config,
    source: Callable[[], ModelSource],
    model_type: str | None,
    *,
    unproved: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] = lambda step: None,
) -> ProofNote:
    """Prove the claims of ``config`` on a small model of ``source``, unless they are the ones of its certificate.

    ``source`` is called where a proof is needed: where claims are not the certificate's, or were proved for another
    type than the source's ``model_type``, which may have the same parameters. ``unproved``: go on without, which the
    note says. Raises AutoQuantError, before anything is written, where a claim is not one that the analysis makes, or
    fails.
    """
    found = standing(config)
    state = IN_WORDS[found]
    if found == "proved":
        named = named_type(config.provenance.model)
        if named is None or model_type is None or named == model_type:
            return ProofNote(True, "by the certificate of the config")
        state = f"proved for a model of type {named}, not {model_type}"
    if unproved:
        return ProofNote(False, f"unproved, as asked for: the config is {state}")
    if not list(claims(config)):
        return ProofNote(True, "it claims nothing")
    progress(f"the config is {state}: proving it")
    try:
        _prove(config, source(), seed, progress)
    except AutoQuantError as error:
        raise AutoQuantError(f"the config is {state}, and {error.message}; {HINT}", error.details) from error
    return ProofNote(True, f"proved now: the config is {state}")


@one_thread()
def _prove(config: Config, source: ModelSource, seed: int, progress: Callable[[str], None]) -> None:
    """Raise AutoQuantError where a claim of ``config`` is not proved on a small model of ``source``."""
    analyzed = analyze(source, progress=progress)
    config = check_claims(config, analyzed.config)
    carried = carried_over(analyzed, source, config, seed, progress)
    small, unfit = fitting(carried.loaded.module, carried.config)
    small, _ = placeable(carried.loaded.module, small)
    failed = prove(carried.loaded, small, seed=seed, progress=progress).failed()
    refused = [
        *(f"'{name}' ({kind}) does not fit its small model: {why}" for (name, kind), why in unfit.items()),
        *(f"'{trial.name}' ({trial.kind}) {trial.why()}, on a small model" for trial in failed),
    ]
    if refused:
        details = tuple(refused[:MAX_SHOWN]) if len(refused) > 1 else ()
        raise AutoQuantError(f"{source.name} does not allow what it claims: {refused[0]}", details)
