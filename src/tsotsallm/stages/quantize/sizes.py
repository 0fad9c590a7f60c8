"""How many numbers a model's matrices have, and everything beside them."""

from __future__ import annotations

import math

from tsotsallm.checkpoint.shapes import layer_shapes, linear_shapes
from tsotsallm.checkpoint.spec import ModelSpec


def matrix_weights(spec: ModelSpec) -> int:
    """Numbers in linears, embeddings and head."""
    ends = spec.vocabulary * spec.hidden * (1 if spec.tied else 2)
    return ends + sum(math.prod(shape) for layer in range(spec.layers) for shape in linear_shapes(spec, layer).values())


def other_values(spec: ModelSpec) -> int:
    """Numbers in norms and biases."""
    return spec.hidden + sum(math.prod(shape) for layer in range(spec.layers)
                             for shape in layer_shapes(spec, layer).values() if len(shape) == 1)
