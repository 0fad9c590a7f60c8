"""How large a GGUF file will be: what is no matrix of it, and how many numbers its matrices have."""

from __future__ import annotations

import math
from pathlib import Path

from tsotsallm.checkpoint.shapes import layer_shapes, linear_shapes
from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.checkpoint.token_bytes import vocabulary_bytes

HEADER_BYTES = 4 << 10
TENSOR_BYTES = 96
"""Of a GGUF file's header for every tensor, and what aligns it."""


def matrix_weights(spec: ModelSpec) -> int:
    """Numbers in linears, embeddings and head."""
    ends = spec.vocabulary * spec.hidden * (1 if spec.tied else 2)
    return ends + sum(math.prod(shape) for layer in range(spec.layers) for shape in linear_shapes(spec, layer).values())


def other_bytes(spec: ModelSpec, directory: Path) -> int:
    """Bytes of a GGUF file that are not matrices, hardly more: norms and biases in 32 bits, headers, vocabulary."""
    tensors = 3 + sum(len(layer_shapes(spec, layer)) for layer in range(spec.layers))
    return 4 * other_values(spec) + HEADER_BYTES + TENSOR_BYTES * tensors + vocabulary_bytes(directory, spec.vocabulary)


def other_values(spec: ModelSpec) -> int:
    """Numbers in norms and biases."""
    return spec.hidden + sum(math.prod(shape) for layer in range(spec.layers)
                             for shape in layer_shapes(spec, layer).values() if len(shape) == 1)
