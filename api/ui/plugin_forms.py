"""Forms from JSON schemas, so that a new method or objective appears by itself."""

from typing import Any

from models.domain.base import JsonObject


def of_plugin(plugin: Any) -> JsonObject:
    """Return a method's or an objective's name, what it says of itself, and its fields."""
    schema = plugin.Params.model_json_schema()
    return of_schema(plugin.name, schema) | {"summary": _summary(schema, plugin)}


def of_schema(name: str, schema: JsonObject) -> JsonObject:
    """Return what a form needs: of each field its name, kind, default, range, choices, help.

    Kinds are ``choice``, ``boolean``, ``integer``, ``number``, ``list``, ``object`` and ``text``.
    A field that may be a word or a number, such as "auto", is a ``text``.
    """
    definitions = schema.get("$defs", {})
    fields = [
        _field(field, _resolved(given, definitions))
        for field, given in schema.get("properties", {}).items()
    ]
    types = [field for field in fields if field["name"] == "type"]
    return {
        "name": name,
        "fields": [field for field in fields if field["name"] != "type"],
        "types": types[0]["choices"] if types else [],
    }


def _summary(schema: JsonObject, plugin: Any) -> str:
    text = schema.get("description") or (type(plugin).__doc__ or "")
    return " ".join(str(text).partition("\n\n")[0].split())


def _resolved(field: JsonObject, definitions: JsonObject) -> JsonObject:
    """Return a field with its references followed and its nullable or single parts unwrapped."""
    if "$ref" in field:
        field = definitions[field["$ref"].rpartition("/")[2]] | field
    parts = [_resolved(part, definitions) for part in field.get("anyOf", [])]
    present = [part for part in parts if part.get("type") != "null"]
    if len(present) == 1:
        return present[0] | {name: value for name, value in field.items() if name != "anyOf"}
    if present:
        kinds = {part.get("type") for part in present}
        words = [str(part["const"]) for part in present if "const" in part]
        if kinds == {"array", "string"}:
            return field | {"type": "array", "words": True}
        return field | {"type": "string", "words": words}
    return field


def _field(name: str, given: JsonObject) -> JsonObject:
    choices = given.get("enum") or ([given["const"]] if "const" in given else [])
    kind = {
        "boolean": "boolean",
        "integer": "integer",
        "number": "number",
        "array": "list",
        "object": "object",
    }.get(str(given.get("type")), "text")
    default = given.get("default")
    if isinstance(default, list):
        default = ", ".join(map(str, default))
    return {
        "name": name,
        "kind": "choice" if choices else kind,
        "choices": choices,
        "default": default,
        "least": given.get("minimum", given.get("exclusiveMinimum")),
        "most": given.get("maximum", given.get("exclusiveMaximum")),
        "help": given.get("description", ""),
    }
