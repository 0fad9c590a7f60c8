"""A checkpoint with layers dropped, reordered or repeated; no byte is copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tsotsallm.checkpoint.reader import Checkpoint, layer_prefix
from tsotsallm.checkpoint.shards import TensorRecord
from tsotsallm.checkpoint.spec import EMBEDDING, ModelSpec, slice_config
from tsotsallm.errors import CorpusError
from tsotsallm.timing import counted


@dataclass(frozen=True)
class View:
    """A checkpoint in an order of its own: `order[i]` is the executed layer of the checkpoint that runs as layer i."""

    checkpoint: Checkpoint
    order: tuple[int, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> View:
        """The view of a whole checkpoint in its own order."""
        return cls(checkpoint, tuple(range(checkpoint.spec.layers)))

    def reordered(self, order: Sequence[int]) -> View:
        """The same checkpoint with only the layers `order` of this view, in that order."""
        return View(self.checkpoint, tuple(self.order[index] for index in order))

    @cached_property
    def spec(self) -> ModelSpec:
        """The spec of the model that this view shows, repeated layers written out."""
        whole = self.checkpoint.spec
        if self.order == tuple(range(whole.layers)):
            config = whole.config
        else:
            config = slice_config(whole.config, self.order, whole.layers)
        return ModelSpec(config, whole.quantization, tuple(range(len(self.order))))

    def stored(self, index: int) -> int:
        """The stored layer behind layer `index`."""
        return self.checkpoint.spec.layer_order[self.order[index]]

    @counted("disk")
    def layer(self, index: int) -> dict[str, Tensor]:
        """Effective float32 tensors of layer `index`."""
        return self.checkpoint.layer(self.stored(index))

    def layer_tensor(self, index: int, name: str) -> Tensor:
        """The effective float32 values of one tensor of layer `index`, by its name inside the layer."""
        return self.checkpoint.tensor(layer_prefix(self.stored(index)) + name)

    def layer_records(self, index: int) -> dict[str, TensorRecord]:
        """The tensors of layer `index` exactly as stored, by name inside the layer."""
        return self.checkpoint.layer_records(self.stored(index))

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings of token ids as they enter the first layer, read row by row: (tokens,) -> (tokens, hidden) float32.

        Raises CorpusError for a token that the model does not have.
        """
        unique, places = torch.unique(ids, return_inverse=True)
        if len(unique) and int(unique[-1]) >= self.spec.vocabulary:
            raise CorpusError(f"the text has token {int(unique[-1])}, but {self.checkpoint.directory} has "
                              f"{self.spec.vocabulary} tokens: its tokenizer belongs to another model")
        rows = torch.cat([self.checkpoint.rows(EMBEDDING, row, row + 1) for row in unique.tolist()])
        scale = self.spec.embedding_scale
        return (rows if scale == 1 else rows * scale)[places]
