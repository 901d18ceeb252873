"""The JSON Schema of the config file, generated from the classes in ``autoquant.config.format``."""

from __future__ import annotations

import json
from typing import Any

from autoquant.config.format import FORMAT_VERSION, Config
from autoquant.config.places import KNOBS, SECTIONS

DIALECT = "https://json-schema.org/draft/2020-12/schema"
CLAIMED = {
    "groups": "scales that can be put on sources and undone in targets.",
    "spaces": "spaces that any orthogonal matrix can rotate.",
}
IDENTIFIER = f"urn:autoquant:config:{FORMAT_VERSION}"


def config_schema() -> dict[str, Any]:
    """The schema as a dictionary: draft 2020-12, every property with a description.

    Raises LookupError for a field of ``autoquant.config.format`` that has no description.
    """
    flat = _flat()
    definitions = flat["$defs"]
    claims: dict[str, Any] = {}
    for (section, key), knobs in KNOBS.items():
        listed = flat["properties"][section]["$ref"].rpartition("/")[2]
        where = definitions[listed]["properties"][key]
        name = where["items"]["$ref"].rpartition("/")[2]
        properties, required = definitions[name]["properties"], definitions[name].get("required", [])
        claims[key] = {**where, "description": f"Every one, in full: {CLAIMED[key]}"}
        where["items"] = {"$ref": f"#/$defs/{name}Knobs"}
        where["description"] = f"What to use of claims.{key}, a line each, by name; without a line: nulls."
        definitions[f"{name}Knobs"] = {
            "additionalProperties": False,
            "description": f"The choices for one of claims.{key}.",
            "properties": {**{knob: properties[knob] for knob in knobs}, "name": properties["name"]},
            "required": ["name"],
            "type": "object",
        }
        definitions[name] = {
            **definitions[name],
            "properties": {key: value for key, value in properties.items() if key not in knobs},
            "required": [key for key in required if key not in knobs],
        }
        claims[key]["items"] = {"$ref": f"#/$defs/{name}"}
    definitions["Claims"] = {
        "additionalProperties": False,
        "description": "What was found of the model and proved, apart from what is used of it.",
        "properties": claims,
        "type": "object",
    }
    flat["properties"]["claims"] = {"$ref": "#/$defs/Claims", "description": "The legal symmetries: facts."}
    first = {name: flat["properties"][name] for name in SECTIONS}
    flat["properties"] = {**first, **flat["properties"]}
    flat["required"] = [name for name in flat["properties"] if name in {*flat["required"], "claims"}]
    return {"$schema": DIALECT, "$id": IDENTIFIER, **flat, "$defs": dict(sorted(definitions.items()))}


def first_schema() -> dict[str, Any]:
    """The schema of format version 1, in which knobs stand among the facts; it is read still."""
    flat = _flat()
    version = {**flat["properties"]["format_version"], "const": 1}
    return {"$schema": DIALECT, **flat, "properties": {**flat["properties"], "format_version": version}}


def _flat() -> dict[str, Any]:
    """The schema of a config in memory."""
    generated = Config.model_json_schema(by_alias=True, mode="validation")
    missing = undescribed(generated)
    if missing:
        raise LookupError(f"fields without a description: {', '.join(missing)}")
    return _without_titles(generated)


def schema_text() -> str:
    """The file ``schemas/autoquant-config.v2.schema.json``."""
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
