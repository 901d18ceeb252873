"""The JSON Schema of the config file, generated from the classes in ``autoquant.config.format``."""

from __future__ import annotations

import json
from typing import Any

from autoquant.config.format import FORMAT_VERSION, Config

DIALECT = "https://json-schema.org/draft/2020-12/schema"
IDENTIFIER = f"urn:autoquant:config:{FORMAT_VERSION}"


def config_schema() -> dict[str, Any]:
    """The schema as a dictionary: draft 2020-12, every property with a description.

    Raises LookupError for a field of ``autoquant.config.format`` that has no description.
    """
    generated = Config.model_json_schema(by_alias=True, mode="validation")
    missing = undescribed(generated)
    if missing:
        raise LookupError(f"fields without a description: {', '.join(missing)}")
    return {"$schema": DIALECT, "$id": IDENTIFIER, **_without_titles(generated)}


def schema_text() -> str:
    """The file ``schemas/autoquant-config.v1.schema.json``."""
    return json.dumps(config_schema(), indent=2, ensure_ascii=False) + "\n"


def undescribed(schema: dict[str, Any]) -> list[str]:
    """The properties, as 'Class.key', that have no description."""
    classes = {schema.get("title", "schema"): schema, **schema.get("$defs", {})}
    return [
        f"{name}.{key}"
        for name, definition in classes.items()
        for key, value in definition.get("properties", {}).items()
        if not value.get("description")
    ]


def _without_titles(schema: dict[str, Any]) -> dict[str, Any]:
    """Leave out the titles that pydantic derives from every key: they repeat the key."""
    definitions = {name: _without_titles(definition) for name, definition in schema.get("$defs", {}).items()}
    properties = {
        key: {name: item for name, item in value.items() if name != "title"}
        for key, value in schema.get("properties", {}).items()
    }
    result = dict(schema)
    if definitions:
        result["$defs"] = definitions
    if properties:
        result["properties"] = properties
    return result
