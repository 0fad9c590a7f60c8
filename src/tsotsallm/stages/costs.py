"""What forecasts are made of: bytes and operations of layers, worked out from shapes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tsotsallm.checkpoint.shapes import layer_shapes, linear_shapes
from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.streaming.hidden import batch_tokens

HEADER_BYTES_PER_TENSOR = 200
"""Of a safetensors header."""


@dataclass(frozen=True)
class Conditions:
    """What a run works with: `windows` of `window` calibration tokens, and the memory that is free for it in bytes."""

    windows: int
    window: int
    free_ram_bytes: int = 0

    @property
    def tokens(self) -> int:
        """Calibration tokens in all."""
        return self.windows * self.window


@dataclass(frozen=True)
class Cost:
    """Memory beyond the interpreter's and scratch on disk in bytes, floating-point operations.

    `engine` says how a stage that trains does so: resident, streamed, or layer by layer.
    """

    ram_bytes: int = 0
    scratch_bytes: int = 0
    flops: float = 0.0
    engine: str = ""

    def __or__(self, other: Cost) -> Cost:
        """The cost of one after the other: peaks are the larger ones, operations add up."""
        return Cost(max(self.ram_bytes, other.ram_bytes), max(self.scratch_bytes, other.scratch_bytes),
                    self.flops + other.flops, self.engine or other.engine)


def layer_weights(spec: ModelSpec, layer: int) -> int:
    """Numbers in a layer."""
    return sum(math.prod(shape) for shape in layer_shapes(spec, layer).values())


def dense_bytes(spec: ModelSpec, layer: int, element: int) -> int:
    """Bytes of a layer stored dense, `element` bytes a number, headers included."""
    return sum(math.prod(shape) * element + HEADER_BYTES_PER_TENSOR for shape in layer_shapes(spec, layer).values())


def forward_flops(spec: ModelSpec, layer: int, tokens: int, window: int) -> float:
    """Operations of a forward pass of `tokens` tokens, in windows of `window`, through a layer."""
    linears = sum(math.prod(shape) for shape in linear_shapes(spec, layer).values())
    return 2.0 * tokens * linears + 2.0 * tokens * window * spec.heads * spec.head_dim


def activation_bytes(spec: ModelSpec, window: int) -> int:
    """Bytes of what a layer computes for one batch."""
    return 4 * max(batch_tokens(spec.hidden), window) * (6 * spec.hidden + 3 * spec.feed_forward)


def gradient_bytes_per_token(spec: ModelSpec, window: int) -> int:
    """Bytes a token that a layer keeps for its gradient."""
    return 4 * (8 * spec.hidden + 4 * spec.feed_forward) + 2 * 4 * spec.heads * window


def widest_layer_bytes(spec: ModelSpec) -> int:
    """Bytes in float32 of the larger of the first and the last layer, which are as large as any."""
    return 4 * max(layer_weights(spec, layer) for layer in (0, spec.layers - 1))
