"""A config that is about to be applied: its claims are the ones that were proved, or are proved now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from autoquant.analyzer.analyze import analyze
from autoquant.certificate.claims import check_claims, claims, digest_of
from autoquant.certificate.prove import fitting, placeable, prove
from autoquant.certificate.verify import carried_over
from autoquant.config.format import Config
from autoquant.errors import AutoQuantError
from autoquant.models.source import ModelSource
from autoquant.threads import one_thread

Standing = Literal["proved", "edited", "unknown", "unproved"]


@dataclass(frozen=True, slots=True)
class ProofNote:
    """How the claims of a config that is applied stand, for the provenance: ``proved`` True if they are proved, by the
    file's certificate or just now; ``how`` says which.
    """

    proved: bool
    how: str


def standing(config: Config) -> Standing:
    """How a config's claims stand to its certificate: ``edited`` where their digest is not the one that was proved,
    ``unknown`` where the certificate holds none, ``unproved`` where there is no proof at all.
    """
    certificate = config.certificate
    if certificate is None or not certificate.proved:
        return "unproved"
    if certificate.digest is None:
        return "unknown"
    return "proved" if certificate.digest == digest_of(config) else "edited"


IN_WORDS: dict[Standing, str] = {
    "proved": "as they were proved",
    "edited": "edited since it was proved",
    "unknown": "its certificate has no digest of the claims that were proved",
    "unproved": "it has no proof",
}


@one_thread()
def ensure_proved(
    config: Config,
    source: ModelSource,
    *,
    unproved: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] = lambda step: None,
) -> ProofNote:
    """Prove the claims of ``config`` on a small model of ``source``, unless they are the ones of its certificate.

    ``unproved``: go on without a proof, which the note says. Raises AutoQuantError, before anything is written, where
    a claim is not one that the analysis makes, or fails.
    """
    found = standing(config)
    if found == "proved":
        return ProofNote(True, "by the certificate of the config")
    if unproved:
        return ProofNote(False, f"unproved, as asked for: {IN_WORDS[found]}")
    analyzed = analyze(source, progress=progress)
    hint = "undo the edit, or use --unproved to go on at your own risk"
    try:
        check_claims(config, analyzed.config)
    except AutoQuantError as error:
        raise AutoQuantError(f"{error.message}; {hint}", error.details) from error
    if not list(claims(config)):
        return ProofNote(True, "it claims nothing")
    carried = carried_over(analyzed, source, config, seed, progress)
    small, unfit = fitting(carried.loaded.module, carried.config)
    for (name, kind), why in unfit.items():
        raise AutoQuantError(f"{source.name}: '{name}' ({kind}) does not fit its small model: {why}; {hint}")
    small, _ = placeable(carried.loaded.module, small)
    for trial in prove(carried.loaded, small, seed=seed, progress=progress).failed():
        raise AutoQuantError(
            f"{source.name}: '{trial.name}' ({trial.kind}) changes the logits of the small model by "
            f"{trial.change:.2g}: it is not proved, so nothing is written; {hint}"
        )
    return ProofNote(True, f"proved now: {IN_WORDS[found]}")
