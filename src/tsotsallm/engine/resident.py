"""A checkpoint as one transformers model in memory; repeated layers share their weights, not their cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tsotsallm.checkpoint.reader import GENERATION, Checkpoint, layer_prefix
from tsotsallm.checkpoint.spec import EMBEDDING, FINAL_NORM, HEAD
from tsotsallm.checkpoint.view import View
from tsotsallm.engine.packed import PackedLinear
from tsotsallm.errors import CheckpointError
from tsotsallm.files import one_line

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


def resident(source: Checkpoint | View, dtype: torch.dtype = torch.float32, device: str = "cpu", *,
             keep_packed: bool = False) -> PreTrainedModel:
    """Load a checkpoint, ours or another, or a view of one, as a transformers model that generates.

    Each executed layer is a module with an index, and therefore a KV cache, of its own; layers that are stored once share
    their parameters. With `keep_packed`, linears that are packed on disk stay packed in memory.
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
    packed = {index: _packed_linears(checkpoint, index) if keep_packed else {} for index in set(order)}
    stored = {index: {name: checkpoint.tensor(layer_prefix(index) + name).to(device, dtype)
                      for name in checkpoint.layer_names(index) if name.rpartition(".")[0] not in packed[index]}
              for index in sorted(set(order))}
    for index, origin in enumerate(order):
        for name, linear in packed[origin].items():
            model.model.layers[index].set_submodule(name, linear)
        state |= {f"model.layers.{index}.{name}": tensor for name, tensor in stored[origin].items()}
    model.load_state_dict(state, assign=True)
    embeddings = model.get_input_embeddings()
    if hasattr(embeddings, "scalar_embed_scale"):           # a buffer that no checkpoint stores
        embeddings.embed_scale = torch.tensor(embeddings.scalar_embed_scale, device=device)
    first: dict[int, torch.nn.Module] = {}
    for index, origin in enumerate(order):
        layer = model.model.layers[index]
        if origin in first:
            _share(first[origin], layer)
        first.setdefault(origin, layer)
    model.tie_weights()
    model.model.rotary_emb.to(device)
    model.generation_config = _generation(checkpoint, GenerationConfig) or model.generation_config
    return model.eval()


def _generation(checkpoint: Checkpoint, kind: type[GenerationConfig]) -> GenerationConfig | None:
    """The checkpoint's generation config; None where it has none."""
    found = checkpoint.generation
    if found is None:
        return None
    try:
        return kind.from_dict(found)
    except Exception as error:  # transformers raises many types for a bad config
        raise CheckpointError(f"{checkpoint.directory / GENERATION} cannot be used ({type(error).__name__}: "
                              f"{one_line(error)}); delete it, or restore it") from None


def _packed_linears(checkpoint: Checkpoint, stored: int) -> dict[str, PackedLinear]:
    """The packed linears of a stored layer, by name without prefix."""
    prefix = layer_prefix(stored)
    linears = {}
    for name in checkpoint.layer_names(stored):
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and (packed := checkpoint.packed(prefix + module)) is not None:
            bias = f"{prefix}{module}.bias"
            linears[module] = PackedLinear(packed, checkpoint.tensor(bias) if bias in checkpoint.records else None,
                                         checkpoint.beside(prefix + module))
    return linears


def _share(original: torch.nn.Module, copy: torch.nn.Module) -> None:
    """Let one module use the parameters of another of the same structure."""
    for name, parameter in original.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(copy.get_submodule(owner), leaf, parameter)
