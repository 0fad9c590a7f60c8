"""Checkpoints and GGUF files with one thing changed, and what is said of those that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

import tsotsallm
from tsotsallm.errors import CheckpointError

Header = dict[str, Any]
KINDS = {int: gguf.GGUFValueType.UINT32, bool: gguf.GGUFValueType.BOOL, float: gguf.GGUFValueType.FLOAT32,
         str: gguf.GGUFValueType.STRING}


def edit_json(path: Path, **changes: Any) -> None:
    """Change some keys of an object in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_header(path: Path, change: Callable[[Header], object]) -> None:
    """Rewrite a file's header; what `change` returns, if it is text, stands in its place."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = {name: entry for name, entry in json.loads(content[8:8 + size]).items() if name != "__metadata__"}
    changed = change(header)
    text = (changed if isinstance(changed, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size:])


def refused(path: Path, match: str | None = None) -> str:
    """What `inspect` says of a checkpoint that it refuses: one line of bounded length."""
    with pytest.raises(CheckpointError, match=match) as caught:
        tsotsallm.inspect(path)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message.replace(str(path), "")) < 500
    return message


def rewritten(file: Path, out: Path, drop: tuple[str, ...] = (), endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
              **changes: Any) -> Path:
    """The same file by the gguf library, keys left out or changed; `__` stands for a dot.

    A value is of the kind that its type has in KINDS, or that stands beside it in a pair.
    """
    reader = gguf.GGUFReader(file)
    arch = reader.fields["general.architecture"].contents()
    changed = {key.replace("__", ".") if key.split("__")[0] in ("general", "tokenizer", "split", "tsotsallm", "adapter") else
               f"{arch}.{key.replace('__', '.')}": value for key, value in changes.items()}
    writer = gguf.GGUFWriter(out, changed.get("general.architecture", arch), endianess=endian)
    for key, field in reader.fields.items():
        left_out = ("general.architecture", *changed, *drop, *(f"{arch}.{one}" for one in drop))
        if key.startswith("GGUF.") or key in left_out:
            continue
        kind = field.types[0]
        writer.add_key_value(key, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    for key, value in changed.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif key != "general.architecture":
            writer.add_key_value(key, *(value if isinstance(value, tuple) else (value, KINDS[type(value)])))
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
