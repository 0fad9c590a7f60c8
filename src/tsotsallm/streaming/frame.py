"""A one-layer model into which layers are loaded one after another; the arithmetic is the transformers library's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tsotsallm.checkpoint.shapes import final_norm, one_layer_model
from tsotsallm.checkpoint.spec import FINAL_NORM, ModelSpec
from tsotsallm.checkpoint.view import View
from tsotsallm.machine import return_large_blocks
from tsotsallm.timing import counted

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

Load = Callable[["Frame", int], dict[str, Tensor]]
"""Loads a layer into the frame and returns, by name, the tensors whose gradients are wanted."""


class InputsSeen(Exception):
    """Ends the forward pass of an observed layer once the inputs of its last linear are known."""


class Frame:
    """Runs the layers of one view; at most one layer's weights are in memory."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        return_large_blocks()
        self.spec, self.device = spec, device
        self.models: dict[str, PreTrainedModel] = {}
        self.model: Any = None

    def load(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Replace the current layer by layer `index`, whose float32 tensors are given by name."""
        self.clear()
        signature = self.spec.signature(index)
        if signature not in self.models:
            self.models[signature] = one_layer_model(self.spec, index)
            _remember_rotations(self.models[signature].rotary_emb.to(self.device))
        self.model = self.models[signature]
        state = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        self.layer.load_state_dict(state, assign=True)
        self.layer.requires_grad_(False)

    def clear(self) -> None:
        """Release the layer's weights."""
        if self.model is not None:
            self.layer.to("meta")
            self.model = None

    @property
    def layer(self) -> nn.Module:
        """The module of the loaded layer."""
        layer: nn.Module = self.model.layers[0]
        return layer

    def linear(self, name: str) -> nn.Linear:
        """A linear of the loaded layer, by its name inside the layer."""
        module = self.layer.get_submodule(name)
        assert isinstance(module, nn.Linear)
        return module

    def linear_names(self) -> list[str]:
        """Names of the layer's linears in the order of execution, which is that of their definition."""
        return [name for name, module in self.layer.named_modules() if isinstance(module, nn.Linear)]

    @counted("forward passes")
    def __call__(self, hidden: Tensor, *, positions: Tensor | None = None, allowed: Tensor | None = None,
                 cache: Cache | None = None) -> Tensor:
        """The layer's output for windows of hidden states, (windows, tokens, width) -> the same shape.

        Tokens are consecutive and attend to those before them, unless `positions` (windows, tokens) and `allowed`
        (windows, 1, tokens, tokens) bool say otherwise; a transformers `cache` is read and extended.
        """
        where = self.device
        if allowed is not None and self.spec.traits.attention == "eager":      # it adds its mask to the scores
            allowed = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        output: Tensor = self.model(
            inputs_embeds=hidden.to(where), position_ids=None if positions is None else positions.to(where),
            attention_mask=None if allowed is None else allowed.to(where), past_key_values=cache,
            use_cache=cache is not None).last_hidden_state
        return output

    def attention(self, hidden: Tensor) -> Tensor:
        """The attention weights of every window, (windows, heads, queries, keys); each row sums to one."""
        config = self.model.config
        chosen = config._attn_implementation
        config._attn_implementation = "eager"       # the only implementation that returns its weights
        try:
            out = self.model(inputs_embeds=hidden.to(self.device), use_cache=False, output_attentions=True)
        finally:
            config._attn_implementation = chosen
        maps: Tensor = out.attentions[0]
        return maps

    @contextmanager
    def watching(self, names: Iterable[str], seen: Callable[[str, Tensor], None], *, to_the_end: bool) -> Iterator[None]:
        """Call `seen` with the name and the inputs of each linear in `names` while the block runs.

        A forward pass raises InputsSeen where the last linear would start, unless it should run `to_the_end`.
        """
        hooks = []
        last = self.linear_names()[-1]
        for name in names:
            def hook(_module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                seen(name, args[0])
                if name == last and not to_the_end:
                    raise InputsSeen
            hooks.append(self.linear(name).register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()


def _remember_rotations(rotary: nn.Module) -> None:
    """Let a module of rotary embeddings answer at once where it is asked for the positions of the batch before."""
    plain, last = rotary.forward, list[tuple[Tensor, torch.dtype, object]]()

    def forward(like: Tensor, position_ids: Tensor, *kind: object, **named: object) -> object:
        if kind or named or torch.is_inference_mode_enabled():
            return plain(like, position_ids, *kind, **named)
        if not last or last[0][1] != like.dtype or not torch.equal(last[0][0], position_ids):
            last[:] = [(position_ids.clone(), like.dtype, plain(like, position_ids))]
        return last[0][2]

    rotary.forward = forward


def load_final_norm(view: View, device: torch.device) -> nn.Module:
    """The final norm of a checkpoint, with its weights, on a device."""
    norm: nn.Module = final_norm(view.spec)
    norm.load_state_dict({"weight": view.checkpoint.tensor(FINAL_NORM).to(device)}, assign=True)
    return norm.requires_grad_(False)
