"""Turn JSON schemas into grammars (GBNF), which llama.cpp's answers then follow.

llama.cpp's own conversion ignores a schema or keyword that it does not know, so that an answer can silently break its
schema; here such a keyword is refused by name. Every text that a grammar of this module allows is a value that the schema
accepts. The reverse does not hold: texts are compact, and strings have no \\u escapes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias
from urllib.parse import unquote

from tsotsallm.errors import TsotsallmError
from tsotsallm.files import parse_json, quoted

MOST_CHARACTERS = 1 << 16
MOST_GRAMMAR = 1 << 19
MOST_REPEATS = 1000
"""Largest length or count; llama.cpp refuses grammars with more than about 2000 repetitions."""
LARGEST = 10 ** 15 - 1
ANNOTATIONS = frozenset({"$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default", "examples",
                         "deprecated", "readOnly", "writeOnly", "discriminator"})
KEYWORDS: dict[str, tuple[str, ...]] = {
    "object": ("properties", "required", "additionalProperties", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "format"),
    "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "number": (), "boolean": (), "null": ()}
DIGIT, HEX = "[0-9]", "[0-9a-f]"
DATE = (f'[1-9] {DIGIT}{{3}} "-" (("0" [13578] | "10" | "12") "-" ("0" [1-9] | [12] {DIGIT} | "3" [01])'
        f' | ("0" [469] | "11") "-" ("0" [1-9] | [12] {DIGIT} | "30") | "02-" ("0" [1-9] | "1" {DIGIT} | "2" [0-8]))')
HOUR = f'([01] {DIGIT} | "2" [0-3]) ":" [0-5] {DIGIT}'
TIME = f'{HOUR} ":" [0-5] {DIGIT} ("." {DIGIT}{{1,6}})? ("Z" | [+-] {HOUR})'
FORMATS = {"date": DATE, "time": TIME, "date-time": f'{DATE} "T" {TIME}',
           "uuid": " \"-\" ".join(f"{HEX}{{{size}}}" for size in (8, 4, 4, 4, 12))}
QUOTE = '"\\""'
PLAIN = r'[^"\\\x00-\x1F\x7F]'
COMMA = '"," space'
RULES = {
    "space": '" "?',
    "char": PLAIN + r' | "\\" ["\\/bfnrt]',
    "string": f"{QUOTE} char* {QUOTE}",
    "integer": f'"0" | "-"? [1-9] {DIGIT}{{0,14}}',
    "number": f'("0" | "-"? [1-9] {DIGIT}{{0,14}} | "-"? "0") ("." {DIGIT}{{1,15}})? ([eE] [+-]? {DIGIT}{{1,2}})?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "pair": 'string ":" space value',
    "object": f'"{{" (pair ({COMMA} pair)*)? "}}"',
    "array": f'"[" (value ({COMMA} value)*)? "]"',
    "value": "object | array | string | number | boolean | null"}
"""Rules that every grammar has."""


def checked(given: object, name: str) -> object:
    """A schema given as a value or as JSON text; raises TsotsallmError, naming it, where it is too large or too deep."""
    try:
        text = given if isinstance(given, str) else json.dumps(given)
        if len(text) > MOST_CHARACTERS:
            raise TsotsallmError(f"{name} has {len(text)} characters; a schema takes at most {MOST_CHARACTERS}: shorten it")
        content = parse_json(text, name, TsotsallmError)
        json.dumps(content, allow_nan=False)
    except (ValueError, RecursionError):
        raise TsotsallmError(f"{name} is not a JSON schema: it holds a number that JSON does not have, or nests too deeply; "
                             "correct it") from None
    return content


def grammar_of(schema: object) -> str:
    """The grammar of a schema's values, in GBNF; raises TsotsallmError, naming what a grammar cannot express."""
    made = _Grammar(schema)
    try:
        root = made.of(schema, "the schema")
    except RecursionError:
        raise TsotsallmError("the schema nests too deeply, or its names are too long; split it") from None
    rules = {"root": root} | RULES | made.rules
    return "\n".join(f"{name} ::= {body}" for name, body in rules.items())


class _Grammar:
    """The rules of one schema, made from the outermost inwards."""

    def __init__(self, schema: object) -> None:
        self.schema = schema
        self.rules: dict[str, str] = {}
        self.by_reference: dict[object, str] = {}
        self.characters = 0

    def rule(self, body: str) -> str:
        self.characters += len(body) + 8
        if self.characters > MOST_GRAMMAR:
            raise TsotsallmError(f"the schema becomes a grammar of more than {MOST_GRAMMAR} characters; make it smaller")
        name = f"r{len(self.rules)}"
        self.rules[name] = body
        return name

    def of(self, schema: object, where: str) -> str:
        """The name of a rule for a schema; `where` is its place, for messages."""
        if schema is True:
            return "value"
        if not isinstance(schema, dict):
            raise TsotsallmError(f"{where} is {quoted(schema)}; give a schema that some value fits")
        keys = {key: value for key, value in schema.items()
                if key not in ANNOTATIONS and (key, value) != ("uniqueItems", False)}
        if not keys:
            return "value"
        for key in ("$ref", "allOf", "anyOf", "oneOf"):
            if key in keys:
                _only(keys, {key}, where)
                return self.reference(keys[key], where) if key == "$ref" else self.choice(key, keys[key], where)
        if "enum" in keys or "const" in keys:
            return self.constants(keys, where)
        types = self.types(keys, where)
        _only(keys, {"type", *(key for kind in types for key in KEYWORDS[kind])}, where)
        return self.union([getattr(self, f"{kind}_")(keys, where) for kind in types])

    def union(self, names: Sequence[str]) -> str:
        return names[0] if len(names) == 1 else self.rule(" | ".join(names))

    def types(self, keys: Mapping[str, object], where: str) -> list[str]:
        """The types of a schema; without `type`, the one that its keywords belong to."""
        given = keys.get("type", [kind for kind in ("object", "array", "string") if set(keys) <= set(KEYWORDS[kind])][:1])
        types = [given] if isinstance(given, str) else given
        if not isinstance(types, list) or any(kind not in KEYWORDS for kind in types if isinstance(kind, str)) or not all(
                isinstance(kind, str) for kind in types):
            raise TsotsallmError(f"type of {where} is {quoted(given)}; there are {', '.join(KEYWORDS)}")
        if not types:
            raise TsotsallmError(f"{where} has {quoted(next(iter(keys)))}, which is not supported, at least not without a "
                                 "type; give the type, or leave it out")
        return list(dict.fromkeys(types))

    def reference(self, pointer: object, where: str) -> str:
        """The rule of a schema elsewhere in the document, which may contain itself."""
        if pointer not in self.by_reference:
            target = self.followed({"$ref": pointer}, where)
            name = self.by_reference[pointer] = self.rule("")
            self.rules[name] = self.of(target, quoted(pointer))
        return self.by_reference[pointer]

    def followed(self, schema: object, where: str) -> object:
        """The schema that a schema with only a $ref stands for."""
        seen: list[object] = []
        while isinstance(schema, dict) and set(schema) - ANNOTATIONS == {"$ref"}:
            if schema["$ref"] in seen:
                raise TsotsallmError(f"$ref of {where} leads to itself: {quoted(seen[0])}; refer to a schema with content")
            seen.append(schema["$ref"])
            schema = self.resolved(seen[-1], where)
        return schema

    def resolved(self, pointer: object, where: str) -> object:
        target = self.schema
        if not isinstance(pointer, str) or not pointer.startswith("#"):
            raise TsotsallmError(f"$ref of {where} is {quoted(pointer)}; only those within the schema are followed, such as "
                                 "#/$defs/name")
        for part in unquote(pointer[1:]).split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and part.isdecimal() and int(part) < len(target):
                target = target[int(part)]
            elif isinstance(target, dict) and part in target:
                target = target[part]
            else:
                raise TsotsallmError(f"$ref of {where} is {quoted(pointer)}, which the schema does not have; add it, or "
                                     "correct the reference")
        if pointer[1:2] not in ("", "/"):
            raise TsotsallmError(f"$ref of {where} is {quoted(pointer)}; anchors are not supported, use #/$defs/name")
        return target

    def choice(self, key: str, schemas: object, where: str) -> str:
        if not isinstance(schemas, list) or not schemas:
            raise TsotsallmError(f"{key} of {where} is {quoted(schemas)}; it takes a list of schemas")
        if key == "allOf" and len(schemas) > 1:
            raise TsotsallmError(f"allOf of {where} has {len(schemas)} schemas; only one is supported, so join them")
        if key == "oneOf" and not self.apart(schemas, where):
            raise TsotsallmError(f"oneOf of {where} has alternatives that the same value may fit; use anyOf")
        return self.union([self.of(schema, f"{where}.{key}[{place}]") for place, schema in enumerate(schemas)])

    def apart(self, schemas: Sequence[object], where: str) -> bool:
        """Whether no value fits two of them: their types differ, or the constant of a property that they require does."""
        followed = [schema if isinstance(schema, dict) else {} for schema in (self.followed(schema, where)
                                                                              for schema in schemas)]
        kinds = ["number" if schema.get("type") == "integer" else schema.get("type") for schema in followed]
        if (all(isinstance(kind, str) for kind in kinds) and len(set(kinds)) == len(kinds)) or _differ(
                map(_values, followed)):
            return True
        names = followed[0].get("properties")
        return isinstance(names, dict) and any(_differ(_constants(schema, name) for schema in followed) for name in names)

    def constants(self, keys: Mapping[str, object], where: str) -> str:
        _only(keys, {"enum", "const", "type"}, where)
        values = keys.get("enum", [keys.get("const")])
        if not isinstance(values, list):
            raise TsotsallmError(f"enum of {where} is {quoted(values)}; it takes a list of values")
        fitting = [value for value in values if ("const" not in keys or _same(value, keys["const"])) and (
            "type" not in keys or any(_is(value, kind) for kind in self.types({"type": keys["type"]}, where)))]
        if not fitting:
            raise TsotsallmError(f"{where} has no value: none of its enum or const fits its type; correct one of them")
        return self.rule(" | ".join(_literal(_json(value)) for value in fitting))

    def object_(self, keys: Mapping[str, object], where: str) -> str:
        declared, required = keys.get("properties", {}), keys.get("required", [])
        if not isinstance(declared, dict) or not isinstance(required, list) or not all(
                isinstance(name, str) for name in required):
            raise TsotsallmError(f"properties and required of {where} take an object of schemas and a list of names")
        others = keys.get("additionalProperties", not declared)
        named = declared | {name: keys.get("additionalProperties", True) for name in required if name not in declared}
        low, high = _counts(keys, "minProperties", "maxProperties", where)
        fixed = sum(name in required for name in named)
        bounded = high is not None and (high < len(named) or others is not False)
        if low > max(fixed, 0 if named else 1) or (named and bounded):
            raise TsotsallmError(f"minProperties and maxProperties of {where} are not supported beside its properties, nor "
                                 "is a minimum over 1; list in required the properties that it must have")
        if others is False:
            after = dict.fromkeys((False, True), '""')
        else:
            pair = self.rule(f'{self.rule(_key_unlike(named))} ":" space {self.of(others, f"{where}.additionalProperties")}')
            after = {True: self.rule(_repeated(f"({COMMA} {pair})", 0, None)), False: self.rule(_listed(pair, low, high))}
        for name, schema in reversed(named.items()):
            value = self.rule(f'{_literal(_json(name))} ":" space {self.of(schema, f"{where}.{quoted(name)}")}')
            bodies = {started: f"{COMMA + ' ' if started else ''}{value} {after[True]}" for started in after}
            after = {started: self.rule(body if name in required else f"{body} | {after[started]}")
                     for started, body in bodies.items()}
        return self.rule(f'"{{" {after[False]} "}}"')

    def array_(self, keys: Mapping[str, object], where: str) -> str:
        first = keys.get("prefixItems", [])
        if not isinstance(first, list):
            raise TsotsallmError(f"prefixItems of {where} is {quoted(first)}; it takes a list of schemas")
        low, high = _counts(keys, "minItems", "maxItems", where)
        rest = keys.get("items", low > len(first) or not first)
        if high is not None and high < len(first):
            raise TsotsallmError(f"maxItems of {where} is {high}, less than its {len(first)} prefixItems; leave some out")
        if rest is False and low > len(first):
            raise TsotsallmError(f"minItems of {where} is {low}, more than the items that it may have; lower it, or allow "
                                 "items")
        most = 0 if rest is False else None if high is None else high - len(first)
        item = "" if most == 0 else self.of(rest, f"{where}.items")
        low = max(low - len(first), 0)
        if not first:
            return self.rule(f'"[" {_listed(item, low, most)} "]"')
        fixed = f" {COMMA} ".join(self.of(schema, f"{where}.prefixItems[{place}]") for place, schema in enumerate(first))
        more = "" if most == 0 else _repeated(f"({COMMA} {item})", low, most)
        return self.rule(f'"[" {fixed} {more} "]"')

    def string_(self, keys: Mapping[str, object], where: str) -> str:
        low, high = _counts(keys, "minLength", "maxLength", where)
        if "format" in keys:
            if keys["format"] not in FORMATS or "minLength" in keys or "maxLength" in keys:
                raise TsotsallmError(f"format of {where} is {quoted(keys['format'])}; supported are {', '.join(FORMATS)}, "
                                     "without minLength and maxLength")
            return self.rule(f"{QUOTE} {FORMATS[keys['format']]} {QUOTE}")
        return "string" if (low, high) == (0, None) else self.rule(f"{QUOTE} {_repeated('char', low, high)} {QUOTE}")

    def integer_(self, keys: Mapping[str, object], where: str) -> str:
        bounds: dict[str, float] = {}
        for key in KEYWORDS["integer"]:
            value = keys.get(key, 0)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TsotsallmError(f"{key} of {where} is {quoted(value)}; it takes a number")
            if key in keys:
                bounds[key] = value
        if not bounds:
            return "integer"
        if "number" in self.types(keys, where):
            raise TsotsallmError(f"{next(iter(bounds))} of {where} is supported only for integers; give the type integer")
        low = max([-LARGEST, *(math.ceil(bounds[key]) for key in ("minimum",) if key in bounds),
                   *(math.floor(bounds[key]) + 1 for key in ("exclusiveMinimum",) if key in bounds)])
        high = min([LARGEST, *(math.floor(bounds[key]) for key in ("maximum",) if key in bounds),
                    *(math.ceil(bounds[key]) - 1 for key in ("exclusiveMaximum",) if key in bounds)])
        if low > high:
            raise TsotsallmError(f"{where} has no value: no integer of at most 15 digits is within its bounds; widen them")
        parts = [f'"-" ({_between(max(1, -high), -low)})'] if low < 0 else []
        return self.rule(" | ".join([*parts, *([_between(max(low, 0), high)] if high >= 0 else [])]))

    def number_(self, _keys: Mapping[str, object], _where: str) -> str:
        return "number"

    def boolean_(self, _keys: Mapping[str, object], _where: str) -> str:
        return "boolean"

    def null_(self, _keys: Mapping[str, object], _where: str) -> str:
        return "null"


def _only(keys: Iterable[str], known: set[str], where: str) -> None:
    """Raise TsotsallmError where a schema has a keyword that answers would not follow."""
    wrong = next((key for key in keys if key not in known), None)
    if wrong is not None:
        raise TsotsallmError(f"{quoted(wrong)} of {where} is not supported (here there can be {', '.join(sorted(known))}); "
                             "leave it out, or give a grammar")


def _counts(keys: Mapping[str, object], least: str, most: str, where: str) -> tuple[int, int | None]:
    """The bounds of a length or count, checked; no upper one where there is none."""
    counts = []
    for key in (least, most):
        value = keys.get(key, 0)
        if not isinstance(value, int | float) or isinstance(value, bool) or value != int(value) or not (
                0 <= value <= MOST_REPEATS):
            raise TsotsallmError(f"{key} of {where} is {quoted(value)}; it takes whole numbers from 0 to {MOST_REPEATS}")
        counts.append(int(value))
    low, high = counts[0], counts[1] if most in keys else None
    if high is not None and high < low:
        raise TsotsallmError(f"{where} has no value: its {least} {low} is more than its {most} {high}; correct one of them")
    return low, high


def _repeated(body: str, low: int, high: int | None) -> str:
    if high == 0:
        return '""'
    return f"{body}*" if (low, high) == (0, None) else f"{body}{{{low},{'' if high is None else high}}}"


def _listed(item: str, low: int, high: int | None) -> str:
    """Items separated by commas."""
    if high == 0:
        return '""'
    several = f"{item} {_repeated(f'({COMMA} {item})', max(low - 1, 0), None if high is None else high - 1)}"
    return several if low else f"({several})?"


def _between(low: int, high: int) -> str:
    """Alternatives for the whole numbers from `low` (at least 0) to `high`."""
    return " | ".join(_digits(str(max(low, 10 ** (size - 1) if size > 1 else 0)), str(min(high, 10 ** size - 1)))
                      for size in range(len(str(low)), len(str(high)) + 1))


def _digits(low: str, high: str) -> str:
    """Alternatives for the numbers from `low` to `high`, which have the same number of digits."""
    if low == high:
        return f'"{low}"'
    if low[0] == high[0]:
        return f'"{low[0]}" ({_digits(low[1:], high[1:])})'
    rest = len(low) - 1
    any_rest = f" {DIGIT}{{{rest}}}" if rest else ""
    first, last = int(low[0]), int(high[0])
    parts = []
    if low[1:] != "0" * rest:
        parts.append(f'"{first}" ({_digits(low[1:], "9" * rest)})')
        first += 1
    if high[1:] != "9" * rest:
        parts.append(f'"{last}" ({_digits("0" * rest, high[1:])})')
        last -= 1
    return " | ".join([*parts, *([f"[{first}-{last}]{any_rest}"] if first <= last else [])])


_Letters: TypeAlias = "dict[str, _Letters]"
"""Letter -> the letters after it, as a tree of names; "" where a name ends."""


def _key_unlike(names: Iterable[str]) -> str:
    """A quoted key that is none of these names; escapes are excluded, since they could spell one of the names."""
    tree: _Letters = {}
    for name in names:
        if _json(name) == f'"{name}"':
            place = tree
            for letter in name:
                place = place.setdefault(letter, {})
            place[""] = {}

    def rest(place: _Letters) -> str:
        letters = [letter for letter in place if letter]
        others = f"{PLAIN[:-1]}{''.join(map(_in_class, letters))}] {PLAIN}*"
        return " | ".join([others, *([] if "" in place else ['""']),
                           *(f"{_literal(letter)} ({rest(place[letter])})" for letter in letters)])

    return f"{QUOTE} ({rest(tree)}) {QUOTE}" if tree else f"{QUOTE} {PLAIN}* {QUOTE}"


def _in_class(letter: str) -> str:
    return f"\\U{ord(letter):08X}"


def _constants(schema: Mapping[str, object], name: str) -> list[object] | None:
    """The values that a required property may have, or None where they are not listed."""
    properties, required = schema.get("properties"), schema.get("required")
    declared = properties.get(name) if isinstance(properties, dict) else None
    if not isinstance(declared, dict) or not isinstance(required, list) or name not in required:
        return None
    return _values(declared)


def _values(schema: Mapping[str, object]) -> list[object] | None:
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return values if isinstance(values, list) else None


def _differ(several: Iterable[list[object] | None]) -> bool:
    """Whether no two lists share a value."""
    every = list(several)
    values = [_json(value) for listed in every for value in listed or []]
    return None not in every and len(set(values)) == len(values)


def _same(one: object, other: object) -> bool:
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _is(value: object, kind: str) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return {"object": isinstance(value, dict), "array": isinstance(value, list), "string": isinstance(value, str),
            "boolean": isinstance(value, bool), "null": value is None,
            "number": whole or isinstance(value, float),
            "integer": whole or (isinstance(value, float) and value.is_integer())}[kind]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(", ", ": "))


def _literal(text: str) -> str:
    """A text as a literal of GBNF; JSON has no control characters other than those that it escapes itself."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
