"""inspect, against counting a transformers model and the bytes of its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tsotsallm
from tests.compressing import tensors_of


def test_what_a_model_consists_of_is_counted(family_checkpoint: Path) -> None:
    found = tsotsallm.inspect(family_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(family_checkpoint)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())       # tied ones once
    assert found.bytes == sum(tensor.nbytes for tensor in tensors_of(family_checkpoint).values())
    assert sum(found.parameters_by_part.values()) == found.parameters
    assert sum(found.bytes_by_part.values()) == found.bytes
    norms = sum(parameter.numel() for name, parameter in model.named_parameters() if "norm" in name)
    assert found.parameters_by_part["norms"] == norms
    linears = [module for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    weights = sum(linear.weight.numel() for linear in linears)
    biases = sum(linear.bias.numel() for linear in linears if linear.bias is not None)      # their bytes count, too
    assert found.bits_per_linear_weight == pytest.approx(32 * (weights + biases) / weights, abs=0.001)
    assert (found.layers, found.hidden, found.tied_embeddings) == (
        4, 64, model.lm_head.weight is model.model.embed_tokens.weight)
