"""Shapes of layers: remembered by what decides them, and for a bounded number of kinds."""

from __future__ import annotations

from dataclasses import replace

from tsotsallm.checkpoint import shapes
from tsotsallm.checkpoint.reader import Checkpoint


def test_the_shapes_of_a_bounded_number_of_layers_are_remembered() -> None:
    spec = Checkpoint.open("embedded").spec
    expected = {"self_attn.q_proj": (256, 256), "self_attn.k_proj": (64, 256), "mlp.down_proj": (256, 768)}
    for width in range(2, 2 * shapes.MOST_SHAPES + 10, 2):
        other = replace(spec, config=spec.config | {"intermediate_size": width})
        assert shapes.linear_shapes(other, 0)["mlp.up_proj"] == (width, 256)
    assert len(shapes._remembered) == shapes.MOST_SHAPES
    assert {name: shapes.linear_shapes(spec, 0)[name] for name in expected} == expected
    assert shapes.layer_shapes(spec, 0) is shapes.layer_shapes(spec, 1)
