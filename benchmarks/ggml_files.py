"""GGUF files by ggml's own quantiser, with an importance matrix, through the library of xllamacpp.

    python benchmarks/ggml_files.py SOURCE.gguf OUT.gguf TYPE --imatrix FILE [--threads 2]

TYPE is a type of ggml, such as q4_0, for every linear, with embeddings and head in 16 bits; or a file type of llama.cpp,
such as Q4_K_M, by its rules for a LLaMA, embeddings and head included (llama_tensor_get_type). Where the blocks of a type do
not divide a row, llama.cpp's next type takes its place. SOURCE is a file in floating point.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import llama

INSTEAD = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", **dict.fromkeys(("q2_k", "q3_k", "iq4_xs", "iq3_s", "iq2_s"),
                                                                        "iq4_nl")}
"""What llama.cpp takes where 256 does not divide a row."""
FILE_TYPES = {"Q4_K_M": "q4_k", "IQ4_XS": "iq4_xs", "Q3_K_M": "q3_k", "IQ3_M": "iq3_s", "IQ3_S": "iq3_s", "Q2_K": "q2_k",
              "IQ2_S": "iq2_s"}
"""File type of llama.cpp -> the type of most of its linears."""
ROLES = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj", "ffn_gate": "gate_proj",
         "ffn_up": "up_proj", "ffn_down": "down_proj"}


@dataclass(frozen=True)
class Shape:
    """What the rules of file types depend on."""

    layers: int
    grouped: bool           # four or more heads share their keys and values


def type_in(file_type: str, shape: Shape, layer: int, role: str) -> str:
    """The type that llama.cpp gives a linear in a file of this type, with an importance matrix; its blocks may not fit."""
    most, eighth = FILE_TYPES[file_type], shape.layers // 8
    more = layer < eighth or layer >= 7 * shape.layers // 8 or (layer - eighth) % 3 == 2
    in_values = {"Q4_K_M": "q6_k" if more else most, "IQ4_XS": "q5_k" if shape.grouped else most,
                 "Q3_K_M": "q5_k" if layer < 2 else "q4_k", "IQ3_S": "q4_k" if shape.grouped else most,
                 "IQ3_M": "q4_k",
                 "Q2_K": "q4_k" if shape.grouped else "q3_k", "IQ2_S": "q4_k" if shape.grouped else "iq3_s"}
    in_down = {"Q4_K_M": "q6_k" if more else most, "Q3_K_M": "q5_k" if layer < shape.layers // 16 else "q4_k",
               "Q2_K": "q3_k", "IQ2_S": "iq3_s" if layer < eighth else most, "IQ3_M": "q4_k" if layer < eighth else most}
    in_output = {"Q3_K_M": "q4_k", "Q2_K": "q3_k", "IQ2_S": "iq3_s", "IQ3_M": "q4_k"}
    return {"v_proj": in_values, "down_proj": in_down, "o_proj": in_output}.get(role, {}).get(file_type, most)


def type_of_embeddings(file_type: str, hidden: int) -> str:
    """The type that llama.cpp gives tied embeddings in a file of this type."""
    if hidden % block(FILE_TYPES[file_type]):
        return "q8_0"
    return "q5_k" if file_type == "IQ2_S" else "q6_k"


def block(kind: str) -> int:
    """Weights in a block of a type."""
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]][0]


def fitted(kind: str, columns: int) -> str | None:
    """This type where its blocks divide a row, else the next one of llama.cpp's whose blocks do; None where none does."""
    found = kind if columns % block(kind) == 0 else INSTEAD.get(kind, kind)
    return found if columns % block(found) == 0 else None


def types_of(tensors: Mapping[str, tuple[int, ...]], kind: str, shape: Shape) -> dict[str, str | None]:
    """Matrix of a GGUF file -> its type, None for 16 bits; `tensors` has (rows, columns) by name."""
    found = {}
    for name, (_, columns) in tensors.items():
        parts = name.split(".")
        if parts[0] == "blk":
            asked = type_in(kind, shape, int(parts[1]), ROLES[parts[2]]) if kind in FILE_TYPES else kind
            found[name] = fitted(asked, columns)
        elif kind in FILE_TYPES and name in ("token_embd.weight", "output.weight"):
            found[name] = fitted(type_of_embeddings(kind, columns), columns)
        else:
            found[name] = None
    return found


def read_importance(path: Path) -> dict[str, Any]:
    """Matrix -> the mean squares of its inputs, (columns,) float32, from an importance matrix as llama.cpp writes it."""
    values = {tensor.name: np.asarray(tensor.data, dtype=np.float32).reshape(-1) for tensor in gguf.GGUFReader(path).tensors}
    names = [name.removesuffix(".in_sum2") for name in values if name.endswith(".in_sum2")]
    return {name: values[f"{name}.in_sum2"] / values[f"{name}.counts"] for name in names}


def quantise_file(source: Path, out: Path, kind: str, importance: Mapping[str, Any], threads: int = 2) -> None:
    """Write `source` with its matrices on the types of `kind`; everything else is copied, with 16 bits for matrices."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    heads, kv_heads, layers = (int(reader.fields[f"{architecture}.{key}"].contents()) for key in (
        "attention.head_count", "attention.head_count_kv", "block_count"))
    matrices = {tensor.name: tensor for tensor in reader.tensors if len(tensor.shape) == 2}
    shapes = {name: (int(tensor.shape[1]), int(tensor.shape[0])) for name, tensor in matrices.items()}
    types = types_of(shapes, kind, Shape(layers, heads // kv_heads >= 4))

    def quantised(name: str) -> Any:
        weight = gguf.quants.dequantize(matrices[name].data, matrices[name].tensor_type)
        taken = types[name]
        return weight.astype(np.float16) if taken is None else llama.quantise(taken, weight, importance.get(name))

    writer = gguf.GGUFWriter(out, architecture)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inside = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inside)
    with ThreadPoolExecutor(threads) as pool:
        blocks = dict(zip(matrices, pool.map(quantised, matrices), strict=True))
    for tensor in reader.tensors:
        taken = types.get(tensor.name)
        stored = gguf.GGMLQuantizationType[taken.upper()] if taken is not None else None
        writer.add_tensor(tensor.name, blocks.get(tensor.name, tensor.data), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("type")
    parser.add_argument("--imatrix", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    quantise_file(asked.source, asked.out, asked.type, read_importance(asked.imatrix), asked.threads)


if __name__ == "__main__":
    main()
