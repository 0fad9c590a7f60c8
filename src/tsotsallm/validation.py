"""Plain data of a file or a caller -> a checked record, by pydantic; what is wrong with it in this project's words.

A record is a frozen dataclass. Its annotations are the rules: types, bounds, choices. The messages and the JSON Schema that
editors complete files by both follow from them, and the descriptions in the schema from the record's docstring.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import SchemaValidator

from tsotsallm.errors import TsotsallmError, nearest
from tsotsallm.files import Json, JsonObject, quoted

Natural = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Part = Annotated[float, Field(ge=0, lt=1)]
"""A share that leaves something."""
RULES = ConfigDict(extra="forbid", allow_inf_nan=False)
"""What a record states as `__pydantic_config__`: no key that is not known, no infinity."""
LARGEST = 1 << 63
HIDDEN = "decided_later"
"""The mark of a field that no file sets."""
_SEVERAL = {"text": "texts", "a whole number": "whole numbers", "a number": "numbers"}

Record = TypeVar("Record")
Schema = JsonObject


def checked(kind: type[Record], content: object, where: str, error: type[TsotsallmError]) -> Record:
    """The record of a kind that plain data describe; raises `error`, naming the place below `where`, for anything else."""
    schema = schema_of(kind)
    if not isinstance(content, Mapping):
        raise error(f"{where} has the value {quoted(content)}; it takes keys and values, such as "
                    f"{{{', '.join(schema['properties'])}}}")
    for key in content:
        if key not in schema["properties"]:
            raise error(f"{where} has no option {quoted(key)}{nearest(str(key), schema['properties'])}")
    try:
        record: Record = _Rules.of(kind).validator.validate_python(dict(content))
        return record
    except ValidationError as wrong:
        raise error(_said(wrong, content, schema, where)) from None


class _Rules:
    """What follows from a record's annotations, made once."""

    made: ClassVar[dict[type[Any], _Rules]] = {}

    def __init__(self, kind: type[Any]) -> None:
        adapter = TypeAdapter(kind)
        self.validator = SchemaValidator(_strict(adapter.core_schema))
        self.schema = _described_schema(kind, adapter.json_schema())

    @classmethod
    def of(cls, kind: type[Any]) -> _Rules:
        if kind not in cls.made:
            cls.made[kind] = cls(kind)
        return cls.made[kind]


def _strict(schema: Json) -> Json:
    """A schema of pydantic's core that takes no text for a number, and no truth value for one, while records may nest."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {"strict": True} if schema.get("type") in ("int", "float", "bool") else {}
    return plain | {key: _strict(part) for key, part in schema.items()}


def schema_of(kind: type[Any]) -> Schema:
    """The JSON Schema of a record: the keys that a file can set, described as its docstring and its bases' describe them."""
    return _Rules.of(kind).schema


def _described_schema(kind: type[Any], schema: Schema) -> Schema:
    shared = schema.pop("$defs", {})
    hidden = {item.name for item in dataclasses.fields(kind) if HIDDEN in item.metadata}
    about = {name: text for base in reversed(kind.__mro__) for name, text in _described(base).items()}
    whole: Schema = _inlined(schema, shared)
    whole["properties"] = {name: _with_description(about.get(name), part) for name, part in whole["properties"].items()
                           if name not in hidden}
    whole["description"] = (inspect.getdoc(kind) or "").partition("\n")[0]
    whole["additionalProperties"] = False
    return whole


def _with_description(text: str | None, part: Schema) -> Schema:
    """A schema with a description, where there is one."""
    return ({"description": text} if text else {}) | {key: value for key, value in part.items() if key != "title"}


def _inlined(part: Json, shared: Mapping[str, Schema]) -> Json:
    """A schema with what it refers to written out: records hold no records of their own kind."""
    if isinstance(part, list):
        return [_inlined(item, shared) for item in part]
    if not isinstance(part, dict):
        return part
    if (name := part.get("$ref", "").rpartition("/")[2]) in shared:
        return _inlined(shared[name], shared) | {key: value for key, value in part.items() if key != "$ref"}
    return {key: _inlined(value, shared) for key, value in part.items() if key != "title" or not isinstance(value, str)}


def _described(kind: type[Any]) -> dict[str, str]:
    """Field -> what a docstring says of it, in lines such as `damp        raises the Gram's diagonal`."""
    found: dict[str, str] = {}
    names: list[str] = []
    known = {item.name for item in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    for line in inspect.cleandoc(kind.__doc__ or "").splitlines():
        if (match := re.match(r"(\w+(?:, \w+)*)  +(\S.*)", line)) and set(match[1].split(", ")) <= known:
            names = match[1].split(", ")
            found |= dict.fromkeys(names, match[2])
        elif names and line.startswith("  "):
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        else:
            names = []
    return found


def _said(wrong: ValidationError, content: object, schema: Schema, where: str) -> str:
    """The first fault of a validation: what was found, and what the place takes."""
    faults = wrong.errors(include_url=False)
    fault = next((one for one in faults if one["type"].startswith("unexpected")), faults[0])    # often what lacks, mistyped
    unknown, lacking = (fault["type"].startswith(kind) for kind in ("unexpected", "missing"))
    where_to = fault["loc"][:-1] if unknown or lacking else fault["loc"]
    if key := "[key]" in where_to:
        where_to = where_to[:where_to.index("[key]") - 1]
    value, part, place = content, schema, where
    for step in where_to:
        branches = [part, *part.get("anyOf", ())]
        inside = next((branch for branch in branches if step in branch.get("properties", {})), None)
        if isinstance(value, Mapping) and inside is not None:
            value, part = value.get(step), inside["properties"][step]
        elif isinstance(value, Mapping) and step in value:
            value, part = value[step], next((branch["additionalProperties"] for branch in branches if isinstance(
                branch.get("additionalProperties"), dict)), {})
        elif isinstance(value, Sequence) and not isinstance(value, str) and isinstance(step, int) and step < len(value):
            value, part = value[step], next((branch["items"] for branch in branches if "items" in branch), {})
            place += f"[{step}]"
            continue
        else:
            continue                        # the name of a branch
        place += f".{step}"
    if key:
        return f"{place} has the key {quoted(fault['input'])}, which it does not take"
    properties: Schema = next((branch["properties"] for branch in [part, *part.get("anyOf", ())]
                               if "properties" in branch), {})
    if unknown:
        return f"{place} has no option {quoted(fault['loc'][-1])}{nearest(str(fault['loc'][-1]), properties)}"
    if lacking:
        name = str(fault["loc"][-1])
        return f"{place} lacks {name}, which is {taken(properties[name])}"
    if isinstance(value, int) and abs(value) >= LARGEST:
        return f"{place} is {quoted(value)}, which is too large for anything"
    choices = _choices(part)
    if choices and isinstance(value, str):
        return f"{place} is {quoted(value)}{nearest(value, choices)}"
    quotes = ", so write it in quotes" if part.get("type") == "string" and not choices else ""
    return f"{place} is {quoted(value)}; it takes {taken(part)}{quotes}"


def _choices(part: Schema) -> list[str]:
    """The words that a place takes, if it takes words only."""
    branches = [branch for branch in part.get("anyOf", [part]) if branch.get("type") != "null"]
    words = [word for branch in branches for word in branch.get("enum", [branch["const"]] if "const" in branch else [None])]
    return words if all(isinstance(word, str) for word in words) else []


def taken(part: Schema) -> str:
    """What a place takes, in words, from its schema."""
    if "anyOf" in part:
        return ", or ".join(dict.fromkeys(taken(branch) for branch in part["anyOf"] if branch.get("type") != "null"))
    if "enum" in part or "const" in part:
        return " or ".join(map(str, part.get("enum", [part.get("const")])))
    kind = part.get("type")
    if kind in ("integer", "number"):
        least, most = part.get("minimum"), part.get("maximum")
        above, below = part.get("exclusiveMinimum"), part.get("exclusiveMaximum")
        words = {"integer": "a whole number", "number": "a number"}[kind]
        if least is not None and most is not None:
            return f"{words} from {least:g} to {most:g}"
        bounds = [f"{least:g} or more" if least is not None else "", f"above {above:g}" if above is not None else "",
                  f"below {below:g}" if below is not None else "", f"at most {most:g}" if most is not None else ""]
        return f"{words}{',' if least is not None else ''} {', '.join(filter(None, bounds))}".strip()
    if kind == "array":
        items = _SEVERAL.get(words := taken(part["items"]) if part.get("items") else "values", words)
        return f"a list of {items}{', at least one' if part.get('minItems') else ''}"
    if kind == "object":
        return f"keys and values{', such as {' + ', '.join(part['properties']) + '}' if part.get('properties') else ''}"
    return {"string": "text", "boolean": "true or false"}.get(str(kind), "a value")
