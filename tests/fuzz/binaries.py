"""Damage to safetensors and GGUF files: their headers taken apart, changed and written again."""

from __future__ import annotations

import json
import random
import struct
from dataclasses import dataclass
from typing import Any

from tests.fuzz.plain import TEXTS, Damage, Impossible, as_json, change_value, short
from tests.fuzz.texts import template_trick
from tsotsallm.checkpoint.families import ARCHITECTURES

DTYPES = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0",
          "F4",
          "F6_E2M3", "BOOL", "C64", "", "bf16", "X", "F32 ", None, 7, ["F32"])
WIDTHS = {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
          "I32": 4,
          "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8}
NO_WEIGHTS = ("I8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "C64")
"""Types that no dense weight is read from."""


# -- safetensors ---------------------------------------------------------------------------------------------------------


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    try:
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8:8 + size])
    except (ValueError, RecursionError, OverflowError):
        raise Impossible from None
    if not isinstance(header, dict) or size > len(content):
        raise Impossible
    return header, content[8 + size:]


def _joined(header: Any, body: bytes) -> bytes:
    text = as_json(header)
    return len(text).to_bytes(8, "little") + text + body


def _tensors(header: dict[str, Any]) -> dict[str, Any]:
    found = {name: entry for name, entry in header.items() if name != "__metadata__" and isinstance(entry, dict)
             and {"dtype", "shape", "data_offsets"} <= entry.keys()}
    if not found:
        raise Impossible
    return found


def _header_value(content: bytes, rng: random.Random, done: Damage) -> bytes:
    header, body = _split(content)
    return _joined(change_value(header, rng, done), body)


def _header_type(content: bytes, rng: random.Random, done: Damage) -> bytes:
    """Another type for a tensor, with a shape that fits its bytes where there is one."""
    header, body = _split(content)
    name = rng.choice(sorted(_tensors(header)))
    entry, dtype = header[name], rng.choice(DTYPES)
    old = entry["dtype"]
    entry["dtype"] = dtype
    done.steps.append(f"{name[-40:]} is {dtype}")
    if isinstance(dtype, str) and dtype in WIDTHS and isinstance(old, str) and old in WIDTHS and isinstance(entry["shape"],
                                                                                                            list):
        if WIDTHS[dtype] == WIDTHS[old]:
            done.refused = done.refused or (dtype in NO_WEIGHTS and dtype != old and old in ("BF16", "F16", "F32"))
        elif rng.random() < 0.7 and entry["shape"] and isinstance(entry["shape"][-1], int):
            entry["shape"][-1] = entry["shape"][-1] * WIDTHS[old] // WIDTHS[dtype]
    return _joined(header, body)


def _header_all_types(content: bytes, rng: random.Random, done: Damage) -> bytes:
    """Every tensor re-typed to one of the same width."""
    header, body = _split(content)
    found = _tensors(header)
    old = str(next(iter(found.values()))["dtype"])
    same = [dtype for dtype in WIDTHS if WIDTHS[dtype] == WIDTHS.get(old) and dtype != old]
    if not same:
        raise Impossible
    dtype = rng.choice(same)
    for entry in found.values():
        if entry["dtype"] == old:
            entry["dtype"] = dtype
    done.steps.append(f"all {old} are {dtype}")
    done.refused = done.refused or (dtype in NO_WEIGHTS and old in ("BF16", "F16", "F32"))
    return _joined(header, body)


def _header_name(content: bytes, rng: random.Random, done: Damage) -> bytes:
    header, body = _split(content)
    name = rng.choice(sorted(_tensors(header)))
    others = ("../../x", "/etc/x", "", "\ud800", "\0", "x" * 50_000, name + "\n", name.replace("0", "1"), name.upper(),
              name.replace("layers.0", "layers.-1"), name.replace("layers.0", "layers.99999999999"),
              name.replace("layers.0", "layers.0.0"), name.replace("weight", "bias"), f"model.{name}", "__metadata__")
    new = rng.choice(others)
    header = {(new if key == name else key): value for key, value in header.items()}
    done.steps.append(f"{name[-40:]} is named {short(new)}")
    return _joined(header, body)


def _header_shape(content: bytes, rng: random.Random, done: Damage) -> bytes:
    header, body = _split(content)
    name = rng.choice(sorted(_tensors(header)))
    entry = header[name]
    shape = entry["shape"] if isinstance(entry["shape"], list) else []
    entry["shape"] = rng.choice((shape[::-1], [*shape, 1], [1, *shape], shape[:-1], [], [0], [-1], [2**63], [0, 2**63],
                                 [2**32, 2**32],
                                 [1] * 5000, [*shape[:-1], 2**31], [None], ["1"], [1.5], shape * 2))
    done.steps.append(f"{name[-40:]} has shape {short(entry['shape'])}")
    return _joined(header, body)


def _header_offsets(content: bytes, rng: random.Random, done: Damage) -> bytes:
    header, body = _split(content)
    names = sorted(_tensors(header))
    name = rng.choice(names)
    other = header[rng.choice(names)]["data_offsets"]
    header[name]["data_offsets"] = rng.choice(([0, 0], [-8, 8], other, [8, 0], [2**63, 2**64], [0, 2**64], [0], [], None,
                                               ["0", "1"],
                                               [0.0, 4.0], [0, len(body) + 8], [len(body), len(body)], [1, 2, 3]))
    done.steps.append(f"{name[-40:]} lies at {short(header[name]['data_offsets'])}")
    return _joined(header, body)


def _header_size(content: bytes, rng: random.Random, done: Damage) -> bytes:
    size = rng.choice((0, 1, 2, 7, len(content) - 8, len(content), 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 100_000_000,
                       max(0, int.from_bytes(content[:8], "little") - 1)))
    done.steps.append(f"a header of {size} bytes")
    return (size % 2**64).to_bytes(8, "little") + content[8:]


def _header_padding(content: bytes, rng: random.Random, done: Damage) -> bytes:
    header, body = _split(content)
    text = json.dumps(header).encode() + rng.choice((b" " * 200, b" " * 3_000_000, b"\0" * 8, b"{}", b"\n\n"))
    done.steps.append("a padded header")
    return len(text).to_bytes(8, "little") + text + body


def _body(content: bytes, rng: random.Random, done: Damage) -> bytes:
    """Values that are no weights: NaN, infinity, the largest numbers."""
    _, body = _split(content)
    if len(body) < 64:
        raise Impossible
    place = rng.randrange(len(body) - 16) & ~7
    value = rng.choice((b"\xc0\x7f", b"\x80\x7f", b"\xff\xff", b"\x7f\x7f", b"\0\0\x80\x7f"[2:], b"\0\x7c"))
    size = rng.choice((2, 16, 4096))
    body = body[:place] + value * (size // 2) + body[place + size:]
    done.steps.append(f"{value!r} at {place} of the body")
    return content[:len(content) - len(body)] + body


def _body_size(content: bytes, rng: random.Random, done: Damage) -> bytes:
    done.steps.append("a body of another length")
    return content[:-rng.choice((1, 2, 100, 5000))] if rng.random() < 0.5 else content + b"\0" * rng.choice((1, 2, 4096))


SAFETENSORS = (_header_value, _header_value, _header_type, _header_type, _header_all_types, _header_name, _header_shape,
                _header_offsets, _header_size, _header_padding, _body, _body, _body_size)


# -- GGUF ----------------------------------------------------------------------------------------------------------------

_FIXED = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _LIST = 8, 9


@dataclass
class _Gguf:
    """A GGUF file in pieces: what is counted, keys with the bytes of their values, tensors, and the rest."""

    version: int
    keys: list[tuple[bytes, int, bytes]]                    # name, type, bytes of the value
    tensors: list[tuple[bytes, list[int], int, int]]        # name, sizes, type, offset
    data: bytes
    alignment: int = 32
    counted: tuple[int, int] | None = None                  # what the header says, where that is a lie

    @classmethod
    def read(cls, content: bytes) -> _Gguf:
        try:
            return cls._read(content)
        except (struct.error, IndexError, KeyError, OverflowError, MemoryError):
            raise Impossible from None

    @classmethod
    def _read(cls, content: bytes) -> _Gguf:
        magic, version, tensor_count, key_count = struct.unpack_from("<4sIQQ", content)
        if magic != b"GGUF" or tensor_count > 10_000 or key_count > 10_000:
            raise Impossible
        place = 24

        def text() -> bytes:
            nonlocal place
            [size] = struct.unpack_from("<Q", content, place)
            if size > len(content):
                raise Impossible
            place += 8 + size
            return content[place - size:place]

        def skip(kind: int) -> None:
            nonlocal place
            if kind == _TEXT:
                text()
            elif kind == _LIST:
                inner, count = struct.unpack_from("<IQ", content, place)
                place += 12
                if count > len(content):
                    raise Impossible
                for _ in range(count):
                    skip(inner)
            else:
                place += struct.calcsize(_FIXED[kind])

        keys = []
        for _ in range(key_count):
            name = text()
            [kind] = struct.unpack_from("<I", content, place)
            place += 4
            began = place
            skip(kind)
            keys.append((name, kind, content[began:place]))
        tensors = []
        for _ in range(tensor_count):
            name = text()
            [count] = struct.unpack_from("<I", content, place)
            if count > 8:
                raise Impossible
            sizes = list(struct.unpack_from(f"<{count}Q", content, place + 4))
            kind, offset = struct.unpack_from("<IQ", content, place + 4 + 8 * count)
            place += 16 + 8 * count
            tensors.append((name, sizes, kind, offset))
        return cls(version, keys, tensors, content[place + -place % 32:])

    def bytes(self) -> bytes:
        counted = self.counted or (len(self.tensors), len(self.keys))
        out = [b"GGUF", struct.pack("<IQQ", self.version % 2**32, counted[0] % 2**64, counted[1] % 2**64)]
        for name, kind, value in self.keys:
            out += [struct.pack("<Q", len(name)), name, struct.pack("<I", kind % 2**32), value]
        for name, sizes, kind, offset in self.tensors:
            out += [struct.pack("<Q", len(name)), name, struct.pack("<I", len(sizes)),
                    *(struct.pack("<Q", size % 2**64) for size in sizes), struct.pack("<IQ", kind % 2**32, offset % 2**64)]
        head = b"".join(out)
        return head + b"\0" * (-len(head) % self.alignment) + self.data


WHOLE = (0, 1, 2, 3, 5, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1)


def _gguf_value(content: bytes, rng: random.Random, done: Damage) -> bytes:
    """Another value, or another type, for a key."""
    file = _Gguf.read(content)
    if not file.keys:
        raise Impossible
    place = rng.randrange(len(file.keys))
    name, kind, value = file.keys[place]
    if kind in _FIXED and rng.random() < 0.7:
        size = struct.calcsize(_FIXED[kind])
        if kind in (6, 12):
            value = struct.pack(_FIXED[kind], rng.choice((0.0, -1.0, float("nan"), float("inf"), 3e38, 1e-45)))
        else:
            value = (rng.choice(WHOLE) % 256**size).to_bytes(size, "little")
    elif kind == _TEXT and rng.random() < 0.7:
        text = rng.choice((*TEXTS, "gpt2", "llama", "bert", "mamba", "t5", "{{", "{% for i in range(9) %}{{ messages[i] }}"))
        if name.endswith(b"chat_template") and rng.random() < 0.8:
            text = template_trick(value[8:].decode("utf-8", "replace"), rng)
        coded = text.encode("utf-8", "surrogatepass")
        value = struct.pack("<Q", len(coded)) + coded
    elif kind == _LIST and rng.random() < 0.7:
        inner, count = struct.unpack_from("<IQ", value)
        value = rng.choice((lambda: struct.pack("<IQ", inner, 0), lambda: struct.pack("<IQ", inner, count + 1) + value[12:],
                            lambda: struct.pack("<IQ", inner, 2**40) + value[12:],
                            lambda: struct.pack("<IQ", rng.randrange(14), count) + value[12:],
                            lambda: value[:12] + rng.randbytes(8) + value[20:]))()
    else:
        kind = rng.choice((*range(14), 2**31))
        value = rng.choice((value, value, struct.pack("<Q", rng.choice(WHOLE)), struct.pack("<IQ", 9, 1) * 50))
    file.keys[place] = name, kind, value
    done.steps.append(f"{name.decode(errors='replace')}: {kind}, {value[:24]!r}")
    return file.bytes()


def _gguf_key(content: bytes, rng: random.Random, done: Damage) -> bytes:
    """A key deleted, doubled, renamed, or moved."""
    file = _Gguf.read(content)
    if not file.keys:
        raise Impossible
    place = rng.randrange(len(file.keys))
    name, kind, value = file.keys[place]
    way = rng.choice(("delete", "delete", "delete", "double", "rename", "swap"))
    if way == "delete":
        del file.keys[place]
    elif way == "double":
        file.keys.append(file.keys[place])
    elif way == "rename":
        file.keys[place] = rng.choice((b"", b"\xff", b"x" * 70_000, name.upper(), b"general.alignment",
                                       b"llama.block_count")), kind, value
    else:
        other = rng.randrange(len(file.keys))
        file.keys[place] = name, *file.keys[other][1:]
    done.steps.append(f"{name.decode(errors='replace')}: {way}")
    return file.bytes()


def _gguf_tensor(content: bytes, rng: random.Random, done: Damage) -> bytes:
    file = _Gguf.read(content)
    if not file.tensors:
        raise Impossible
    place = rng.randrange(len(file.tensors))
    name, sizes, kind, offset = file.tensors[place]
    way = rng.choice(("name", "sizes", "type", "offset", "delete", "double"))
    if way == "name":
        name = rng.choice((b"", b"\xff", name + b"x", name.replace(b"0", b"1"), b"x" * 200, file.tensors[0][0]))
    elif way == "sizes":
        sizes = rng.choice(([], sizes[::-1], [*sizes, 1], [0], [rng.choice(WHOLE), *sizes[1:]], [2**32, 2**32], [2**63, 2],
                            [1] * 9, [size * 2 for size in sizes], [size // 2 for size in sizes]))
    elif way == "type":
        kind = rng.choice((*range(40), 255, 2**31, 2**32 - 1))
    elif way == "offset":
        offset = rng.choice((*WHOLE, offset + 1, offset + 32, len(file.data)))
    if way == "delete":
        del file.tensors[place]
    elif way == "double":
        file.tensors.append(file.tensors[place])
    else:
        file.tensors[place] = name, sizes, kind, offset
    done.steps.append(f"{file.tensors[place - 1][0].decode(errors='replace')} or the next: {way}")
    return file.bytes()


def _gguf_head(content: bytes, rng: random.Random, done: Damage) -> bytes:
    file = _Gguf.read(content)
    way = rng.choice(("version", "counts", "alignment", "data", "magic"))
    done.steps.append(f"the header's {way}")
    if way == "magic":
        return rng.choice((b"GGUg", b"FUGG", b"GGML", b"\0\0\0\0")) + content[4:]
    if way == "version":
        file.version = rng.choice((0, 1, 2, 4, 2**31, 0x03000000))
    elif way == "counts":
        file.counted = rng.choice(((rng.choice(WHOLE), len(file.keys)), (len(file.tensors), rng.choice(WHOLE)),
                                   (len(file.tensors) + 1, len(file.keys)), (len(file.tensors), len(file.keys) - 1)))
    elif way == "alignment":
        value = rng.choice((0, 1, 7, 8, 64, 4096, 2**31, 2**32 - 1))
        file.keys.append((b"general.alignment", 4, struct.pack("<I", value)))
    else:
        file.data = rng.choice((b"", file.data[:-1], file.data[:len(file.data) // 2], file.data + b"\0" * 64,
                                b"\xff" * len(file.data), b"\0" * len(file.data)))
    return file.bytes()


def _gguf_family(content: bytes, rng: random.Random, done: Damage) -> bytes:
    """The same file as one of another architecture: its name and all keys that begin with it."""
    file = _Gguf.read(content)
    old, new = _architecture(file), rng.choice((*ARCHITECTURES, "mamba", "")).encode()
    for place, (name, kind, value) in enumerate(file.keys):
        if name == b"general.architecture":
            file.keys[place] = name, _TEXT, struct.pack("<Q", len(new)) + new
        elif old and name.startswith(old + b"."):
            file.keys[place] = new + name[len(old):], kind, value
    done.steps.append(f"a {new.decode()}")
    return file.bytes()


def _gguf_more(content: bytes, rng: random.Random, done: Damage) -> bytes:
    """A key that some families read, with a value that may not be one."""
    file = _Gguf.read(content)
    name = _architecture(file) + b"." + rng.choice(MORE_KEYS)
    kind = rng.choice((4, 4, 6, 6, 7, _TEXT, _LIST))
    if kind == _TEXT:
        text = rng.choice((b"yarn", b"linear", b"longrope", b"none", b"warp", b""))
        value = struct.pack("<Q", len(text)) + text
    elif kind == _LIST:
        inner, count = rng.choice((4, 6, 7)), rng.choice((0, 1, 2, 3, 40))
        value = struct.pack("<IQ", inner, count) + rng.randbytes(count * struct.calcsize(_FIXED[inner]))
    elif kind == 6:
        value = struct.pack("<f", rng.choice((0.0, 1.0, -1.0, 0.5, 1e30, 1e-30, float("nan"), float("inf"))))
    else:
        value = rng.choice((*WHOLE, 8, 9, 16)).to_bytes(8, "little")[:struct.calcsize(_FIXED[kind])]
    file.keys = [key for key in file.keys if key[0] != name] + [(name, kind, value)]
    done.steps.append(f"{name.decode(errors='replace')}: {kind}, {value[:16]!r}")
    return file.bytes()


def _architecture(file: _Gguf) -> bytes:
    """The architecture that a header names; empty where it names none."""
    return next((value[8:] for name, kind, value in file.keys if name == b"general.architecture" and kind == _TEXT), b"")


MORE_KEYS = tuple(one.encode() for one in (
    "attention.sliding_window", "attention.sliding_window_pattern", "attention.key_length", "attention.key_length_swa",
    "attention.scale", "attention.temperature_scale", "attention.causal", "attn_logit_softcapping",
    "final_logit_softcapping", "embedding_scale", "residual_scale", "logit_scale", "rope.freq_base", "rope.freq_base_swa",
    "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor",
    "rope.scaling.finetuned", "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_log_multiplier", "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor", "context_length", "block_count", "embedding_length", "vocab_size"))
"""Keys of a header that say how a model computes, without their architecture."""
GGUF = (_gguf_value, _gguf_value, _gguf_value, _gguf_key, _gguf_key, _gguf_tensor, _gguf_tensor, _gguf_head, _gguf_more,
        _gguf_family)
