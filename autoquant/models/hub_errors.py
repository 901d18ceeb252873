"""Why a model is not to be had from the hub: what the hub client means, in words that say what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_MEANT = {
    "GatedRepoError": "its terms are to be accepted on its page first; then `hf auth login`",
    "RepositoryNotFoundError": "there is none of that name, or it is private: check the spelling, or `hf auth login`",
    "RevisionNotFoundError": "it has no such revision",
    "DisabledRepoError": "it is disabled",
}
"""By the exceptions of huggingface_hub; gated comes first, which is a kind of not found."""
_UNREACHED = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError", "Timeout"}


def why_not(error: Exception) -> str | None:
    """What an error of the hub client means; None where it is of another kind."""
    names = [name for one in _chain(error) for name in (base.__name__ for base in type(one).__mro__)]
    for name, meant in _MEANT.items():
        if name in names:
            return meant
    if not _UNREACHED.intersection(names) and "We couldn't connect to" not in str(error):
        return None
    asked = [name for name in _OFFLINE if os.environ.get(name, "0").upper() in ("1", "TRUE", "YES", "ON")]
    why = f"{asked[0]} is set" if asked else "the network does not reach it"
    return f"{why}, and it is not among the files fetched before"


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in seen:
        seen.append(one)
        yield one
        one = one.__cause__ or one.__context__
