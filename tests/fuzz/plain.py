"""Damage to bytes and to plain data: what every form of file has in common."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

DEEP = 100_000
SECRET = "a-password-of-somebody-else"
"""Stands in the files that links lead to; no message may show it."""

NUMBERS = (0, -1, 1, 2, 3, 7, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -2**31, -2**63,
           10**30,
           10**400, 0.0, -0.0, 0.5, 1e-45, 1e308, -1e308, float("nan"), float("inf"), float("-inf"))
TEXTS = ("", " ", "\0", "\n", "a\nb", "\u2028", "\u2029", "\ufeff", "\ud800", "x\udfff", "\u202e", "\x1b[31m", "\x85",
         "é" * 300,
         "x" * 100_000, "../../x", "/etc/passwd", "..", ".", "C:\\x", "%s%n%d", "{}", "{{7*7}}", "null", "NaN", "-1",
         "1e999",
         "True", "😀", "a̐éö̲", "<|endoftext|>", "<0x00>", "▁", "Ġ", "con", "~", "$HOME", "file:///etc/passwd", "[" * 2000)
VALUES = (None, True, False, [], {}, [[]], {"a": {}}, [None], [1, 2, 3], {"": ""}, *NUMBERS, *TEXTS)
SCRAPS = (b"\0", b"\xff", b"\xfe\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xe2\x80\xa8", b"\xc2\x85", b"\r",
          b"\r\n",
          b"\x1a", b"\x1b[2J", b"{", b"}", b"[", b"]", b'"', b"'", b",", b":", b"\\", b"\\ud800", b"\\u0000", b"NaN",
          b"1e999",
          b"-", b"<", b">", b"#", b"@", b"%", b"&a", b"*a", b"!!python/object/apply:os.system", b"\t", b"  ", b"|", b";",
          b"null",
          "\U0001f600".encode(), "ı".encode(), b"A" * 5000)

@dataclass
class Damage:
    """What was done to a file; `refused` says that no verb may take it for whole."""

    steps: list[str] = field(default_factory=list)
    refused: bool = False


Way = Callable[[bytes, random.Random, Damage], bytes]


class Impossible(Exception):
    """The content has no place for such a damage."""


# -- bytes ---------------------------------------------------------------------------------------------------------------


def _flip(content: bytes, rng: random.Random, done: Damage) -> bytes:
    if not content:
        return insert(content, rng, done)
    changed = bytearray(content)
    places = [rng.randrange(len(changed)) for _ in range(rng.choice((1, 1, 2, 8, 64)))]
    for place in places:
        changed[place] ^= 1 << rng.randrange(8)
    done.steps.append(f"bits flipped at {places[:4]}")
    return bytes(changed)


def _truncate(content: bytes, rng: random.Random, done: Damage) -> bytes:
    size = rng.choice((0, 1, 7, 8, 9, max(0, len(content) - 1), rng.randrange(len(content) + 1)))
    done.steps.append(f"cut to {size} bytes")
    return content[:size]


def _delete(content: bytes, rng: random.Random, done: Damage) -> bytes:
    start = rng.randrange(len(content) + 1)
    size = rng.choice((1, 4, 100, rng.randrange(len(content) + 1)))
    done.steps.append(f"{size} bytes deleted at {start}")
    return content[:start] + content[start + size:]


def _duplicate(content: bytes, rng: random.Random, done: Damage) -> bytes:
    start = rng.randrange(len(content) + 1)
    chunk = content[start:start + rng.choice((1, 16, 300, 5000))]
    times = rng.choice((1, 1, 2, 50))
    done.steps.append(f"{len(chunk)} bytes at {start} repeated {times} times")
    return content[:start] + chunk * times + content[start:]


def insert(content: bytes, rng: random.Random, done: Damage) -> bytes:
    start = rng.choice((0, len(content), rng.randrange(len(content) + 1)))
    scrap = rng.choice(SCRAPS)
    done.steps.append(f"{scrap[:20]!r} inserted at {start}")
    return content[:start] + scrap + content[start:]


def _noise(content: bytes, rng: random.Random, done: Damage) -> bytes:
    start = rng.randrange(len(content) + 1)
    noise = rng.randbytes(rng.choice((1, 8, 200)))
    done.steps.append(f"{len(noise)} bytes overwritten at {start}")
    return content[:start] + noise + content[start + len(noise):]


def _number(content: bytes, rng: random.Random, done: Damage) -> bytes:
    found = list(re.finditer(rb"-?\d+(\.\d+)?(e-?\d+)?", content[:200_000]))
    if not found:
        raise Impossible
    one, number = rng.choice(found), rng.choice(NUMBERS)
    done.steps.append(f"the number at {one.start()} is {short(number)}")
    return content[:one.start()] + digits(number).encode() + content[one.end():]


def _encoding(content: bytes, rng: random.Random, done: Damage) -> bytes:
    name = rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1"))
    done.steps.append(f"written as {name}")
    return content.decode("utf-8", "replace").encode(name, "replace")


def _brackets(content: bytes, rng: random.Random, done: Damage) -> bytes:
    opening = rng.choice((b"[", b'{"a":', b"(", b"{{", b"{% if 1 %}", b"- ", b"[ <x> "))
    start = rng.choice((0, rng.randrange(len(content) + 1)))
    done.steps.append(f"{DEEP} times {opening!r} at {start}")
    return content[:start] + opening * DEEP + content[start:]


BYTES: tuple[Way, ...] = (
    _flip, _flip, _truncate, _delete, _duplicate, insert, insert, _noise, _number, _encoding, _brackets)


# -- values of JSON and YAML ---------------------------------------------------------------------------------------------


def digits(number: Any) -> str:
    try:
        return json.dumps(number)
    except ValueError:                                      # Python writes no integer of more than 4300 digits
        return "1" + "0" * 4999


def short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else f"10**{len(str(value)) - 1}"
    return text if len(text) <= 40 else f"{text[:37]}..."


DEEPEST = 40
FARTHEST = 250
"""Levels that are written of a value that holds itself, as an alias in YAML may."""


def places_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all values below one; long lists by their ends, deep ones by their tops (YAML can hold itself)."""
    found = [path] if path else []
    if len(path) >= DEEPEST:
        return found
    if isinstance(value, dict):
        for key in value:
            found += places_in(value[key], (*path, key))
    elif isinstance(value, list):
        near = range(len(value)) if len(value) <= 40 else [0, 1, 2, len(value) // 2, len(value) - 1]
        for place in near:
            found += places_in(value[place], (*path, place))
    return found


def shallow(places: list[tuple[Any, ...]], rng: random.Random) -> tuple[Any, ...]:
    """One of the places, each depth alike: a vocabulary must not hide the other keys."""
    depth = rng.choice(sorted({len(place) for place in places}))
    return rng.choice([place for place in places if len(place) == depth])


class Raw(str):
    """Text that stands in JSON as it is."""


def change_value(content: Any, rng: random.Random, done: Damage) -> Any:
    """Another value, type, key or depth somewhere in plain data."""
    found = places_in(content)
    if not found:
        return rng.choice(VALUES)
    *above, key = shallow(found, rng)
    holder = content
    for step in above:
        holder = holder[step]
    old = holder[key]
    way = rng.choice(("value", "value", "value", "number", "delete", "rename", "type", "deep", "giant", "odd", "swap",
                      "extra",
                      "empty", "many"))
    where = ".".join(str(step) for step in (*above, key))[:60]
    if way == "delete":
        del holder[key]
    elif way == "rename" and isinstance(holder, dict):
        name = rng.choice((*TEXTS, f"{key}2", str(key).upper()))
        holder[name] = holder.pop(key)
    elif way == "type":
        holder[key] = rng.choice((lambda: [old], lambda: {"value": old}, lambda: str(old), lambda: bool(old),
                                  lambda: float(old) if isinstance(old, int) and abs(old) < 2**60 else [old, old],
                                  lambda: None))()
    elif way == "deep":
        holder[key] = Raw(rng.choice(("[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "[" * 150 + "]" * 150,
                                       "[" * 5000 + "]" * 5000)))
    elif way == "giant":
        holder[key] = rng.choice("xÿ ▁\n") * rng.choice((10_000, 300_000, 1_000_000))
    elif way == "odd":
        text = str(old)[:2000]
        place = rng.randrange(len(text) + 1)
        holder[key] = text[:place] + rng.choice(TEXTS) + text[place:]
    elif way == "swap":
        holder[key] = copy.deepcopy(at(content, shallow(found, rng)))        # no value holds itself
    elif way == "extra" and isinstance(old, dict):
        old[rng.choice(TEXTS)] = rng.choice(VALUES)
    elif way == "extra" and isinstance(old, list):
        old.insert(rng.randrange(len(old) + 1), rng.choice((*VALUES, *old[:3])))
    elif way == "empty" and isinstance(old, (dict, list, str)):
        holder[key] = type(old)()
    elif way == "many":
        holder[key] = [old] * min(rng.choice((0, 2, 1000, 50_000)), 2_000_000 // len(repr(old)) + 1)
    elif way == "number" or isinstance(old, (int, float)):
        holder[key] = rng.choice(NUMBERS)
        done.steps.append(f"{where} is {short(holder[key])}")
        return content
    else:
        holder[key] = rng.choice(VALUES)
        done.steps.append(f"{where} is {short(holder[key])}")
        return content
    done.steps.append(f"{where}: {way}")
    return content


def at(content: Any, place: tuple[Any, ...]) -> Any:
    for step in place:
        content = content[step]
    return content


def as_json(content: Any, indent: int | None = None) -> bytes:
    """JSON that may hold what no writer should write: NaN, halves of surrogate pairs, giant numbers, any depth."""
    raw: list[str] = []

    def plain(value: Any, depth: int = 0) -> Any:
        if depth > FARTHEST:
            return None
        if isinstance(value, Raw):
            raw.append(str(value))
            return f"@raw{len(raw) - 1}@"
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**300:
            raw.append(digits(value))
            return f"@raw{len(raw) - 1}@"
        if isinstance(value, dict):
            return {str(key): plain(part, depth + 1) for key, part in value.items()}
        return [plain(part, depth + 1) for part in value] if isinstance(value, list) else value

    text = json.dumps(plain(content), indent=indent)
    return re.sub(r'"@raw(\d+)@"', lambda found: raw[int(found[1])], text).encode()
