from __future__ import annotations

import pytest

from autoquant.models.hub_errors import why_not


class RepositoryNotFoundError(Exception):
    """As huggingface_hub's: of its names alone something is said."""


class GatedRepoError(RepositoryNotFoundError):
    pass


class LocalEntryNotFoundError(Exception):
    pass


def raised(cause: Exception) -> Exception:
    """As transformers does: an OSError whose cause is the hub client's."""
    try:
        raise OSError("not a local folder and is not a valid model identifier") from cause
    except OSError as error:
        return error


@pytest.mark.parametrize("wrap", [lambda error: error, raised])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (GatedRepoError(), "its terms are to be accepted on its page first; then `hf auth login`"),
        (RepositoryNotFoundError(), "there is none of that name, or it is private: check the spelling"),
        (LocalEntryNotFoundError(), "the network does not reach it, and it is not among the files fetched before"),
    ],
)
def test_what_the_hub_client_means(error: Exception, said: str, wrap: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert callable(wrap)
    assert (why_not(wrap(error)) or "").startswith(said)


def test_a_hub_that_was_switched_off_says_by_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert why_not(LocalEntryNotFoundError()) == "HF_HUB_OFFLINE is set, and it is not among the files fetched before"


def test_other_errors_are_not_interpreted() -> None:
    assert why_not(ValueError("no such file")) is None
