"""A checkpoint as one transformers model in memory; repeated layers share their weights, not their cache."""

from __future__ import annotations

from typing import Any

import torch

from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.spec import EMBEDDING, FINAL_NORM, HEAD
from tsotsallm.checkpoint.view import View


def resident(source: Checkpoint | View, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """Load any checkpoint, ours included, or a view of one as a transformers model that generates.

    Each executed layer is a module with its own index, hence its own KV cache; layers that are stored once hold the
    same parameters.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    view = source if isinstance(source, View) else View.of(source)
    checkpoint, spec = view.checkpoint, view.spec
    order = [view.stored(index) for index in range(spec.layers)]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(spec.hf_config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=spec.hf_config)
    state = {name: checkpoint.tensor(name).to(device, dtype) for name in (EMBEDDING, FINAL_NORM)}
    state[HEAD] = state[EMBEDDING] if spec.tied else checkpoint.tensor(HEAD).to(device, dtype)
    stored = {index: {name: tensor.to(device, dtype) for name, tensor in checkpoint.layer(index).items()}
              for index in sorted(set(order))}
    for index, origin in enumerate(order):
        state |= {f"model.layers.{index}.{name}": tensor for name, tensor in stored[origin].items()}
    model.load_state_dict(state, assign=True)
    first: dict[int, Any] = {}
    for index, origin in enumerate(order):
        layer = model.model.layers[index]
        if origin in first:
            _share(first[origin], layer)
        first.setdefault(origin, layer)
    model.tie_weights()
    model.model.rotary_emb.to(device)
    if (checkpoint.directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.directory)
    return model.eval()


def _share(original: torch.nn.Module, copy: torch.nn.Module) -> None:
    """Let one module use the parameters of another of the same make."""
    for name, parameter in original.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(copy.get_submodule(owner), leaf, parameter)
