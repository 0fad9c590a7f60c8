"""Damage to JSON, YAML, tables, graphs, templates and tokenizers."""

from __future__ import annotations

import json
import random
import re

import yaml

from tests.fuzz.plain import (
    NUMBERS,
    TEXTS,
    VALUES,
    Damage,
    Impossible,
    Way,
    as_json,
    at,
    change_value,
    digits,
    places_in,
    short,
)

# -- JSON and YAML -------------------------------------------------------------------------------------------------------


def _json(content: bytes, rng: random.Random, done: Damage) -> bytes:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise Impossible from None
    return as_json(change_value(value, rng, done), rng.choice((None, 2)))


def _doubled_key(content: bytes, rng: random.Random, done: Damage) -> bytes:
    """The same key twice in one object: of two readers each may take another."""
    found = list(re.finditer(rb'"([a-z_]+)":', content[:100_000]))
    if not found:
        raise Impossible
    one = rng.choice(found)
    done.steps.append(f"the key {one[1].decode()} twice")
    return content[:one.start()] + one[0] + digits(rng.choice(NUMBERS)).encode() + b", " + content[one.start():]


def _json_line(content: bytes, rng: random.Random, done: Damage) -> bytes:
    lines = content.split(b"\n")
    place = rng.randrange(len(lines))
    lines[place] = _json(lines[place], rng, done)
    return b"\n".join(lines)


def _yaml(content: bytes, rng: random.Random, done: Damage) -> bytes:
    try:
        value = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise Impossible from None
    changed = change_value(value, rng, done)
    return as_json(changed)                                 # JSON is YAML, and holds what yaml.dump would refuse


YAML_TRICKS = (b"a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
               b"d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e,*e]\n",
               b"&a [*a]", b"&a {a: *a}", b"!!python/object/apply:os.system ['touch x']", b"!!binary 'x'",
               b"!!timestamp 'x'",
               b"2001-13-45", b"? [a]\n: b", b"<<: 7", b"<<: [{a: 1}]", b"a: b: c", b"%YAML 9.9\n---\n", b"---\n---\n",
               b"\t- a",
               b"0o7", b"0x", b"1_000", b"1:60", b".inf", b"-.NaN", b"~", b"!!set {a}", b"!!int 'x'", b"!!float ''",
               b"- {quantize: &q {method: rtn, bits: *q}}", b"{? {a: 1} : 2}", b"*nobody", b"=")


def _yaml_trick(content: bytes, rng: random.Random, done: Damage) -> bytes:
    trick = rng.choice(YAML_TRICKS)
    done.steps.append(f"YAML {trick[:30]!r}")
    way = rng.randrange(4)
    if way == 0:
        return trick
    if way == 1:
        return trick + b"\n" + content
    if way == 2:
        return content + b"\n" + trick
    lines = content.split(b"\n")
    place = rng.randrange(len(lines))
    head, colon, _ = lines[place].partition(b":")
    lines[place] = head + colon + b" " + trick
    return b"\n".join(lines)


# -- tables, graphs, texts, templates ------------------------------------------------------------------------------------

CELLS = (*TEXTS, '"', '""', "'", ",", ";", "\t", "a,b", '"a', 'a"', "=cmd|' /C calc'!A0", "15 April, 2023", "1e999", "N/A",
         "\r", "'" * 300)


def _cell(content: bytes, rng: random.Random, done: Damage) -> bytes:
    lines = content.decode("utf-8", "surrogateescape").split("\n")
    place = rng.randrange(len(lines))
    cells = lines[place].split(",")
    cell = rng.randrange(len(cells))
    cells[cell] = rng.choice((*CELLS, "x" * 1_500_000))
    lines[place] = ",".join(cells)
    done.steps.append(f"cell {cell} of line {place} is {short(cells[cell])}")
    return "\n".join(lines).encode("utf-8", "replace" if rng.random() < 0.5 else "surrogatepass")


def _rows(content: bytes, rng: random.Random, done: Damage) -> bytes:
    lines = content.split(b"\n")
    way = rng.choice(("wide", "ragged", "many", "none", "sep", "semicolons", "tabs", "header", "empty lines", "one line",
                      "quotes"))
    done.steps.append(f"rows: {way}")
    if way == "wide":
        return b"\n".join(line + b",x" * rng.choice((1, 300, 20_000)) for line in lines)
    if way == "ragged":
        return b"\n".join(line + b",x" * rng.randrange(5) for line in lines)
    if way == "many":
        return content + b"\n".join(lines[1:]) * rng.choice((10, 200))
    if way == "none":
        return lines[0]
    if way == "sep":
        return rng.choice((b"sep=;\n", b"sep=\n", b"sep=ab\n", b"#\n", b"\n\n")) + content
    if way in ("semicolons", "tabs"):
        return content.replace(b",", b";" if way == "semicolons" else b"\t")
    if way == "header":
        return b"\n".join(lines[1:])
    if way == "empty lines":
        return b"\n\n\n".join(lines)
    return content.replace(b"\n", b"\r") if way == "one line" else content.replace(b",", b'","')


STATEMENTS = (b"<http://x y> <http://p> <http://o> .", b"<http://x> <http://p> <http://o#a#b> .",
              b"<http://x> <http://p> <%> .",
              b'<http://x> <http://p> "a"@zh-classical .',
              b'<http://x> <http://p> "a"^^<http://www.w3.org/1999/02/22-rdf-syntax-ns#langString> .',
              b'<http://x> <http://p> "\\ud800" .', b"<http://x> <http://p> <http://\"> .", b"<http://x> <http://p>",
              b'"a" "b" "c" .',
              b"@prefix : <http://y/> .", b"@base <http://z/> .", b"PREFIX a: <b>", b"_:a _:a _:a .", b"<a> <b> <c> .",
              b"[] [] [] .",
              b'<http://x> <http://p> """a', b"<http://x> a <http://x> .",
              b'<http://x> <http://www.w3.org/2000/01/rdf-schema#label> "" .',
              b"<http://x> <http://p> 1e999 .", b"<http://x> <http://p> << <a> <b> <c> >> .", b"<> <> <> .",
              b'<http://x> <http://p> "1"^^<http://www.w3.org/2001/XMLSchema#integer . ', b"=>", b"{ <a> <b> <c> . }")


def _statement(content: bytes, rng: random.Random, done: Damage) -> bytes:
    lines = content.split(b"\n")
    times = rng.choice((1, 1, 1, 30))
    statement = rng.choice(STATEMENTS)
    for _ in range(times):
        lines.insert(rng.randrange(len(lines) + 1), statement)
    done.steps.append(f"{times} times {statement[:40]!r}")
    return b"\n".join(lines)


def _line(content: bytes, rng: random.Random, done: Damage) -> bytes:
    lines = content.split(b"\n")
    place = rng.randrange(len(lines))
    way = rng.choice(("delete", "double", "swap", "join", "reverse", "giant"))
    other = rng.randrange(len(lines))
    if way == "delete":
        del lines[place]
    elif way == "double":
        lines.insert(other, lines[place])
    elif way == "swap":
        lines[place], lines[other] = lines[other], lines[place]
    elif way == "join":
        lines[place:place + 2] = [b"".join(lines[place:place + 2])]
    elif way == "reverse":
        lines[place] = lines[place][::-1]
    else:
        lines[place] = lines[place] * (300_000 // (len(lines[place]) + 1))
    done.steps.append(f"line {place}: {way}")
    return b"\n".join(lines)


TRICKS = ("{{", "{% for m in messages %}", "{% endfor %}", "{{ raise_exception('no ' + messages[0]['role']) }}",
          "{{ nobody.x }}",
          "{{ 'x' * 999999999 }}", "{{ 1/0 }}", "{{ messages[99].content }}", "{{ ().__class__.__base__.__subclasses__() }}",
          "{% for i in range(999999999) %}x{% endfor %}", "{% include 'x' %}", "{% import '/etc/passwd' as x %}",
          "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ messages | tojson | length }}",
          "{{ cycler.__init__.__globals__ }}",
          "{{ strftime_now('%Y' * 999) }}", "{% set ns = namespace(a=1) %}", "{{ '%999999999d' % 1 }}",
          "{{ 'a'.ljust(999999999) }}",
          "{{ messages.append(1) }}", "{{ self }}", "{{ 10 ** 99999999 }}", "{{ [1] * 99999999 }}", "{% raw %}",
          "{{ '\ud800' }}",
          "{{ lipsum(n=9999) }}", "{% break %}", "{{ (1,2)|map('nobody')|list }}", "{{ \"{:>999999999}\".format(1) }}")


def template_trick(text: str, rng: random.Random) -> str:
    """A template with something in it that should not be there."""
    trick = rng.choice(TRICKS)
    place = rng.randrange(len(text) + 1)
    return trick if rng.random() < 0.2 else text[:place] + trick + text[place:]


def _template(content: bytes, rng: random.Random, done: Damage) -> bytes:
    changed = template_trick(content.decode("utf-8", "replace"), rng)
    done.steps.append("a trick in the template")
    return changed.encode("utf-8", "surrogatepass")


def _json_template(content: bytes, rng: random.Random, done: Damage) -> bytes:
    """A trick in a template that stands in JSON or YAML."""
    try:
        value = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise Impossible from None
    texts = [place for place in places_in(value) if isinstance(at(value, place), str) and "{" in at(value, place)]
    if not texts:
        raise Impossible
    *above, key = rng.choice(texts)
    holder = at(value, tuple(above))
    holder[key] = template_trick(holder[key], rng)
    done.steps.append(f"a trick in {key}")
    return as_json(value)


def _pattern(content: bytes, rng: random.Random, done: Damage) -> bytes:
    """A tokenizer whose parts do not belong together, or take for ever."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise Impossible from None
    if not isinstance(value, dict) or not isinstance(value.get("model"), dict):
        raise Impossible
    blown = {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": letter}, "content": letter * 50}
                                                 for letter in "aeiou" * 3]}
    name, part = rng.choice((
        ("normalizer", blown), ("normalizer", {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "aa"}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}), ("normalizer", {"type": "Nobody"}),
        ("normalizer", {"type": "Prepend", "prepend": "x" * 100_000}), ("normalizer", {"type": "BertNormalizer"}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Removed", "invert": True}),
        ("pre_tokenizer", {"type": "Punctuation", "behavior": "Removed"}), ("pre_tokenizer", None), ("decoder", None),
        ("decoder", {"type": "Replace", "pattern": {"String": ""}, "content": "x"}), ("decoder", {"type": "CTC"}),
        ("post_processor", {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "nobody", "type_id": 0}}],
                            "pair": [],
                            "special_tokens": {}}),
        ("truncation", {"max_length": 0, "strategy": "LongestFirst", "stride": 9, "direction": "Right"}),
        ("padding", {"strategy": {"Fixed": 100_000}, "direction": "Right", "pad_to_multiple_of": 0, "pad_id": 9,
                     "pad_type_id": 0,
                     "pad_token": "x"}),
        ("added_tokens", [{"id": 2**31, "content": "a", "special": True, "single_word": False, "lstrip": False,
                           "rstrip": False,
                           "normalized": False}]),
        ("added_tokens", [{"id": 0, "content": "", "special": False, "single_word": True, "lstrip": True, "rstrip": True,
                           "normalized": True}])))
    if rng.random() < 0.3:
        model = value["model"]
        name = rng.choice(sorted(model))
        part = rng.choice((*VALUES, "BPE", "Unigram", "WordPiece", "WordLevel", [["a", 1]], {"a": 0, "b": 0}, ["a b c"],
                           [["a", "b"]]))
        model[name] = part
    else:
        value[name] = part
    done.steps.append(f"{name} is {short(part)}")
    return as_json(value)


BY_FORM: dict[str, tuple[Way, ...]] = {
    "json": (_json, _json, _json, _json, _doubled_key, _json_template),
    "tokenizer": (_json, _json, _pattern, _pattern),
    "jsonl": (_json_line, _json_line, _line),
    "yaml": (_yaml, _yaml, _yaml_trick, _json_template, _line),
    "csv": (_cell, _cell, _rows, _line),
    "rdf": (_statement, _statement, _line),
    "template": (_template, _template),
    "text": (_line,),
}
