"""Quantisation: integers, one of GGUF's grids, or a mixture of these within a budget, behind one key of recipes."""

from __future__ import annotations

from tsotsallm.numerics.ggml import LAYOUTS
from tsotsallm.stages.quantize.common import Quantize
from tsotsallm.stages.quantize.gguf import GgufQuantize
from tsotsallm.stages.quantize.integer import IntegerQuantize
from tsotsallm.stages.quantize.mixed import MixedQuantize

Quantize.kinds[:] = [
    (lambda fields: fields.get("grid") == "mixed" or any(
        fields.get(name) is not None for name in ("bits_per_weight", "file_bytes", "grids")), MixedQuantize),
    (lambda fields: fields.get("grid") in LAYOUTS, GgufQuantize),
    (lambda fields: True, IntegerQuantize)]

__all__ = ["GgufQuantize", "IntegerQuantize", "MixedQuantize", "Quantize"]
