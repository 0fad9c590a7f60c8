"""JSON schemas as grammars: what a grammar accepts is what jsonschema accepts; what it cannot hold is refused by name.

The grammar is run as a regular expression with recursion, jsonschema is the oracle.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

import tsotsallm
from tsotsallm.engine.interface import Piece, Question, Sampling
from tsotsallm.engine.llama import Llama
from tsotsallm.errors import TsotsallmError
from tsotsallm.serve.schema import RULES, checked, grammar_of

regex = pytest.importorskip("regex")
jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is in the extra [dev]")

PARTS = regex.compile(r'(?P<text>"(?:\\.|[^"\\])*")|(?P<letters>\[(?:\\.|[^\]\\])*\])|(?P<name>[a-z][a-z0-9]*)'
                      r'|(?P<space>\s+)|(?P<rest>[|()*+?]|\{[0-9,]+\})')


def expression(grammar: str) -> Any:
    """GBNF as a regular expression of the `regex` module."""
    rules = []
    for line in grammar.split("\n"):
        name, body = line.split(" ::= ", 1)
        made, place = "", 0
        while place < len(body):
            part = PARTS.match(body, place)
            assert part is not None, body[place:]
            kind, text = part.lastgroup, part.group()
            if kind == "text":
                plain = regex.sub(r"\\.", lambda found: {"\\\\": "\\", '\\"': '"'}[found.group()], text[1:-1])
                made += f"(?:{regex.escape(plain, literal_spaces=True)})"
            elif kind == "name":
                made += f"(?&{text})"
            elif kind != "space":
                made += text
            place = part.end()
        rules.append(f"(?P<{name}>{made})")
    return regex.compile(f"(?(DEFINE){''.join(rules)})(?&root)")


def accepts(schema: Any) -> Any:
    found = expression(grammar_of(checked(schema, "schema")))
    return lambda text: found.fullmatch(text, timeout=5) is not None


VALUES = [None, True, False, 0, 1, 2, 3, -1, 7, 10, 42, 99, 100, 150, 151, 1.5, -0.25, 1e20, "", "a", "ab", "abc", "é🦙",
    'q"\\/\n', "x" * 6,
          "2024-02-28", "2024-02-30", "2023-12-31", "2023-11-31", [], [1], [1, 2], [1, "a"], ["a", 1], ["a"], [[1]], [1, 2,
          3],
          {}, {"a": 1}, {"a": "x"}, {"b": 2}, {"a": 1, "b": 2}, {"a": 1, "b": "y"}, {"a": 1, "c": 3}, {"ab": 1}, {"a": 1,
          "ab": True},
          {"a": {"a": 1}}, {"kind": "cat", "n": 1}, {"kind": "dog", "n": 1}, {"kind": "dog"}, {"next": None},
          {"next": {"next": None}},
          {"next": 5}]
EXACT: list[Any] = [
    True, {"type": "string"}, {"type": "boolean"}, {"type": "null"}, {"type": ["string", "null"]},
    {"type": "integer", "minimum": -5, "maximum": 150}, {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 100},
    {"type": "integer", "minimum": 1.5}, {"type": "integer", "maximum": -1}, {"type": "integer"},
    {"type": "string", "minLength": 2, "maxLength": 3}, {"type": "string", "minLength": 1}, {"type": "string",
    "maxLength": 0},
    {"enum": ["a", 1, None, {"a": 1}, "é🦙", 'q"\\/\n']}, {"const": [1, "a"]}, {"type": "string", "enum": ["a", 1, "ab"]},
    {"type": "array"}, {"type": "array", "items": {"type": "integer"}}, {"type": "array", "minItems": 1, "maxItems": 2},
    {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}, {"type": "array", "maxItems": 0},
    {"type": "object"}, {"type": "object", "additionalProperties": {"type": "integer"}}, {"type": "object",
    "maxProperties": 1},
    {"type": "object", "minProperties": 1}, {"type": "object", "maxProperties": 0},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False},
    {"type": "object", "properties": {"a": {}, "b": {"type": "integer"}}, "required": ["b"], "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {}}, "required": ["a"], "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": True},
    {"type": "object", "properties": {"a": {}}, "required": ["a"], "additionalProperties": {"type": "boolean"}},
    {"type": "object", "required": ["a"]},
    {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 2}]}, {"allOf": [{"type": "boolean"}]},
    {"oneOf": [{"type": "integer"}, {"type": "string"}]}, {"oneOf": [{"const": 1}, {"const": "a"}]},
    {"oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}], "discriminator": {"propertyName": "kind"}, "$defs": {
        name: {"type": "object", "properties": {"kind": {"const": name}, "n": {"type": "integer"}}, "required": ["kind"],
               "additionalProperties": False} for name in ("cat", "dog")}},
    {"$ref": "#/$defs/node", "$defs": {"node": {"type": "object", "properties": {"next": {"anyOf": [
        {"$ref": "#/$defs/node"}, {"type": "null"}]}}, "required": ["next"], "additionalProperties": False}}},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False, "minItems": 2},
    {"type": "array", "prefixItems": [{"type": "integer"}], "items": {"type": "integer"}, "minItems": 1},
    {"title": "T", "description": "d", "default": 1, "examples": [1], "type": "number", "uniqueItems": False}]


def valid(schema: Any, value: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).is_valid(value))


@pytest.mark.parametrize("schema", EXACT, ids=lambda one: json.dumps(one)[:60])
def test_a_grammar_accepts_what_its_schema_accepts(schema: Any) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    accepted = accepts(schema)
    for value in VALUES:
        if value == 1e20 and schema is not True:       # written with 21 digits, more than grammars have
            continue
        for separators in ((",", ":"), (", ", ": ")):
            text = json.dumps(value, ensure_ascii=False, separators=separators).replace("1e+20", "1e20")
            if isinstance(schema, dict) and ({"enum", "const"} & set(schema)) and separators[0] == ",":
                continue                                # constants are spelled in one way
            assert accepted(text) == valid(schema, value), text
        assert not accepted(json.dumps(value) + "x")


def test_keys_of_others_are_not_those_declared() -> None:
    accepted = accepts({"type": "object", "properties": {"ab": {"type": "integer"}, "a-]^\\": {"type": "integer"}, "é": {}},
                        "additionalProperties": {"type": "string"}})
    for text, right in (('{"ab":1}', True), ('{"ab":"x"}', False), ('{"\\u0061b":"x"}', False), ('{"a":"x"}', True),
                        ('{"abc":"x"}', True), ('{"b":"x","x":"y"}', True), ('{"ab":1,"q":"y"}', True), ('{"q":"y","ab":1}',
                        False),
                        ('{"é":1,"ê":"x"}', True), ('{"]":"x","-":"x","^":"x"}', True), ('{"":"x"}', True)):
        assert accepted(text) == right, text


def test_whole_numbers_in_all_ranges() -> None:
    for low, high in itertools.combinations((-1000, -101, -100, -99, -10, -9, -1, 0, 1, 5, 9, 10, 11, 99, 100, 101, 999,
        1000), 2):
        accepted = accepts({"type": "integer", "minimum": low, "maximum": high})
        for value in {low - 1, low, low + 1, (low + high) // 2, high - 1, high, high + 1, 0, -low, -high}:
            assert accepted(str(value)) == (low <= value <= high), (low, high, value)
        assert not accepted("-0")
        assert not accepted("01")


def test_dates_exist() -> None:
    accepted = accepts({"type": "string", "format": "date"})
    for month, day in itertools.product(range(14), range(33)):
        text = f"2023-{month:02}-{day:02}"
        assert accepted(f'"{text}"') == valid({"format": "date"}, text), text
    accepted = accepts({"type": "string", "format": "date-time"})
    for text, right in (("2023-05-01T23:59:59Z", True), ("2023-05-01T00:00:00.123+05:30", True), ("2023-05-01T24:00:00Z",
        False),
                        ("2023-05-01", False), ("2023-05-01T10:00:00", False)):
        assert accepted(f'"{text}"') == right, text
    assert accepts({"type": "string", "format": "uuid"})('"123e4567-e89b-12d3-a456-426614174000"')


@pytest.mark.parametrize(("schema", "message"), [
    (False, "some value fits"), (5, "some value fits"), ({"type": "foo"}, "foo"), ({"type": [5]}, "type"), ({"type": []},
    "type"),
    ({"not": {}}, "not"), ({"if": {}, "then": {}}, "if"), ({"strange": 1}, "strange"), ({"type": "string", "pattern": "a"},
    "pattern"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"), ({"type": "array", "contains": {}}, "contains"),
    ({"type": "object", "patternProperties": {"x": {}}}, "patternProperties"), ({"type": "object", "minProperties": 2},
    "minProperties"),
    ({"type": "object", "properties": {"a": {}}, "maxProperties": 0}, "maxProperties"),
    ({"type": "object", "nullable": True}, "nullable"),
    ({"type": "number", "minimum": 3}, "minimum"), ({"type": ["number", "integer"], "minimum": 3}, "minimum"),
    ({"minimum": 3}, "minimum"),
    ({"type": "integer", "multipleOf": 3}, "multipleOf"), ({"type": "integer", "minimum": 5, "maximum": 4}, "no value"),
    ({"type": "integer", "minimum": True}, "minimum"), ({"type": "integer", "minimum": 1e15}, "no value"),
    ({"type": "string", "format": "email"}, "email"), ({"type": "string", "maxLength": 5000}, "1000"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "no value"), ({"type": "string", "maxLength": -1}, "maxLength"),
    ({"type": "string", "maxLength": "3"}, "maxLength"), ({"$ref": "#/no"}, "#/no"), ({"$ref": "https://x.example/y"},
    "within"),
    ({"$ref": "#anchor"}, "anchor"), ({"$ref": "#"}, "itself"), ({"$ref": 5}, "5"),
    ({"$ref": "#/$defs/a", "minimum": 1, "$defs": {"a": {}}}, "minimum"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b", "maximum": 3}, "b": {"type": "integer"}}}, "maximum"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "itself"),
    ({"oneOf": [{"$ref": "#/$defs/a"}, {"type": "null"}], "$defs": {"a": {"$ref": "#/$defs/a"}}}, "itself"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "anyOf"), ({"oneOf": [{"type": "object"}, {"type": "object"}]},
    "anyOf"),
    ({"allOf": [{}, {}]}, "allOf"), ({"anyOf": []}, "anyOf"), ({"anyOf": [{}], "properties": {}}, "properties"),
    ({"enum": []}, "no value"), ({"enum": 5}, "enum"), ({"type": "integer", "enum": ["a"]}, "no value"),
    ({"enum": ["a"], "maxLength": 3}, "maxLength"),
    ({"type": "array", "items": [{}]}, "items"), ({"type": "array", "minItems": 2, "items": False}, "minItems"),
    ({"type": "array", "prefixItems": [{}, {}], "maxItems": 1}, "maxItems"),
    ({"type": "object", "required": ["a"], "additionalProperties": False}, "'a'"),
    ({"type": "object", "properties": []}, "properties"), ({"type": "object", "required": [5]}, "required"),
    ({"type": "object", "properties": {"a": {"properties": {"b": {"not": {}}}}}}, "'a'.'b'")])
def test_what_cannot_be_kept_to_is_named(schema: Any, message: str) -> None:
    with pytest.raises(TsotsallmError) as found:
        grammar_of(checked(schema, "schema"))
    assert message in str(found.value)
    assert "\n" not in str(found.value)


def test_hostile_schemas_are_refused_quickly() -> None:
    deep: Any = {}
    for _ in range(90):
        deep = {"type": "array", "items": deep}
    assert accepts(deep)("[" * 90 + "1" + "]" * 90)
    chain = {"$ref": "#/$defs/d0", "$defs": {f"d{place}": {"type": "array", "items": {"$ref": f"#/$defs/d{place + 1}"}}
                                              for place in range(800)} | {"d800": {}}}
    spellings = ["".join(f"%{ord(letter):02X}" if bits >> place & 1 else letter for place, letter in enumerate("$defs/aaaa"))
                 for bits in range(1024)]
    spelled = {"type": "array", "prefixItems": [{"$ref": f"#/{one}"} for one in spellings], "$defs": {
        "aaaa": {"enum": ["x" * 700]}}}
    for schema, message in ((chain, "deeply"), (spelled, "characters"),
        ({"properties": {"x" * 3000: {}}, "additionalProperties": {}}, "names"),
                            ({"enum": ["x" * 70_000]}, "characters"), ('{"a":' * 101 + "1" + "}" * 101, "deeply"),
                            ('{"enum": [NaN]}', "number"), ('{"maximum": 1e999}', "number"), ('{"enum": ["\\ud800"]}',
                            "surrogate"),
                            ("{", "JSON"), ({"enum": [float("inf")]}, "number")):
        with pytest.raises(TsotsallmError) as found:
            grammar_of(checked(schema, "schema"))
        assert message in str(found.value), found.value


def test_every_rule_has_a_text() -> None:
    for name in RULES:
        assert expression("\n".join(f"{key} ::= {body}" for key, body in ({"root": name} | RULES).items())) is not None


def test_llama_cpp_keeps_to_every_grammar(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Drawn wildly, what it ends by itself fits the schema; what is cut is the beginning of something that would."""
    pytest.importorskip("xllamacpp", reason="xllamacpp is in the extra [llama]")
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    tsotsallm.to_gguf("embedded", path, dense="f16", verify=False)
    one, ended = Llama(path, threads=1), 0
    for place, schema in enumerate(EXACT):
        heard: list[str] = []

        def hear(piece: Piece, heard: list[str] = heard) -> bool:
            return bool(heard.append(piece.text))      # type: ignore[func-returns-value]

        how = Sampling(1.5, seed=place, grammar=grammar_of(schema))
        if one.speak(Question("Some JSON: ", 24, how), hear).finish == "stop":
            ended += 1
            assert valid(schema, json.loads("".join(heard))), (schema, heard)
    assert ended > len(EXACT) / 2
