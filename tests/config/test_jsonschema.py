from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from autoquant.config import jsonschema as schema_module
from autoquant.config.format import SCHEMA_NAME
from autoquant.config.jsonschema import config_schema, schema_text, undescribed

COMMITTED = Path(__file__).parents[2] / "schemas" / SCHEMA_NAME


def classes() -> dict[str, dict[str, Any]]:
    schema = config_schema()
    return {"Config": schema, **schema["$defs"]}


def test_committed_file_is_the_generated_one() -> None:
    assert COMMITTED.read_text(encoding="utf-8") == schema_text(), "run `make configs` and commit schemas/"


def test_is_a_valid_schema_of_the_stated_dialect() -> None:
    schema = json.loads(schema_text())
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$id"] == "urn:autoquant:config:2"
    assert "$schema" in schema["properties"]


def test_every_property_is_described_and_none_has_a_derived_title() -> None:
    for name, definition in classes().items():
        for key, value in definition.get("properties", {}).items():
            assert len(value["description"]) > 10 or value["description"].endswith("."), f"{name}.{key}"
            assert "title" not in value, f"{name}.{key}"


def test_every_property_has_a_default_or_is_required() -> None:
    for name, definition in classes().items():
        for key, value in definition.get("properties", {}).items():
            assert ("default" in value) != (key in definition.get("required", [])), f"{name}.{key}"


def test_no_object_takes_unknown_keys() -> None:
    objects = {name: definition for name, definition in classes().items() if definition["type"] == "object"}
    assert len(objects) > 15
    assert all(definition["additionalProperties"] is False for definition in objects.values())


def test_knobs_have_defaults_and_enumerations() -> None:
    definitions = classes()
    assert definitions["Smoothing"]["properties"]["alpha"]["default"] == 0.5
    assert definitions["Rotation"]["properties"]["method"]["default"] == "hadamard"
    assert len(definitions["Strategy"]["enum"]) == 8


def test_a_field_without_a_description_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare(BaseModel):
        alpha: float = 0.5

    assert undescribed(Bare.model_json_schema()) == ["Bare.alpha"]
    monkeypatch.setattr(schema_module, "Config", Bare)
    with pytest.raises(LookupError, match=r"fields without a description: Bare\.alpha"):
        config_schema()
