"""The committed configs are what the analyzer finds. After a change of the analyzer: ``make configs``."""

from __future__ import annotations

import difflib
import json
import os
import random
from importlib.metadata import version
from pathlib import Path

import pytest

from autoquant.config.file import config_text, load_config
from autoquant.config.format import Config, edited
from autoquant.models.tasks import full_name, split_name
from autoquant.report.coverage import Row, offers
from autoquant.survey.generate import index_text, names_in
from autoquant.survey.survey import survey

FOLDER = Path(__file__).parents[2] / "generated_configs"
NAMES = names_in(FOLDER)


def drift(committed: Config, fresh: Config) -> str:
    """Lines that differ, but for what was measured (rounding depends on the processor) and the version of torch."""
    provenance = [edited(config.provenance, torch="any") for config in (committed, fresh)]
    plain = [
        config_text(edited(config, certificate=None, provenance=made))
        for config, made in zip((committed, fresh), provenance, strict=True)
    ]
    return "\n".join(
        difflib.unified_diff(*(text.splitlines() for text in plain), "committed", "fresh", lineterm="", n=1)
    )


def skip_for_other_versions(config: Config) -> None:
    for package, wanted in (("torch", config.provenance.torch), ("transformers", config.provenance.transformers)):
        if version(package).partition("+")[0] != wanted:
            pytest.skip(f"written with {package} {wanted}, this is {version(package)}")


def test_there_is_one_for_every_type_that_the_survey_proved_something_of() -> None:
    rows = json.loads((FOLDER.parent / "docs" / "coverage.json").read_text(encoding="utf-8"))
    proved = {full_name(row["type"], row["kind"]) for row in rows if offers(row)}
    assert proved <= set(NAMES)
    assert not ({full_name(row["type"], row["kind"]) for row in rows} - proved) & set(NAMES)
    lying = [path for path in FOLDER.rglob("*.json") if "recipes" not in path.parts]
    assert len(NAMES) == len(lying), "none lies where it does not belong"


@pytest.mark.parametrize("name", NAMES)
def test_each_is_valid_and_proved(name: str) -> None:
    config = load_config(FOLDER / f"{name}.json")
    assert config.provenance.model == split_name(name)[0]
    schema = (FOLDER / f"{name}.json").parent / config.schema_
    assert schema.resolve() == FOLDER.parent / "schemas" / "autoquant-config.v2.schema.json"
    assert config.certificate is not None and config.certificate.proved
    assert (FOLDER / f"{name}.json").read_text(encoding="utf-8") == config_text(config)


def test_the_index_is_that_of_the_configs() -> None:
    configs = {name: load_config(FOLDER / f"{name}.json") for name in NAMES}
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == index_text(configs), "run: make configs"


def drift_of(name: str, *, proved: bool = True) -> str:
    """What a fresh config of a type, proved or not, has otherwise than the committed one."""
    from autoquant.analyzer.analyze import analyze
    from autoquant.models.repair import find_source
    from autoquant.survey.generate import generate, with_schema

    model_type, kind = split_name(name)
    fresh = generate(name) if proved else with_schema(analyze(find_source(model_type, kind=kind)).config, name)
    return drift(load_config(FOLDER / f"{name}.json"), fresh)


def row_of(name: str) -> Row:
    model_type, kind = split_name(name)
    return {"type": model_type, "kind": kind, "drift": drift_of(name)}


def test_drift_of_one_and_of_a_sample() -> None:
    """AUTOQUANT_SEED draws another sample, of the fifth of the types with the fewest linears."""
    rows = json.loads((FOLDER.parent / "docs" / "coverage.json").read_text(encoding="utf-8"))
    linears = {full_name(row["type"], row["kind"]): row["linears"] for row in rows if offers(row)}
    quick = sorted(linears, key=lambda name: (linears[name], name))[: len(linears) // 5]
    seed = int(os.environ.get("AUTOQUANT_SEED", "0"))
    skip_for_other_versions(load_config(FOLDER / "llama.json"))
    assert drift_of("llama", proved=False) == "", "run: make configs"
    for name in random.Random(seed).sample(sorted(quick), 2):
        assert drift_of(name) == "", f"{name}: run: make configs"


@pytest.mark.slow
def test_drift_of_all(tmp_path: Path) -> None:
    """Each type in a process of its own, as in the survey: what torch keeps of hundreds would fill the memory."""
    skip_for_other_versions(load_config(FOLDER / "llama.json"))
    rows = survey(NAMES, tmp_path, jobs=2, make=row_of)
    found = {name: row.get("drift", row.get("reason")) for name, row in zip(NAMES, rows, strict=True)}
    assert {name: text for name, text in found.items() if text != ""} == {}, "run: make survey"


def test_that_drift_would_be_seen(example_config: Config) -> None:
    smoothing = edited(example_config.smoothing, alpha=0.6)
    changed = drift(example_config, edited(example_config, smoothing=smoothing))
    assert '-    "alpha": 0.5,\n+    "alpha": 0.6,' in changed
    assert drift(example_config, example_config) == ""
